"""What the chapter on the explorer does not show: the page run from start to end, a slow network, damaged
files, and what comes first."""
import html
import json
import shutil
import threading
import time
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from tinycats.dit import TinyDiT, save_model
from tinycats.explorer import DRAFT_STEPS, Explorer, SamplingTask, image_settings, sheet
from tinycats.toy import TOY_CLASSES

torch.set_num_threads(1)  # as test_runs.py wants it
ROOT = Path(__file__).resolve().parents[1]


def small_network(seed, classes=TOY_CLASSES):
    "A network of a few thousand random weights."
    torch.manual_seed(seed)
    net = TinyDiT(16, 8, dim=32, depth=1, num_heads=2, num_classes=len(classes))
    net.classes = list(classes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=.1)
    return net


@pytest.fixture
def run(tmp_path):
    "A run folder with averaged and raw weights of a small network."
    folder = tmp_path/"run"
    folder.mkdir()
    for seed, name in enumerate(("ema", "model")):
        save_model(small_network(seed), folder/f"{name}.safetensors")
    return folder


@pytest.fixture
def explorer(run, tmp_path):
    explorer = Explorer(run, folder=tmp_path/"saved", n=2)
    assert explorer.wait()
    yield explorer
    explorer.close()


class SlowNetwork:
    "Makes every function evaluation take its time, and counts them."
    def __init__(self, explorer, seconds):
        self.evaluations = 0
        self.seconds = seconds
        for model in explorer.load.models.values():
            model.register_forward_pre_hook(self.before_forward)

    def before_forward(self, *_):
        self.evaluations += 1
        time.sleep(self.seconds)


def status_after(explorer, **settings):
    explorer.set(**settings)
    assert explorer.wait()
    return explorer.view.status.value


def test_the_page_runs_from_start_to_end(tmp_path):
    "As JupyterLab or voila would run it, in a project with the bundled weights alone."
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    for folder in ("nbs", "outputs/toy"):
        (tmp_path/folder).mkdir(parents=True)
    shutil.copy(ROOT/"outputs/toy/ema.safetensors", tmp_path/"outputs/toy")
    nb = nbformat.read(ROOT/"nbs/explore.ipynb", 4)
    place = next(i for i, c in enumerate(nb.cells) if "Explorer()" in c.source)
    nb.cells.insert(place + 1, nbformat.v4.new_code_cell("assert _.wait()"))
    NotebookClient(nb, timeout=120, resources={"metadata": {"path": str(tmp_path/"nbs")}}).execute()
    outputs = []
    for cell in nb.cells:
        outputs += cell.get("outputs", [])
    assert [o.output_type for o in outputs] == ["execute_result"]
    assert "application/vnd.jupyter.widget-view+json" in outputs[0].data
    state = list(nb.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values())
    texts = [s["state"].get("value", "") for s in state if s["model_name"] == "HTMLModel"]
    assert any("data:image/png;base64," in text for text in texts)
    assert any("finished after" in text and "ema of outputs/toy" in text for text in texts)
    assert any("No raw weights here" in text for text in texts)  # a fresh clone has the EMA alone
    assert {s["model_module"] for s in state} == {"@jupyter-widgets/base", "@jupyter-widgets/controls"}
    assert "OutputModel" not in {s["model_name"] for s in state}


def test_the_pages_are_stored_without_widgets():
    for path in (ROOT/"nbs").glob("*.ipynb"):
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        assert "widgets" not in metadata, f"{path.name} stores the state of widgets"
    assert not any(c.get("outputs") for c in nbformat.read(ROOT/"nbs/explore.ipynb", 4).cells)


def test_a_newer_request_ends_the_older_between_two_steps(explorer):
    """With evaluations of 0.05 s: after its minimum time and one evaluation more the older gives way;
    submitting never waits."""
    slow = SlowNetwork(explorer, .05)
    explorer.set(num_steps=50)
    begin = time.perf_counter()
    for seed in range(100):
        explorer.controls["seed"].value = seed
    assert time.perf_counter() - begin < 2  # sampling all of them would take 280 s
    while explorer.task.settings["seed"] != 99:
        time.sleep(.01)
    assert slow.evaluations <= 100*SamplingTask.min_seconds/.05/5  # most were never begun
    before = slow.evaluations
    time.sleep(1)
    explorer.controls["num_steps"].value = 3
    assert explorer.wait()
    assert explorer.result[0]["num_steps"] == 3
    assert explorer.result[0]["seed"] == 99
    assert slow.evaluations - before < 45  # the draft and the 50 steps did not run to their end
    assert sheet(explorer.result[1]["ema"]).tobytes() == explorer.view.sheets["ema"].tobytes()


