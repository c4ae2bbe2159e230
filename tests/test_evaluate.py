"The pages evaluate, compare_ema and sweep: on runs, checkpoints and files; and what they refuse."
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from helpers import shared
from page import run_cell
from PIL import Image
from tinycats import metrics, viz
from tinycats.checkpoint import load_checkpoint, save_checkpoint
from tinycats.core import stream_seed, to_float
from tinycats.data import ImageDataset
from tinycats.dit import TinyDiT, load_model, save_model
from tinycats.flow import sample, seeded_noise
from tinycats.params import ParameterError, TrainConfig
from tinycats.toy import TOY_CLASSES, toy_cats
from tinycats.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
QUICK = dict(samples=2, num_steps=2, heldout=130, device="cpu", precision="fp32")
QUICK_NAME = "step_0000030-samples_2-num_steps_2-precision_fp32-heldout_130"


def papermill(where, notebook, **params):
    "A page in a process of its own."
    options = ["--no-progress-bar", "--log-level", "WARNING", "--stdout-file", "-"]
    command = [sys.executable, "-m", "papermill", *options, ROOT/f"nbs/{notebook}.ipynb", "out.ipynb"]
    for name, value in params.items():
        command += ["-p", name, str(value)]
    return subprocess.run(command, cwd=where, capture_output=True, text=True)


def ignore(*_, **__):
    "In place of `display`; its handle ignores updates."
    return SimpleNamespace(update=ignore)


def cells(notebook="evaluate", **params):
    "The namespace after all cells of a page, run in this process as papermill would have them."
    namespace = {"__name__": "__main__", "In": [], "display": ignore}
    for cell in nbformat.read(ROOT/f"nbs/{notebook}.ipynb", 4).cells:
        if cell.cell_type != "code":
            continue
        run_cell(cell.source, notebook, namespace)
        if "parameters" in cell.metadata.get("tags", []):
            injected = "".join(f"{name} = {value!r}\n" for name, value in params.items())
            run_cell(f"# Parameters\n{injected}", notebook, namespace)
    return namespace


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A project with one tiny run: two averages, two checkpoints, and weights as train.ipynb leaves them."
    root = tmp_path_factory.mktemp("project")
    (root/"settings.ini").write_text("lib_name = tinycats\n")
    folder = root/"outputs/tiny"
    torch.manual_seed(0)
    model = TinyDiT(16, patch_size=8, dim=32, depth=1, num_heads=2)
    dataset = ImageDataset(*toy_cats(260, 16, seed=stream_seed(0, "train")), classes=TOY_CLASSES)
    config = TrainConfig(
        steps=30, batch_size=16, lr=1e-2, warmup_steps=2, ema_decay=[.5, .75], checkpoint_every=15)
    metadata = dict(run="tiny", data="toy", toy_images=260, seed=0)
    trainer = Trainer(model, dataset, folder, config, metadata=metadata)
    for _ in trainer.fit():
        pass
    networks = {"model": (model, "raw"), "ema": (trainer.ema[.5], "ema 0.5"),
                "ema_0.75": (trainer.ema[.75], "ema 0.75")}
    for name, (network, weights) in networks.items():
        save_model(network, folder/f"{name}.safetensors", run="tiny", step=30, data="toy", weights=weights)
    return root


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    "A copy of that project; the test runs in it."
    shutil.copytree(trained, tmp_path/"p")
    monkeypatch.chdir(tmp_path/"p")
    return tmp_path/"p"


@pytest.fixture
def extractor(project):
    "A feature extractor that needs no training: the colours of an image, coarsely."
    (project/"net.py").write_text(
        "import torch.nn.functional as F\n"
        "def load(side='4'):\n"
        "    return lambda x: F.adaptive_avg_pool2d(x.float(), int(side)).flatten(1)/99\n")
    return dict(features="net.py:load")


