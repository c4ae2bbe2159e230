"What the chapter on the explorer does not show: the page run from start to end, a slow network, damaged files, and what comes first."
import json, shutil, threading, time
from pathlib import Path

import nbformat, pytest, torch
from nbclient import NotebookClient
from tinycats.data import BREEDS
from tinycats.dit import TinyDiT, load_model, save_model
from tinycats.explorer import DRAFT, Explorer, draw_settings, picture_settings, sheet_of

torch.set_num_threads(1)  # as test_runs.py wants it
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    "A run folder with averaged and raw weights of a small network."
    folder = tmp_path/"run"
    folder.mkdir()
    for seed, name in enumerate(("ema", "model")):
        torch.manual_seed(seed)
        net = TinyDiT(16, 8, dim=32, depth=1, num_heads=2)
        for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
        save_model(net, folder/f"{name}.safetensors")
    return folder


@pytest.fixture
def explorer(run, tmp_path):
    explorer = Explorer(run, folder=tmp_path/"saved", n=2)
    assert explorer.wait()
    yield explorer
    explorer.close()


class Slow:
    "Every look at the picture takes its time, and is counted."
    def __init__(self, explorer, seconds):
        self.looks, self.seconds = 0, seconds
        for model in explorer.models.values(): model.register_forward_pre_hook(self.look)

    def look(self, *_): self.looks += 1; time.sleep(self.seconds)


def test_the_page_runs_from_start_to_end(tmp_path):
    "As JupyterLab or voila would run it, in a project with the bundled weights alone."
    (tmp_path/"settings.ini").touch()
    for folder in ("nbs", "outputs/toy"): (tmp_path/folder).mkdir(parents=True)
    shutil.copy(ROOT/"outputs/toy/ema.safetensors", tmp_path/"outputs/toy")
    nb = nbformat.read(ROOT/"nbs/explore.ipynb", 4)
    at = next(i for i, c in enumerate(nb.cells) if c.cell_type == "code")
    nb.cells.insert(at + 1, nbformat.v4.new_code_cell("assert _.wait()"))
    NotebookClient(nb, timeout=120, resources={"metadata": {"path": str(tmp_path/"nbs")}}).execute()
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    assert [o.output_type for o in outputs] == ["execute_result"] and "application/vnd.jupyter.widget-view+json" in outputs[0].data
    state = nb.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    html = [s["state"].get("value", "") for s in state if s["model_name"] == "HTMLModel"]
    assert any("data:image/png;base64," in h for h in html) and any("finished after" in h and "ema of outputs/toy" in h for h in html)
    assert any("No raw weights here" in h for h in html)                            # a fresh clone has the average alone, and says so
    kinds = {s["model_name"] for s in state}
    assert {s["model_module"] for s in state} == {"@jupyter-widgets/base", "@jupyter-widgets/controls"} and "OutputModel" not in kinds


def test_the_pages_are_stored_without_widgets():
    for path in (ROOT/"nbs").glob("*.ipynb"):
        assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"], f"{path.name} stores the state of widgets"
    assert not any(c.get("outputs") for c in nbformat.read(ROOT/"nbs/explore.ipynb", 4).cells)


def test_a_newer_wish_ends_the_older_between_two_steps(explorer):
    "With a network of 0.05 s a look: after the fair time and one look more, the newer one is begun. And asking never waits."
    slow = Slow(explorer, .05)
    begin = time.perf_counter()
    for seed in range(100): explorer.knobs["seed"].value = seed
    assert time.perf_counter() - begin < 2                                          # all of them drawn would be 280 s
    while not explorer.now["seed"] == 99: time.sleep(.01)
    assert slow.looks <= 100*Explorer.fair/.05/5                                     # most were never begun
    before = slow.looks
    time.sleep(1)
    explorer.knobs["num_steps"].value = 3
    assert explorer.wait() and explorer.result[0]["num_steps"] == 3 and explorer.result[0]["seed"] == 99
    assert slow.looks - before < 45                                                  # 50 steps and a draft were not walked to their end
    assert sheet_of(explorer.result[1]["ema"]).tobytes() == explorer.sheets["ema"].tobytes()


def test_every_wish_shows_something_while_a_slider_is_pulled(explorer):
    "Pulled for two seconds, a wish every 0.03 s: pictures keep coming."
    Slow(explorer, .01)
    shown = []
    explorer.view.observe(lambda change: shown.append(time.perf_counter()), "value")
    begin = time.perf_counter()
    while time.perf_counter() - begin < 2: explorer.knobs["cfg_scale"].value = (time.perf_counter() - begin) * 2; time.sleep(.03)
    assert sum(t < begin + 2 for t in shown) >= 4
    assert explorer.wait() and explorer.result[0] == explorer.settings