def test_every_request_shows_something_while_a_slider_is_dragged(explorer):
    "Dragged for two seconds, a request every 0.03 s: images keep coming."
    SlowNetwork(explorer, .01)
    shown = []
    explorer.view.page.observe(lambda change: shown.append(time.perf_counter()), "value")
    begin = time.perf_counter()
    while time.perf_counter() - begin < 2:
        explorer.controls["cfg_scale"].value = (time.perf_counter() - begin)*2
        time.sleep(.03)
    assert sum(t < begin + 2 for t in shown) >= 4
    assert explorer.wait()
    assert explorer.result[0] == explorer.settings


@pytest.mark.parametrize("solver, draft", [("euler", DRAFT_STEPS), ("heun", 2*DRAFT_STEPS - 1)])
def test_the_draft_comes_first(explorer, solver, draft):
    "The first image is there after a draft's evaluations; the finished one takes ten times as many."
    slow = SlowNetwork(explorer, 0)
    at = []
    explorer.view.page.observe(lambda change: at.append(slow.evaluations), "value")
    explorer.set(solver=solver, num_steps=60)
    assert explorer.wait()
    assert draft - 1 <= at[0] <= draft
    assert at[-1] == slow.evaluations == draft + (60 if solver == "euler" else 119)


def test_latency_with_the_bundled_weights(tmp_path):
    """From changing a control to the first and to the finished images: generous limits, for machines with
    other work to do."""
    explorer = Explorer(ROOT/"outputs/toy/ema.safetensors", folder=tmp_path)
    first = []
    final = []
    assert explorer.wait()
    for seed in range(5):
        shown = []
        begin = time.perf_counter()

        def note_time(change):
            shown.append(time.perf_counter() - begin)

        explorer.view.page.observe(note_time, "value")
        explorer.controls["seed"].value = seed + 1
        assert explorer.wait()
        explorer.view.page.unobserve(note_time, "value")
        first.append(shown[0])
        final.append(shown[-1])
    explorer.close()
    print(f"medians: first image after {sorted(first)[2]:.3f} s, finished after {sorted(final)[2]:.3f} s")
    assert min(first) < 3
    assert min(final) < 20
    assert min(first) < min(final)/2


@pytest.mark.parametrize("settings", [
    dict(num_steps=150), dict(cfg_scale=8.0), dict(n=20), dict(seed=2**32 - 1), dict(cfg_scale=1.23456),
    dict(cfg_interval=(.12, .34))], ids=lambda settings: str(settings))
def test_values_are_kept_as_they_came(explorer, settings):
    "A slider that ends before a value grows; nothing is cut or rounded."
    explorer.set(**settings)
    assert {name: explorer.settings[name] for name in settings} == settings
    assert explorer.wait()
    assert {name: explorer.result[0][name] for name in settings} == settings


@pytest.mark.parametrize("settings", [
    dict(num_steps=0), dict(num_steps=10_001), dict(cfg_scale=-1.0), dict(cfg_scale=1001.0), dict(n=0),
    dict(n=257), dict(seed=-1), dict(seed=2**32), dict(cfg_interval=(.5, 1.5)), dict(num_steps="many"),
    dict(n=2.5),
    dict(class_name="Tiger"), dict(solver="rk4")], ids=lambda settings: str(settings))
def test_values_that_cannot_be_kept_are_refused(explorer, settings):
    "In one line that says what is possible, and no image of other settings is shown as if it were that."
    explorer.set(**settings)
    assert explorer.wait()
    assert explorer.result is None
    (name, value), = settings.items()
    assert f"{name} {value!r} is not possible: choose" in html.unescape(explorer.view.status.value)


