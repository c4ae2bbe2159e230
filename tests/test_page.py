"""The page for the browser, as a visitor meets it: served by Python's web server, drawn in a real browser."""
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import needs_chromium
from PIL import Image

from tinycats import export
from tinycats.core import to_uint8
from tinycats.dit import TinyDiT, load_model, save_model
from tinycats.flow import sample
from tinycats.metrics import train_classifier
from tinycats.toy import toy_cats

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is of the extra `onnx`")
pytestmark = needs_chromium

ROOT = Path(__file__).resolve().parents[1]
STRICT = ("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; "
          "style-src 'self'; img-src 'self' data: blob:")
PIXELS = """() => [...document.querySelectorAll('#pictures canvas')].map(
    c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"""
CHANGE = """([id, value]) => {
    document.getElementById(id).value = value
    document.getElementById(id).dispatchEvent(new Event('input', {bubbles: true})) }"""


def make_run(folder, model, **metadata):
    "A run folder that holds nothing but weights."
    folder.mkdir(parents=True)
    save_model(model, folder/"ema.safetensors", **metadata)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder to serve: the pages of the two bundled networks, and of one that knows three classes."
    site = tmp_path_factory.mktemp("site")
    for run in ("toy", "pets64"):
        (site/run).mkdir()
        (site/run/"ema.safetensors").symlink_to(ROOT/"outputs"/run/"ema.safetensors")
    torch.manual_seed(0)
    three = TinyDiT(16, patch_size=8, dim=32, depth=1, num_heads=2, num_classes=3)
    torch.nn.init.normal_(three.final_layer.weight, std=.04)
    three.classes = ["my_cat", "<b>dog</b>", "Öl & Wasser"]
    make_run(site/"three", three, run="three", step=1, weights="ema 0.9")
    export.write_page(site/"toy")
    export.write_page(site/"pets64", cfg_scale=3)
    export.write_page(site/"three", weights="fp32", num_steps=60)
    make_run(site/"int8", three, run="int8", step=1, weights="ema 0.9")
    export.write_page(site/"int8", weights="int8")
    return site


class StrictHandler(SimpleHTTPRequestHandler):
    "Python's web server with a strict Content-Security-Policy."
    def end_headers(self):
        self.send_header("Content-Security-Policy", STRICT)
        super().end_headers()

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder, handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address(site):
    with serve(site, StrictHandler) as address:
        yield address


