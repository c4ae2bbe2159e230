"""The explorer as a user meets it: JupyterLab and voila on this machine, in a real browser that drags and
saves.

Ten times in a row: for i in $(seq 10); do python -m pytest -q -x -s tests/test_browser.py || break; done"""
import base64
import io
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from helpers import needs_chromium, slow
from PIL import Image

from tinycats.dit import TinyDiT, load_model, save_model
from tinycats.explorer import generate_from_settings, image_settings, sheet

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = needs_chromium

ROOT = Path(__file__).resolve().parents[1]
DONE = "finished after"
FRUIT = ["Granny Smith", "conférence", "<b>plum & co</b>"]  # names of folders
LAB_SETTINGS = {"notification": dict(fetchNews="false", checkForUpdates=False, doNotDisturbMode=True)}
IDLE = "Python 3 (ipykernel) | Idle"

HAS_STATUS = """words => [...document.querySelectorAll('[role=status]')]
    .some(e => words.every(w => e.innerText.includes(w)))"""
FIGURES = """[...document.querySelectorAll('figure')].map(
    f => [f.innerText.trim(), f.querySelector('img').src, f.querySelector('img').naturalWidth])"""
FITS = """() => [...document.querySelectorAll(
    '.widget-hslider, .widget-dropdown, figure, [role=status], .jupyter-button')]
    .every(e => { const r = e.getBoundingClientRect();
                  return r.width > 0 && r.left >= 0 && r.right <= window.innerWidth + 1 })"""