@pytest.fixture
def inception(monkeypatch):
    "In place of Inception: the mean colour of an image."
    def mean_colour(images):
        return images.float().mean((2, 3))/50

    monkeypatch.setattr(metrics, "inception", lambda device: mean_colour)


def page_outputs(path):
    "All outputs of an executed notebook."
    outputs = []
    for cell in nbformat.read(path, 4).cells:
        outputs += cell.get("outputs", [])
    return outputs


def evaluations(project):
    return sorted(path.name for path in (project/"outputs/tiny/evaluation").iterdir())


def scores(project, name):
    return json.loads((project/"outputs/tiny/evaluation"/name/"scores.json").read_text())


def pixels(project, name, class_name="Bengal"):
    paths = sorted((project/"outputs/tiny/evaluation"/name/class_name).glob("*.png"))
    return [Image.open(path).tobytes() for path in paths]


def test_a_run_is_evaluated(project):
    done = papermill(project, "evaluate", run="tiny", **QUICK)
    assert done.returncode == 0, done.stderr
    assert "sampling" in done.stdout
    assert "26/26" in done.stdout
    assert "overview.png" in done.stdout
    place = project/"outputs/tiny/evaluation"/QUICK_NAME
    sheets = {f"{name}.png" for name in TOY_CLASSES} | {"overview.png", "closest.png"}
    files = {"scores.json", "generation_metadata.json"}
    assert {path.name for path in place.iterdir()} == {*TOY_CLASSES} | sheets | files
    for name in TOY_CLASSES:
        assert [Image.open(path).size for path in sorted((place/name).glob("*.png"))] == [(16, 16)]*2
        assert Image.open(place/f"{name}.png").size == (34, 16)

    metadata = json.loads((place/"generation_metadata.json").read_text())
    assert (metadata["weights"], metadata["step"]) == ("ema 0.5", 30)
    assert metadata["settings"]["cfg_scale"] == 1.5
    assert metadata["images"]["Bengal"] == 2
    assert {"versions", "device", "sha256"} <= set(metadata)

    outputs = page_outputs(project/"out.ipynb")
    assert {"text/markdown", "image/jpeg", "image/png"} <= set().union(*(o.get("data", {}) for o in outputs))
    assert (project/"out.ipynb").stat().st_size < 2e6

    before, found = pixels(project, place.name), scores(project, place.name)
    cells(run="tiny", **QUICK) # once more, in this process: the same, in the same place
    assert evaluations(project) == [place.name]
    assert pixels(project, place.name) == before
    again = scores(project, place.name)
    for name, value in found.items():
        if isinstance(value, float) and name != "seconds":
            assert again[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name

    keys = {"n", "fd", "kid", "class_accuracy", "precision", "recall", "copy_rate", "high_frequency_ratio",
            "fd_reference", "kid_reference", "class_accuracy_real", "precision_real", "recall_real",
            "copy_rate_real", "high_frequency_ratio_real", "fd_train", "fd_train_reference", "fd_gap",
            "kid_train", "loss_heldout", "loss_train", "n_loss"}
    assert keys <= set(found)
    assert "fid" not in found
    assert (found["n"], found["n_real"], found["n_heldout"], found["n_training"]) == (26, 26, 130, 260)
    assert set(found["class_accuracy_by_class"]) == set(TOY_CLASSES)
    assert found["fd"] > 2*found["fd_reference"] > 0 # two steps of a network that has hardly been trained
    assert found["class_accuracy_real"] > .7 > found["class_accuracy"]
    assert len(found["loss_by_time"]["heldout"]) == 10
    assert min(found["loss_by_time"]["train"]) > 0


def test_each_setting_has_its_folder(project, extractor):
    "Another setting, another folder; a named folder with other settings is refused, and stays as it was."
    cells(run="tiny", **QUICK, **extractor)
    cells(run="tiny", **QUICK, **extractor, cfg_scale=3)
    plain, guided = sorted(evaluations(project), key=len)
    assert plain == f"{QUICK_NAME}-features_net"
    assert "cfg_scale_3" in guided
    assert pixels(project, plain) != pixels(project, guided)
    cells(run="tiny", **QUICK, **extractor, name="mine")
    found = scores(project, "mine")
    message = "name='mine': .* was made with cfg_scale 1.5, not 3.0; choose another name"
    with pytest.raises(ValueError, match=message):
        cells(run="tiny", **QUICK, **extractor, name="mine", cfg_scale=3)
    assert scores(project, "mine") == found
    assert pixels(project, "mine") == pixels(project, plain)


def test_which_weights(project, extractor):
    "Raw weights and averages give different images; the last checkpoint gives those of the run's own files."
    common = dict(run="tiny", **QUICK, **extractor)
    choices = dict(
        first={}, raw=dict(raw=True), second=dict(ema=.75),
        checkpoint=dict(weights="checkpoints/step_0000030.pt"),
        earlier=dict(weights="outputs/tiny/checkpoints/step_0000015.pt", raw=True))
    for name, choice in choices.items():
        cells(**common, name=name, **choice)
    images = {name: pixels(project, name) for name in choices}
    assert images["first"] == images["checkpoint"]
    assert len({str(image) for image in images.values()}) == 4
    weights = [scores(project, name)["weights"] for name in choices]
    assert weights == ["ema 0.5", "raw", "ema 0.75", "ema 0.5", "raw"]
    assert scores(project, "earlier")["step"] == 15


def test_weights_from_elsewhere(project, extractor, capsys):
    "A file may be anywhere; of a run that is not finished, the newest checkpoint is taken."
    common = QUICK | extractor
    shutil.copy(project/"outputs/tiny/ema.safetensors", project/"elsewhere.safetensors")
    cells(run="other", **common, weights="elsewhere.safetensors")
    (folder,) = (project/"outputs/other/evaluation").iterdir()
    assert folder.name == QUICK_NAME.replace("-", "-weights_elsewhere-", 1) + "-features_net"
    for path in (project/"outputs/tiny").glob("*.safetensors"):
        path.unlink()
    capsys.readouterr()
    cells(run="tiny", **common)
    assert "tiny, step 30, ema 0.5" in capsys.readouterr().out


def test_one_class(project, extractor, capsys):
    cells(run="tiny", **QUICK, **extractor, classes=["Siamese"])
    assert "1 of 13 classes" in capsys.readouterr().out
    (name,) = evaluations(project)
    found = scores(project, name)
    assert "classes_Siamese" in name
    assert found["n"] == 2
    assert [found[key] for key in ("fd", "kid", "precision")] == [None]*3
    assert 0 <= found["class_accuracy"] <= 1
    assert found["copy_rate"] is not None
    folders = [path.name for path in (project/"outputs/tiny/evaluation"/name).iterdir() if path.is_dir()]
    assert folders == ["Siamese"]


def test_better_networks_score_better(project, extractor):
    "A network that gives new real images, one that repeats its training images, and one that is black."
    def evaluate_as(images, labels, name):
        rows = [(labels == c).nonzero()[:, 0] for c in range(13)]

        def forward(self, xt, t, y):
            return torch.stack([images[rows[c][i % len(rows[c])]] for i, c in enumerate(y.tolist())])

        with pytest.MonkeyPatch.context() as m:
            m.setattr(TinyDiT, "forward", forward)
            cells(run="tiny", **QUICK | dict(samples=8, num_steps=1), **extractor, cfg_scale=1, name=name)
        return scores(project, name)

    images, labels = toy_cats(1300, 16, seed=77)
    known, known_labels = toy_cats(260, 16, seed=stream_seed(0, "train"))
    honest = evaluate_as(to_float(images), labels, "honest")
    copied = evaluate_as(to_float(known), known_labels, "copied")
    bad = evaluate_as(-torch.ones(13, 3, 16, 16), torch.arange(13), "bad")
    assert honest["copy_rate"] < .1
    assert copied["copy_rate"] == 1
    assert bad["copy_rate"] == 0
    assert honest["fd"] < 2.5*honest["fd_reference"]
    assert bad["fd"] > 10*bad["fd_reference"]
    assert honest["class_accuracy"] > bad["class_accuracy"] + .3
    assert .8 < honest["high_frequency_ratio"] < 1.25
    assert bad["high_frequency_ratio"] < .01
    assert honest["precision"] > .5 > bad["precision"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(project, bad):
    "In a file of weights and in a checkpoint, before anything is generated."
    weights = project/"outputs/tiny/ema.safetensors"
    model = load_model(weights)
    torch.nn.init.constant_(model.final_layer.bias, bad)
    save_model(model, weights, **model.metadata)
    step, state = load_checkpoint(project/"outputs/tiny/checkpoints/step_0000015.pt")
    state["ema"]["models"]["0.5"]["module.final_layer.bias"].fill_(bad)
    save_checkpoint(project/"outputs/tiny/checkpoints", 16, state)
    for given in (dict(), dict(weights="checkpoints/step_0000016.pt")):
        with pytest.raises(ParameterError, match="final_layer.bias is not finite") as e:
            cells(run="tiny", **QUICK | given)
        assert "\n" not in str(e.value)
    assert not (project/"outputs/tiny/evaluation").exists()


@pytest.mark.parametrize("classes", [1, 3, 20, 37])
def test_any_number_of_classes(tmp_path, classes):
    "Sampling, guidance, sheets, metrics and saved images take the classes of the network."
    names = [f"class_{i}" for i in range(classes)]
    torch.manual_seed(0)
    model = TinyDiT(16, 8, dim=32, depth=1, num_heads=2, num_classes=classes)
    torch.nn.init.normal_(model.y_embedder.weight)
    torch.nn.init.normal_(model.final_layer.weight, std=.1)
    torch.nn.init.normal_(model.adaln.weight, std=.1)
    model.classes = names
    save_model(model, tmp_path/"ema.safetensors")
    model = load_model(tmp_path)
    assert model.classes == names

    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    x0 = seeded_noise(2, 16)
    guided = sample(model, [names[-1], classes - 1], num_steps=3, cfg_scale=3, x0=x0)
    assert torch.cat(seen).unique().tolist() == [classes - 1, classes]  # the class and the null class
    null, cond = (sample(model, [c, c], num_steps=3, cfg_scale=1, x0=x0) for c in (classes, classes - 1))
    assert not torch.allclose(guided, cond, atol=1e-4)
    assert not torch.allclose(null, cond, atol=1e-4)
    with pytest.raises(ValueError, match=f"choose from 0 to {classes - 1}, or {classes} for the null class"):
        sample(model, [classes + 1])

    images, labels = viz.generate(model, 3, num_steps=1)
    assert labels.tolist() == sum(([c]*3 for c in range(classes)), [])
    viz.class_sheet(images, labels, names)
    viz.cfg_grid(model, scales=(0, 2), num_steps=1)
    viz.morph(model, (0, classes - 1), (0, 1), frames=2, num_steps=1)
    viz.save_images(tmp_path/"images", images, labels, names)
    assert len(list((tmp_path/"images").iterdir())) == classes + 1

    real = 2*torch.rand(classes*8, 3, 16, 16) - 1
    of_class = torch.arange(classes).repeat(8)
    net = metrics.train_classifier(real, of_class, classes, steps=2)
    counts = metrics.confusion_matrix(net, images, labels, classes)
    assert counts.sum(1).tolist() == [3]*classes
    viz.plot_confusion(counts, names)
    found, _ = metrics.scores(images, labels, heldout=(real, of_class), training=(real, of_class),
                              net=net.features, num_classes=classes)
    assert found["n"] == 3*classes


REFUSED = [
    (dict(run="absent"), ("run='absent'", "holds no weights", "tiny")),
    (dict(weights="no.safetensors"), ("weights='no.safetensors'", "no such file", "ema.safetensors")),
    (dict(classes=["Siamesse"]), ("classes='Siamesse'", "did you mean Siamese")),
    (dict(samples=0), ("samples=0", "from 1")),
    (dict(ema=.9), ("ema=0.9", "0.5, 0.75")),
    (dict(raw=True, ema=.5), ("raw=True", "either raw weights or an average")),
    (dict(weights="checkpoints/step_0000015.pt", ema=.9), ("ema=0.9", "0.5, 0.75")),
    (dict(weights="ema.safetensors", raw=True), ("weights='ema.safetensors'", "holds one set of weights")),
    (dict(weights="net.py"), ("weights=", "net.py")),
    (dict(weights="torn.pt"), ("weights=", "damaged or no checkpoint")),
    (dict(data="dogs"), ("data='dogs'", "toy, pets, heads or folder")),
    (dict(data="pets"), ("data_root='data'", "make data")),
    (dict(features="nothing.here:load"), ("features='nothing.here:load'", "file.py:function")),
    (dict(features="magic"), ("features='magic'", "no colon")),
    (dict(solver="rk4"), ("solver='rk4'",)),
    (dict(sample=3), ("sample=3", "did you mean samples")),
    (dict(name="a/b"), ("name='a/b'", "plain name"))]


@pytest.mark.parametrize("params, words", REFUSED, ids=["-".join(params) for params, _ in REFUSED])
def test_refused_before_anything_is_generated(project, extractor, params, words):
    (project/"torn.pt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError) as e:
        cells(**dict(run="tiny", **QUICK, **extractor) | params)
    assert e.type.__name__ == "ParameterError"
    for word in words:
        assert word in str(e.value)
    assert "\n" not in str(e.value)
    assert not list(project.glob("outputs/*/evaluation"))


def test_data_of_other_classes_is_refused(project, extractor):
    torch.manual_seed(0)
    model = TinyDiT(16, patch_size=8, dim=32, depth=1, num_heads=2, num_classes=5)
    save_model(model, project/"five.safetensors", step=1)
    with pytest.raises(ValueError, match="data='toy': it has 13 classes and five.safetensors has 5"):
        cells(run="tiny", **QUICK, **extractor, weights="five.safetensors")


def test_without_inception(project, extractor, capsys, monkeypatch):
    "No network, or no torchmetrics: one line, and all other scores are there."
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(project/"hub"))
    cells(run="tiny", **QUICK, **extractor, fid=True, name="a")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    cells(run="tiny", **QUICK, **extractor, fid=True, name="a")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no FID: ")]
    assert len(lines) == 2
    assert "pip install 'tinycats[fid]'" in lines[1]
    assert "fid" not in scores(project, "a")
    assert scores(project, "a")["fd"] > 0


def test_with_inception(project, extractor, inception):
    "FID and KID have their own names, reference values and a gap."
    found = cells(run="tiny", **QUICK, **extractor, fid=True, name="a")["found"]
    assert {"fid", "fid_reference", "fid_train", "fid_train_reference", "fid_gap", "kid_inception",
            "kid_inception_reference", "fd", "kid"} <= set(found)
    assert found["fid"] != found["fd"]
    assert found["fid"] > found["fid_reference"]


def git(folder, command):
    done = subprocess.run(["git", *command.split()], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_published_run_stays_clean(tmp_path, monkeypatch):
    "A clone's outputs/toy is enough, and git ignores evaluations, unless they are named published."
    toy = tmp_path/"outputs/toy"
    toy.mkdir(parents=True)
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    monkeypatch.chdir(tmp_path)
    for name in ("ema.safetensors", "config.json"):
        shutil.copy(ROOT/"outputs/toy"/name, toy)
    (tmp_path/"net.py").write_text("def load():\n    return lambda x: x.float().mean((2, 3))\n")
    cells(**QUICK | dict(num_steps=8, samples=1), features="net.py:load", name="published")
    published = toy/"evaluation/published"
    assert json.loads((published/"scores.json").read_text())["step"] > 0
    shutil.copy(ROOT/".gitignore", tmp_path)
    git(tmp_path, "init -q")
    shutil.copytree(published, toy/"evaluation/step_0012000")
    (toy/"evaluation/evaluate.ipynb").touch()
    kept = git(tmp_path, "ls-files -o --exclude-standard outputs/toy/evaluation").split()
    assert {Path(path).parts[3] for path in kept} == {"published"}
    assert {"scores.json", "overview.png"} <= {Path(path).name for path in kept}
    assert max(len(Path(path).parts) for path in kept) == 5 # no single images


def test_real_cats(project, extractor, monkeypatch):
    "The twelve breeds, the official split, no dogs unless they are named."
    pets = shared("oxford-iiit-pet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(project/"cache"))
    page = cells(run="tiny", **QUICK, **extractor, data="pets", data_root=str(pets.parent), fid=False)
    found = page["found"]
    assert (found["n"], found["n_heldout"], found["n_training"]) == (24, 1183, 1182)
    assert found["fd"] > found["fd_reference"] > 0
    assert "Other" not in page["record"]["class_accuracy_by_class"]
    assert 1/12 < found["class_accuracy_real"]
    assert found["high_frequency_ratio_real"] == pytest.approx(1, abs=.15)


def test_heads_of_real_cats(project, inception, monkeypatch):
    "One half of the training images trains the classifier, the other is compared; copies are sought in all."
    pets = shared("oxford-iiit-pet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(project/"cache"))
    calls, train_classifier, measure = {}, metrics.train_classifier, metrics.scores

    def train_briefly(images, labels, num_classes, steps):
        calls["classifier"] = len(labels), num_classes
        return train_classifier(images, labels, num_classes, steps=20)

    def record_scores(*args, **kwargs):
        calls["scores"] = len(kwargs["training"][1]), kwargs["originals"].shape[-1]
        return measure(*args, **kwargs)

    monkeypatch.setattr(metrics, "train_classifier", train_briefly)
    monkeypatch.setattr(metrics, "scores", record_scores)
    page = cells(run="tiny", **QUICK, data="heads", data_root=str(pets.parent), name="heads")
    found, real = page["found"], page["real"]
    count = len(real.training[1])
    assert found["n_training"] == count
    assert 200 < found["n_heldout"] < 300 < count < 1182
    assert calls["classifier"] == ((count + 1)//2, 13)
    assert calls["scores"] == (count//2, 18)
    assert torch.equal(real.training[0], real.uncropped[0][..., 1:17, 1:17])
    assert torch.equal(real.training[1], real.uncropped[1])
    assert set(page["reference"][1].tolist()) == set(page["for_classifier"][1].tolist()) == set(range(12))
    labels = dict(generated=page["requested"], heldout=real.heldout[1], training=real.training[1])
    expected = metrics.distances(page["points"], labels, seed=0)
    assert found["fid"] == expected["fd"]
    assert found["fid_train_reference"] == expected["fd_train_reference"]


COMPARED = dict(
    steps=60, compared=2, samples=1, num_steps=3, image_size=16, batch_size=8, ema_decay="[0.5, 0.8]",
    classes="Siamese,Bengal")


def test_compare_ema(tmp_path):
    "The page trains its run, compares, and on the second start does not train again."
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    done = papermill(tmp_path, "compare_ema", **COMPARED)
    assert done.returncode == 0, done.stderr
    run = tmp_path/"outputs/compare_ema"
    checkpoints = sorted(path.name for path in (run/"checkpoints").glob("*.pt"))
    assert checkpoints == ["step_0000030.pt", "step_0000060.pt"]
    outputs = page_outputs(tmp_path/"out.ipynb")
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3

    stamp = (run/"checkpoints/step_0000060.pt").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path)
        page = cells("compare_ema", **COMPARED | dict(ema_decay=[.5, .8], classes=["Siamese"]))
        assert (run/"checkpoints/step_0000060.pt").stat().st_mtime_ns == stamp
        names = ["raw", "ema 0.5", "ema 0.8"]
        assert set(page["generated"]) == {(name, 30) for name in names} | {(name, 60) for name in names}
        assert list(page["curves"]["Fréchet distance"]) == names
        with pytest.raises(ValueError, match="classes='Cat': no such class"):
            cells("compare_ema", **COMPARED | dict(classes=["Cat"]))
        (run/"short_run").unlink()
        shutil.rmtree(run/"checkpoints")
        with pytest.raises(ValueError, match="has no checkpoints; train it with keep_every"):
            cells("compare_ema", **COMPARED)


def test_equal_averages_are_refused(tmp_path, monkeypatch):
    "In a short run 0.999 and 0.9999 are the same average: the page says so instead of comparing them."
    monkeypatch.chdir(tmp_path)
    params = COMPARED | dict(steps=20, batch_size=4, num_steps=1, ema_decay=[.999, .9999])
    with pytest.raises(ParameterError, match="choose smaller ones, or train longer"):
        cells("compare_ema", **params)


def write_run(name, seed, evaluations):
    "A run folder with a config and evaluations, {name of an evaluation: its fd}."
    folder = Path("outputs")/name
    folder.mkdir(parents=True)
    config = dict(run=name, seed=seed, lr=1e-3, num_steps=50, step=4500, class_accuracy=.5)
    (folder/"config.json").write_text(json.dumps(config))
    for evaluation, fd in evaluations.items():
        place = folder/"evaluation"/evaluation
        place.mkdir(parents=True)
        found = dict(fd=fd, seed=0, num_steps=25, cfg_scale=3., step=9, seconds=1.5, class_accuracy=.75)
        (place/"scores.json").write_text(json.dumps(found))


def test_sweep(tmp_path, monkeypatch):
    "Parameters that differ are named, a seed too; runs are compared under the same, newest settings."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    guided = "step_0004500-cfg_scale_3"
    write_run("a", 1, {"step_0000300": 3., "step_0004500": 1., guided: 9.})
    write_run("b", 2, {"step_0004500": 2., "step_0009000-cfg_scale_3": 8.})
    write_run("c", 3, {})
    page = cells("sweep", per_class=0)
    assert page["differ"] == ["seed"]
    assert page["newest"] == dict(a="step_0004500", b="step_0004500", c=None)
    found = page["scores"]
    assert [found[run].get("fd") for run in "abc"] == [1, 2, None]
    assert found["a"]["evaluation"] == "step_0004500"
    for run in "abc":
        assert found[run]["step"] == 4500
        assert not {"seed", "num_steps", "cfg_scale", "seconds"} & set(found[run])
    assert found["a"]["class_accuracy"] == .75
    assert found["c"]["class_accuracy after training"] == .5
    assert "class_accuracy" not in found["c"]

    shutil.rmtree(tmp_path/"outputs/b/evaluation/step_0004500") # now only one kind is there for both
    page = cells("sweep", per_class=0)
    assert [page["scores"][run].get("fd") for run in "abc"] == [9, 8, None]
    assert page["newest"]["a"] == guided

    scores = tmp_path/"outputs/b/evaluation/step_0009000-cfg_scale_3/scores.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | dict(num_steps=12, solver="ab2")))
    page = cells("sweep", per_class=0)  # sampled otherwise, so not comparable
    assert list(page["newest"].values()).count(None) == 2