class Visitor:
    "A browser window, and what went wrong in it."
    def __init__(self, browser, address, **options):
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(60_000)
        self.address = address
        self.errors, self.elsewhere = [], []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", self.note_request)

    def note_request(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def open(self, path, **settings):
        words = "&".join(f"{name}={value}" for name, value in settings.items())
        self.page.goto("about:blank")
        self.page.goto(f"{self.address}/{path}/page/index.html#{words}")
        return self.wait()

    def wait(self, state="done"):
        "Wait for a state; returns what the status says."
        self.page.wait_for_selector(f"#status[data-state={state}]")
        return self.page.inner_text("#status")

    def images(self):
        "What the canvases show: uint8 (n, 3, h, w)."
        pixels = torch.tensor(self.page.evaluate(PIXELS), dtype=torch.uint8)
        side = round((pixels.shape[1]/4)**.5)
        return pixels.view(len(pixels), side, side, 4).permute(0, 3, 1, 2)[:, :3]


@pytest.fixture
def visitor(browser, address):
    visitor = Visitor(browser, address)
    yield visitor
    visitor.page.close()
    assert not visitor.errors
    assert not visitor.elsewhere, "the page asks other hosts"


def expected(run, name, count, steps=8, guidance=1.5, seed=4):
    "What Python draws."
    model = load_model(run)
    images = sample(model, [name]*count, num_steps=steps, solver="ab2", cfg_scale=guidance, seed=seed)
    return to_uint8(images)


def largest_difference(a, b):
    return (a.int() - b.int()).abs().max().item()


def test_it_draws_what_python_draws(visitor, site):
    "Within two grey levels, by default, and with other settings from the address."
    status = visitor.open("toy")
    assert re.fullmatch(r"8 × Abyssinian, guidance 1.5, 8 ab2 steps, seed 4: [\d.]+ s", status)
    assert largest_difference(visitor.images(), expected(site/"toy", "Abyssinian", 8)) <= 2
    visitor.open("toy", **{"class": "Maine_Coon", "guidance": 3, "steps": 5, "seed": 2**32 - 1, "count": 3})
    drawn = expected(site/"toy", "Maine_Coon", 3, steps=5, guidance=3, seed=2**32 - 1)
    assert largest_difference(visitor.images(), drawn) <= 2


def test_real_cats(visitor, site):
    status = visitor.open("pets64", count=2, seed=1, **{"class": "Siamese"})
    assert "guidance 3" in status
    assert "Oxford-IIIT Pet" in visitor.page.inner_text("#licence")
    drawn = expected(site/"pets64", "Siamese", 2, guidance=3, seed=1)
    assert largest_difference(visitor.images(), drawn) <= 2


def test_every_class_is_recognised(visitor):
    "A classifier of toy cats reads the pixels of the canvases."
    images, labels = toy_cats(650, 48, seed=5)
    net = train_classifier(images, labels, 13, steps=100)
    visitor.open("toy", count=3, steps=6)
    right = []
    for label, name in enumerate(load_model(ROOT/"outputs/toy").classes):
        visitor.page.select_option("#class", name)
        visitor.wait("drawing")
        visitor.wait()
        shown = visitor.images()
        right += (net(shown).argmax(1) == label).tolist()
    assert len(right) == 39
    assert np.mean(right) >= .9


def test_twenty_quick_changes(visitor, site):
    "Only the last one counts."
    visitor.open("toy", count=2)
    names = load_model(site/"toy").classes
    for i in range(20):
        visitor.page.evaluate(CHANGE, [("class", "seed")[i % 2], (names[i % 13], i)[i % 2]])
    visitor.page.wait_for_selector("#status[data-state=done]:has-text('seed 19')")
    drawn = expected(site/"toy", names[18 % 13], 2, seed=19)
    assert largest_difference(visitor.images(), drawn) <= 2
    assert "seed=19" in visitor.page.evaluate("location.hash")


def test_names_settings_and_keyboard(visitor, site):
    "Class names are text; a page may begin with more steps than the control usually has."
    status = visitor.open("three", **{"class": "Öl %26 Wasser"})
    assert "Öl & Wasser, guidance 1.5, 60 ab2 steps" in status
    page = visitor.page
    assert page.locator("#class option").all_inner_texts() == ["my cat", "<b>dog</b>", "Öl & Wasser"]
    assert largest_difference(visitor.images(), expected(site/"three", "Öl & Wasser", 8, steps=60)) <= 2
    roles = dict(Class="combobox", Guidance="slider", Steps="slider", Seed="spinbutton", Images="spinbutton")
    for label, role in roles.items():
        assert page.get_by_role(role, name=label, exact=True).count() == 1
    page.fill("#count", "3")
    page.wait_for_selector("#status[data-state=done]:has-text('3 ×')")
    page.focus("#draw")
    page.keyboard.press("Tab")  # Another seed
    page.keyboard.press("Enter")
    page.wait_for_selector("#status[data-state=done]:not(:has-text('seed 4:'))")
    names = page.locator("#pictures canvas").evaluate_all("all => all.map(c => c.ariaLabel)")
    assert re.fullmatch(r"Öl & Wasser, seed \d+, image 3 of 3", names[2])


def test_save(visitor, tmp_path):
    visitor.open("three", count=5, steps=2)
    with visitor.page.expect_download() as download:
        visitor.page.click("#save")
    assert download.value.suggested_filename == "three_my_cat_seed4_cfg1.5_ab22_5.png"
    download.value.save_as(tmp_path/"saved.png")
    sheet = Image.open(tmp_path/"saved.png").convert("RGB")
    assert sheet.size == (4*192, 2*192)
    small = np.asarray(sheet.resize((64, 32), Image.NEAREST)).transpose(2, 0, 1)
    assert (torch.tensor(small[:, 16:, :16]) == visitor.images()[4]).all()


def test_unusable_values_are_named(visitor):
    status = visitor.open("three", seed=-1, steps="many", count=2, **{"class": "Tiger"})
    refused = "The address asks for class Tiger, steps many, seed -1, which cannot be had here."
    assert status.startswith(f"{refused} 2 ×")
    visitor.page.fill("#count", "99")
    assert visitor.wait("error") == "Images 99: choose a whole number from 1 to 16"
    assert visitor.page.get_attribute("#count", "aria-invalid") == "true"
    visitor.page.fill("#count", "1")
    visitor.wait()
    assert visitor.page.get_attribute("#count", "aria-invalid") is None
    assert visitor.page.inner_text("#announcement") == visitor.page.inner_text("#status")


def test_an_unusable_value_ends_the_drawing(visitor):
    visitor.open("toy", count=1, steps=1)
    visitor.page.evaluate(CHANGE, ["steps", "50"])
    visitor.wait("drawing")
    visitor.page.evaluate(CHANGE, ["seed", ""])
    assert visitor.wait("error").startswith("Seed is empty")
    visitor.page.wait_for_timeout(1500)  # the time of the drawing
    assert visitor.wait("error").startswith("Seed is empty")


def test_int8(visitor, site):
    "The self-test allows for its rounding, and the images are near those of float32."
    visitor.open("int8", count=4)
    drawn = expected(site/"int8", "my_cat", 4)
    assert 0 < (visitor.images().float() - drawn.float()).abs().mean() < 12


def test_no_webassembly(visitor):
    visitor.page.add_init_script("delete window.WebAssembly")
    visitor.page.goto(f"{visitor.address}/three/page/")
    assert "no WebAssembly" in visitor.wait("error")


def test_wrong_arithmetic_is_noticed(browser, site, tmp_path):
    "Where the self-test's numbers do not come out, nothing is drawn."
    shutil.copytree(site/"three"/"page", tmp_path/"three"/"page")
    path = tmp_path/"three"/"page"/"page.json"
    config = json.loads(path.read_text())
    config["self_test"]["expected"][7] += .1
    path.write_text(json.dumps(config))
    with serve(tmp_path, StrictHandler) as address:
        visitor = Visitor(browser, address)
        visitor.page.goto(f"{address}/three/page/")
        assert "other numbers than PyTorch" in visitor.wait("error")
        assert visitor.page.locator("canvas").count() == 0
        path.write_text(json.dumps(config | dict(network="elsewhere.onnx")))
        visitor.page.reload()
        assert "elsewhere.onnx: 404" in visitor.wait("error")
        visitor.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, address, scheme):
    visitor = Visitor(browser, address, viewport=dict(width=390, height=844), color_scheme=scheme)
    visitor.open("three", count=4, steps=2)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    background = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(23, 24, 27)") == (scheme == "dark")
    visitor.page.close()


def test_the_command_and_python_s_web_server(browser, tmp_path):
    "As the command says: python -m http.server -d ..."
    model = TinyDiT(16, patch_size=8, dim=16, depth=1, num_heads=2, num_classes=2)
    make_run(tmp_path/"outputs"/"mine", model, run="mine", step=1, weights="ema 0.9", data="toy")
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    env = os.environ | {"PYTHONPATH": str(ROOT), "TINYCATS_RUN": "mine"}
    command = [sys.executable, "-m", "tinycats.export", "--num-steps", "3", "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python3 -m http.server -d outputs/mine/page" in done.stdout
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", "outputs/mine/page"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = re.search(r"port (\d+)", process.stdout.readline())[1]
        visitor = Visitor(browser, f"http://127.0.0.1:{port}")
        visitor.page.goto(visitor.address)
        assert "8 × 0, guidance 1.5, 3 ab2 steps, seed 7" in visitor.wait()
        assert not visitor.errors
    finally:
        process.terminate()
        process.wait()