STOPWATCH = """() => {
    const image = () => document.querySelector('figure img').src, before = image(), times = window.times = {}
    const painted = name => requestAnimationFrame(() => requestAnimationFrame(
        () => times[name] ??= (performance.now() - times.click)/1000))
    document.addEventListener('click', () => {
        times.click = performance.now()
        new MutationObserver((_, observer) => {
            if (image() != before && !times.seen) { times.seen = true; painted('first') }
            const words = [...document.querySelectorAll('[role=status]')].map(e => e.innerText)
                .find(t => t.includes(' steps, seed '))
            if (times.seen && words.includes('finished after')) { observer.disconnect(); painted('final') }
        }).observe(document.body, {subtree: true, childList: true, characterData: true})
    }, {once: true, capture: true}) }"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A project of its own: the page, the bundled weights, a run that has raw weights too, one of own classes."
    home = tmp_path_factory.mktemp("browser")
    for name in ("nbs", "outputs/toy", "outputs/both", "outputs/fruit"):
        (home/name).mkdir(parents=True)
    (home/"settings.ini").write_text("lib_name = tinycats\n")
    shutil.copy(ROOT/"nbs/explore.ipynb", home/"nbs")
    for run in ("toy", "both"):
        shutil.copy(ROOT/"outputs/toy/ema.safetensors", home/"outputs"/run)
    raw = load_model(ROOT/"outputs/toy/ema.safetensors")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in raw.parameters():
            p += .15*p.std(correction=0)*torch.randn(p.shape, generator=generator)
    save_model(raw, home/"outputs/both/model.safetensors")
    fruit = TinyDiT(16, patch_size=8, dim=32, depth=1, num_heads=2, num_classes=len(FRUIT))
    fruit.classes = FRUIT
    save_model(fruit, home/"outputs/fruit/ema.safetensors")
    return home


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def server_environment(config):
    "Nothing of the user's Jupyter configuration, and no proxy."
    for name, values in LAB_SETTINGS.items():
        file = config/f"settings/@jupyterlab/apputils-extension/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON"))}
    folders = dict(JUPYTER_CONFIG_DIR="", JUPYTER_RUNTIME_DIR="runtime", IPYTHONDIR="ipython",
                   JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces")
    env = {k: v for k, v in inherited.items() if "proxy" not in k.lower()}
    return env | {name: str(config/folder) for name, folder in folders.items()} | {"PYTHONPATH": str(ROOT)}


def server_command(kind, home, port, token):
    if kind == "lab":
        return [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser",
                "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
                f"--ServerApp.root_dir={home}",
                f"--IdentityProvider.token={token}"]
    return [sys.executable, "-m", "voila", "nbs/explore.ipynb", f"--port={port}", "--Voila.ip=127.0.0.1",
            f"--token={token}", "--VoilaConfiguration.allow_theme_override=YES", "--no-browser",
            *HOST_CHECK]


# As the Makefile has it: a page elsewhere must not reach voila under a name of its own (DNS rebinding).
HOST_CHECK = ["--Voila.tornado_settings={'allow_remote_access': False}"]


@contextmanager
def server(kind, home):
    "JupyterLab or voila on a port of its own; gives the address of the page."
    token = secrets.token_hex(16)
    env = server_environment(home/".jupyter")
    for attempt in range(5):  # another process may take the free port before the server does
        port = free_port()
        with open(home/f"{kind}.log", "w") as log:
            process = subprocess.Popen(server_command(kind, home, port, token), cwd=home, env=env,
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            if not answers(process, port):
                continue
            place = "lab/tree/nbs/explore.ipynb" if kind == "lab" else ""
            yield f"http://127.0.0.1:{port}/{place}?token={token}"
            return
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    raise RuntimeError((home/f"{kind}.log").read_text()[-3000:])


def answers(process, port):
    "Whether the server accepts connections within a minute."
    end = time.time() + 60
    while process.poll() is None and time.time() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        except OSError:
            time.sleep(.05)
    return False


class Page:
    "The explorer in a browser window."
    def __init__(self, page, address, kind):
        self.page = page
        self.kind = kind
        self.errors = []
        self.page.set_default_timeout(60_000)
        elsewhere = re.compile(r"^https?://(?!127\.0\.0\.1)")
        self.page.route(elsewhere, lambda route: route.abort())
        self.page.on("console", self.note_console)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(address)
        if kind == "lab":
            self.run_all()
        self.page.wait_for_selector(".widget-hslider")
        self.finished()

    def note_console(self, message):
        if message.type == "error" and "ERR_" not in message.text:
            self.errors.append(message.text)

    def run_all(self):
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.get_by_text(IDLE, exact=True).wait_for()  # in the status bar, once there is a kernel
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def finished(self, *words):
        "Wait until images are finished whose status line has these words; returns the line."
        self.page.wait_for_function(HAS_STATUS, arg=[DONE, *words])
        return self.page.locator("[role=status]", has_text=" steps, seed ").inner_text()

    def message(self, words):
        "Wait for a message with these words; returns it."
        selector = f"[role=status]:has-text({json.dumps(words)})"
        self.page.wait_for_selector(selector)
        return self.page.locator(selector).inner_text()

    def images(self):
        "What is shown, as {name of the weights: image}."
        shown = self.page.evaluate(FIGURES)
        assert all(width > 1 for _, _, width in shown), "an image is broken"
        decoded = {name: base64.b64decode(src.split(",")[1]) for name, src, _ in shown}
        return {name: Image.open(io.BytesIO(data)).convert("RGB") for name, data in decoded.items()}

    def drag(self, name, *shares):
        "Drag a slider's handle over shares of its length; returns what it then shows."
        slider = self.page.locator(".widget-hslider", has=self.page.get_by_text(name, exact=True))
        slider.scroll_into_view_if_needed()
        bar = slider.locator(".noUi-base").bounding_box()
        handle = slider.locator(".noUi-handle").bounding_box()
        mouse = self.page.mouse
        mouse.move(handle["x"] + handle["width"]/2, handle["y"] + handle["height"]/2)
        mouse.down()
        for share in shares:
            mouse.move(bar["x"] + share*bar["width"], bar["y"] + bar["height"]/2, steps=12)
        mouse.up()
        return slider.locator(".widget-readout").inner_text()

    def choose(self, name, label):
        self.page.get_by_label(name, exact=True).select_option(label=label)

    def write(self, name, text):
        field = self.page.get_by_label(name, exact=True)
        field.fill(text)
        field.press("Enter")

    def click(self, name):
        self.page.get_by_role("button", name=name).click()

    def show_controls(self):
        self.page.locator(".widget-hslider").first.scroll_into_view_if_needed()


def difference(a, b):
    "Mean absolute difference in grey levels; 255 for images of different sizes."
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() if a.size == b.size else 255.


def expected_sheets(home, **settings):
    "The images that these settings make, sampled in this process."
    defaults = dict(run="outputs/toy", weights=["ema"], class_name="Abyssinian", n=8, seed=0, num_steps=12,
                    solver="ab2", cfg_scale=1.5, cfg_interval=(0., 1.))
    settings = defaults | settings
    images = generate_from_settings(settings | dict(run=home/settings["run"]))
    return {name: sheet(some) for name, some in images.items()}


def check(page, home, other_scale=None, **settings):
    """What is shown is what the settings make, much nearer to it than to another guidance. (Processes may
    round differently.)"""
    shown = page.images()
    expected = expected_sheets(home, **settings)
    assert list(shown) == list(expected)
    for name, image in expected.items():
        assert difference(shown[name], image) < 2, settings
    if other_scale is not None:
        other = expected_sheets(home, **settings | dict(cfg_scale=other_scale))
        assert difference(shown["ema"], expected["ema"]) < difference(shown["ema"], other["ema"])/4


def check_no_errors(page):
    text = page.page.inner_text("body")
    problems = ("Traceback", "Error displaying widget", "Error creating widget", "show javascript error")
    assert not [words for words in problems if words in text]
    for kind in ("stderr", "error"):
        assert not page.page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").count()
    assert not [e for e in page.errors if re.search("widget|comm|state", e.lower())], page.errors


def brightness(page, selector):
    "Of a text, 0 to 255."
    colour = page.page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
    return statistics.mean(map(int, re.findall(r"\d+", colour)[:3]))


def stopwatch(page):
    "Seconds from a click on a button to the first new image that is painted, and to the finished one."
    page.page.evaluate(STOPWATCH)
    page.click("surprise me")
    page.page.wait_for_function("window.times.final")
    return [page.page.evaluate(f"window.times.{name}") for name in ("first", "final")]


def latency(page, clicks=8):
    "First and final image after so many clicks, in seconds: two sorted lists."
    return [sorted(times) for times in zip(*(stopwatch(page) for _ in range(clicks)))]


def status_for(address, host):
    "The HTTP status of a page for a client that calls the server by another name."
    url = urlsplit(address)
    connection = HTTPConnection(url.hostname, url.port, timeout=60)
    connection.request("GET", f"{url.path}?{url.query}", headers=dict(Host=f"{host}:{url.port}"))
    status = connection.getresponse().status
    connection.close()
    return status


def test_voila_answers_to_this_machine_alone(home):
    pytest.importorskip("voila", reason="voila is not installed")
    assert HOST_CHECK[0].partition("=")[2] in (ROOT/"Makefile").read_text()
    with server("voila", home) as address:
        assert status_for(address, "127.0.0.1") == 200
        assert status_for(address, "elsewhere.example") == 403


@pytest.mark.parametrize("kind", ["lab", pytest.param("voila", marks=slow("half a minute"))])
def test_explore(kind, browser, home, tmp_path):
    if kind == "voila":
        pytest.importorskip("voila", reason="voila is not installed")
    before = (ROOT/"nbs/explore.ipynb").read_bytes()
    with server(kind, home) as address, window(browser, tmp_path/"failed.png") as page:
        explore(Page(page, address, kind), address, home, tmp_path)
    assert (ROOT/"nbs/explore.ipynb").read_bytes() == before


@contextmanager
def window(browser, screenshot):
    "A fresh browser window; a screenshot of it is kept if something goes wrong."
    with browser.new_context(viewport=dict(width=1280, height=900)) as context:
        page = context.new_page()
        try:
            yield page
        except BaseException:
            page.screenshot(path=screenshot)
            raise


def explore(page, address, home, tmp_path):
    """Change controls, compare the images; in light and dark, wide and narrow. What does not depend on the
    front end is tried in one of them."""
    check(page, home)
    if page.kind == "lab":
        page.page.keyboard.press("Control+b")  # hide the list of files
    page.show_controls()
    page.page.screenshot(path=tmp_path/"light.png")
    scale = check_guidance_and_class(page, home)
    if page.kind == "voila":
        check_saving(page, home, scale)
        check_another_run(page, home, scale)
        page.page.screenshot(path=tmp_path/"beside.png")
        check_latency(page)
    check_dark_and_narrow(page, address, tmp_path)
    check_no_errors(page)


def check_guidance_and_class(page, home):
    scale = float(page.drag("guidance", .9, .1, .8, .3, .6))  # quickly, to and fro
    page.finished(f"guidance {scale:g},")
    check(page, home, cfg_scale=scale, other_scale=scale - .4)
    page.choose("class", "Persian")
    page.finished("8 × Persian", f"guidance {scale:g},")
    check(page, home, cfg_scale=scale, class_name="Persian")
    return scale


def check_saving(page, home, scale):
    page.click("save image")
    path = home/page.message("Saved:").removeprefix("Saved:").strip()
    assert path.is_file()
    assert path.parent == home/"outputs/explorer"
    settings = image_settings(path)
    assert settings["class_name"] == "Persian"
    assert settings["cfg_scale"] == scale
    assert difference(Image.open(path), page.images()["ema"]) == 0


def check_another_run(page, home, scale):
    page.write("run", "outputs/never")
    assert "no weights at outputs/never" in page.message("Cannot sample this.")
    page.write("run", "outputs/both")
    page.finished("ema of outputs/both")
    page.choose("weights", "ema beside raw")
    page.drag("images", 3/15)  # 1 to 16
    page.finished("4 × Persian", "ema beside raw")
    settings = dict(run="outputs/both", weights=["ema", "raw"], class_name="Persian", n=4, cfg_scale=scale)
    check(page, home, **settings)
    page.write("run", "outputs/fruit")
    page.finished("4 × Granny Smith", "outputs/fruit")
    options = page.page.get_by_label("class", exact=True).locator("option").all_inner_texts()
    assert [name.replace("\xa0", " ") for name in options] == FRUIT
    page.choose("class", options[2])
    page.finished(f"4 × {FRUIT[2]}")


def check_latency(page):
    page.write("run", "outputs/toy")
    page.finished("4 × Abyssinian", "outputs/toy")
    page.choose("class", "Persian")
    page.drag("images", 7/15)
    page.finished("8 × Persian", "12 ab2 steps", "ema of outputs/toy")
    first, final = latency(page, 4)
    print(f"\n{page.kind}: seconds from click to first image {first[0]:.2f} to {first[-1]:.2f}, "
          f"to the finished one {final[0]:.2f} to {final[-1]:.2f}")
    assert first[0] < 1  # on a busy machine
    assert final[0] < 2
    assert first[0] < .7*final[0]


def switch_to_dark(page, address):
    "Switch to the dark theme; the page still samples."
    if page.kind == "lab":
        page.page.get_by_role("menuitem", name="Settings", exact=True).click()
        for label in ("Theme", "JupyterLab Dark"):
            page.page.locator(".lm-Menu-itemLabel").get_by_text(label, exact=True).click()
        page.page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    else:
        page.page.goto(address + "&theme=dark")
        page.page.wait_for_selector(".widget-hslider")
        page.finished()


def check_dark_and_narrow(page, address, tmp_path):
    switch_to_dark(page, address)
    page.show_controls()
    page.page.screenshot(path=tmp_path/"dark.png")
    for selector in ("[role=status]", ".widget-label", "figcaption"):
        assert brightness(page, selector) > 150
    page.page.set_viewport_size(dict(width=400, height=1100))
    page.show_controls()
    page.page.wait_for_function("document.querySelector('figure').getBoundingClientRect().right <= 401")
    page.page.screenshot(path=tmp_path/"narrow.png")
    assert page.page.evaluate(FITS)
    assert page.page.locator("img[alt*=ema]").count() == 1