def replace_weights(run):
    (run/"ema.safetensors").write_bytes(b"not weights")


def cut_weights(run):
    (run/"ema.safetensors").write_bytes((run/"ema.safetensors").read_bytes()[:2000])


def remove_weights(run):
    for file in run.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("damage, words", [
    (replace_weights, "holds no TinyDiT"), (cut_weights, "holds no TinyDiT"),
    (remove_weights, "no weights at"), (shutil.rmtree, "no weights at")])
def test_damaged_weights_are_reported_in_words(explorer, run, tmp_path, damage, words):
    shutil.copytree(run, tmp_path/"good")
    damage(run)
    status = status_after(explorer, seed=1)
    assert "Cannot sample this." in status
    assert words in status
    assert "Traceback" not in status
    explorer.save()
    assert explorer.wait()
    assert "Not saved." in explorer.view.message.value
    assert "no finished image" in explorer.view.message.value
    assert "finished after" in status_after(explorer, run=tmp_path/"good")


@pytest.mark.parametrize("classes", [["only"], ["a", "b", "c"], [f"class_{i}" for i in range(20)],
                                     [f"class_{i}" for i in range(37)]], ids=len)
def test_the_classes_are_those_of_the_network(explorer, tmp_path, classes):
    folder = tmp_path/"other"
    folder.mkdir()
    save_model(small_network(0, classes), folder/"ema.safetensors")
    status = status_after(explorer, run=folder, class_name=classes[-1])
    assert "finished after" in status
    assert classes[-1].replace("_", " ") in status
    assert explorer.panel.classes == classes


def test_weights_that_know_fewer_classes(explorer, run):
    save_model(small_network(0, TOY_CLASSES[:3]), run/"model.safetensors")
    status = status_after(explorer, weights=["raw"], class_name="Siamese")
    assert "this network knows Abyssinian, Bengal, Birman" in status
    assert "finished after" in status_after(explorer, class_name="Bengal")


def test_averaged_beside_raw_from_the_same_noise(explorer, run):
    assert "ema beside raw" in status_after(explorer, weights=["ema", "raw"])
    assert explorer.view.page.value.count("<img ") == 2
    shutil.copy(run/"ema.safetensors", run/"model.safetensors")  # the file changes, and is read again
    status_after(explorer, seed=5)
    assert torch.equal(*explorer.result[1].values())
    explorer.save()
    assert explorer.wait()
    path = next(explorer.folder.glob("*.png"))
    assert image_settings(path)["weights"] == ["ema", "raw"]
    assert "ema_raw" in path.name
    assert "finished after" in status_after(explorer, weights=["ema"])
    assert explorer.view.page.value.count("<img ") == 1


def test_an_image_is_saved_when_it_is_finished(explorer):
    """Clicked while images are being sampled, save means those; what is typed into a name cannot leave the
    folder or the page."""
    SlowNetwork(explorer, .02)
    explorer.controls["class_name"].value = "Bombay"
    explorer.panel.save_button.click()
    assert not list(explorer.folder.glob("*.png"))
    assert "Saving" in explorer.view.message.value
    assert explorer.wait()
    path = next(explorer.folder.glob("*.png"))
    assert image_settings(path)["class_name"] == "Bombay"
    assert path.name in explorer.view.message.value
    status = status_after(explorer, run="<script>alert(1)</script>")
    assert "<script>" not in status
    assert "&lt;script&gt;" in status


def test_random_settings_are_within_the_controls(explorer):
    seen = set()
    for _ in range(20):
        explorer.panel.random_button.click()
        settings = explorer.settings
        assert settings["class_name"] in TOY_CLASSES
        assert 1 <= settings["cfg_scale"] <= 3
        seen.add((settings["class_name"], settings["seed"]))
    assert len(seen) > 15
    assert explorer.wait()
    assert explorer.result[0] == explorer.settings


def test_no_thread_is_left_running(run):
    before = threading.active_count()
    explorer = Explorer(run, n=1)
    assert explorer.wait()
    assert threading.active_count() == before + 1
    explorer.close()
    explorer.worker.thread.join(10)
    assert threading.active_count() == before