@pytest.mark.parametrize("solver, looks", [("euler", DRAFT), ("heun", 2*DRAFT - 1)])
def test_the_draft_comes_first(explorer, solver, looks):
    "The first picture is there after a draft's looks; the network had to look ten times as often for the finished one."
    slow, at = Slow(explorer, 0), []
    explorer.view.observe(lambda change: at.append(slow.looks), "value")
    explorer.set(solver=solver, num_steps=60)
    assert explorer.wait()
    assert looks - 1 <= at[0] <= looks and at[-1] == slow.looks == looks + (60 if solver == "euler" else 119)


def test_latency_with_the_bundled_weights(tmp_path):
    "From turning a knob to the first and to the finished picture: generous limits, the best of five, for machines with other work to do."
    explorer, first, final = Explorer(ROOT/"outputs/toy/ema.safetensors", folder=tmp_path), [], []
    assert explorer.wait()
    for seed in range(5):
        shown, begin = [], time.perf_counter()
        watch = lambda change: shown.append(time.perf_counter() - begin)
        explorer.view.observe(watch, "value")
        explorer.knobs["seed"].value = seed + 1
        assert explorer.wait()
        explorer.view.unobserve(watch, "value")
        first.append(shown[0]); final.append(shown[-1])
    explorer.close()
    print(f"seconds to the first picture {sorted(first)[2]:.3f}, to the finished one {sorted(final)[2]:.3f} (middle of five)")
    assert min(first) < 1 and min(final) < 5 and min(first) < min(final)/2


def say(explorer, **settings):
    explorer.set(**settings)
    assert explorer.wait()
    return explorer.status.value


@pytest.mark.parametrize("damage, words", [
    (lambda run: (run/"ema.safetensors").write_bytes(b"not weights"), "holds no TinyDiT"),
    (lambda run: (run/"ema.safetensors").write_bytes((run/"ema.safetensors").read_bytes()[:2000]), "holds no TinyDiT"),
    (lambda run: [f.unlink() for f in run.glob("*.safetensors")], "no weights at"),
    (lambda run: shutil.rmtree(run), "no weights at"),
], ids=["rubbish", "cut", "emptied", "removed"])
def test_damaged_weights_are_said_in_words(explorer, run, tmp_path, damage, words):
    shutil.copytree(run, tmp_path/"good")
    damage(run)
    said = say(explorer, seed=1)
    assert "Cannot draw this." in said and words in said and "Traceback" not in said
    explorer.save()
    assert explorer.wait() and "Not saved." in explorer.said.value and "no finished picture" in explorer.said.value
    assert "finished after" in say(explorer, run=tmp_path/"good")


def test_a_network_that_knows_fewer_breeds(explorer, run):
    save_model(TinyDiT(16, 8, dim=32, depth=1, num_heads=2, num_classes=3), run/"model.safetensors")
    assert "this network knows Abyssinian, Bengal, Birman" in say(explorer, weights=["raw"], breed="Siamese")
    assert "finished after" in say(explorer, breed="Bengal")


def test_averaged_beside_raw_from_the_same_noise(explorer, run):
    assert "ema beside raw" in say(explorer, weights=["ema", "raw"]) and explorer.view.value.count("<img ") == 2
    shutil.copy(run/"ema.safetensors", run/"model.safetensors")                      # the file changes, and is read again
    say(explorer, seed=5)
    assert torch.equal(*explorer.result[1].values())
    explorer.save()
    assert explorer.wait()
    path, = explorer.folder.glob("*.png")
    assert picture_settings(path)["weights"] == ["ema", "raw"] and "ema_raw" in path.name
    assert "finished after" in say(explorer, weights=["ema"]) and explorer.view.value.count("<img ") == 1


def test_a_picture_is_saved_when_it_is_finished(explorer):
    "Clicked while a picture is on its way, save means that one; and what is typed into a name cannot leave the folder or the page."
    Slow(explorer, .02)
    explorer.knobs["breed"].value = "Bombay"
    explorer.save_button.click()
    assert not list(explorer.folder.glob("*.png")) and "Saving" in explorer.said.value
    assert explorer.wait()
    path, = explorer.folder.glob("*.png")
    assert picture_settings(path)["breed"] == "Bombay" and path.name in explorer.said.value
    assert "<script>" not in say(explorer, run="<script>alert(1)</script>") and "&lt;script&gt;" in explorer.status.value


def test_surprises_are_within_the_knobs(explorer):
    seen = set()
    for _ in range(20):
        explorer.surprise_button.click()
        s = explorer.settings
        assert s["breed"] in BREEDS and 1 <= s["cfg_scale"] <= 3
        seen.add((s["breed"], s["seed"]))
    assert len(seen) > 15 and explorer.wait() and explorer.result[0] == explorer.settings


def test_nothing_is_left_running(run):
    before = threading.active_count()
    explorer = Explorer(run, n=1)
    assert explorer.wait() and threading.active_count() == before + 1
    explorer.close()
    explorer.painter.thread.join(10)
    assert threading.active_count() == before
