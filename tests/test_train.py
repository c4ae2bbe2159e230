"train.ipynb on its whole way through papermill: toy cats, real cats, and what is refused."
import json, os, subprocess, sys
from pathlib import Path

import nbformat, pytest, tinycats, torch
from helpers import shared, slow
from PIL import Image
from test_evaluate import cells
from tinycats.checkpoint import list_checkpoints, load_checkpoint
from tinycats.data import BREEDS
from tinycats.dit import load_model
from tinycats.flow import sample
from tinycats.params import ParameterError
from tinycats.trainer import run_metadata

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(toy_images=130, image_size=16, patch_size=8, dim=32, depth=1, num_heads=2, steps=20,
            batch_size=16, warmup_steps=5, log_every=5, sample_every=10, checkpoint_every=10, samples=2,
            num_steps=4)


def papermill(root, *args, **params):
    "Run train.ipynb from the folder `root`, which plays the project's root."
    (root/"settings.ini").write_text("lib_name = tinycats\n")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING"]
    command += ["--stdout-file", "-"]
    command += [ROOT/"nbs/train.ipynb", "out.ipynb", *args]
    for name, value in params.items():
        command += ["-p", name, str(value)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def read_lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    "The root of a project with a complete run `a`, and what papermill printed."
    root = tmp_path_factory.mktemp("complete")
    done = papermill(root, run="a", ema_decay="[0.5, 0.9]", **TINY)
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_progress_and_results_are_printed(complete):
    _, stdout = complete
    for text in ("20/20", "ETA", "outputs/a/samples/final.png"):
        assert text in stdout


def test_config_holds_settings_and_circumstances(complete):
    config = json.loads((complete[0]/"outputs/a/config.json").read_text())
    assert config["steps"] == config["step"] == 20
    assert config["ema_decay"] == [.5, .9]
    assert config["wall_seconds"] > config["train_seconds"] > 0
    assert config["computed_in"] in ("torch.bfloat16", "torch.float32")
    assert config["classes"] == BREEDS
    expected = {"parameters", "device", "versions", "git_revision", *TINY}
    expected |= {"class_accuracy", "class_accuracy_real"}
    assert expected <= set(config)


def test_a_record_every_log_every_steps(complete):
    records = read_lines(complete[0]/"outputs/a/metrics.jsonl")
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    expected = {"step", "loss", "lr", "grad_norm", "steps_per_s", "images_per_s", "eta_s", "loss_by_t",
                "threads"}
    assert set(records[0]) == expected


def test_samples_are_saved(complete):
    samples = complete[0]/"outputs/a/samples"
    sheets = sorted(path.name for path in samples.glob("*.png"))
    assert sheets == ["final.png", "step_0000010.png", "step_0000020.png"]
    for name in BREEDS:
        images = [Image.open(path) for path in sorted((samples/"final"/name).glob("*.png"))]
        assert [image.size for image in images] == [(16, 16)]*2


def test_weights_are_saved(complete):
    run = complete[0]/"outputs/a"
    models = [load_model(run/f"{name}.safetensors") for name in ("model", "ema", "ema_0.9")]
    assert [model.metadata["weights"] for model in models] == ["raw", "ema 0.5", "ema 0.9"]
    assert models[1].metadata == dict(run="a", step=20, data="toy", weights="ema 0.5")
    assert models[1].classes == BREEDS
    raw, first, second = (torch.nn.utils.parameters_to_vector(model.parameters()) for model in models)
    for a, b in ((raw, first), (first, second), (second, raw)):
        assert not torch.equal(a, b)


def test_the_report_shows_pictures(complete):
    report = complete[0]/"out.ipynb"
    outputs = sum((cell.get("outputs", []) for cell in nbformat.read(report, 4).cells), [])
    kinds = set().union(*(output.get("data", {}) for output in outputs))
    assert "image/png" in kinds
    assert not [kind for kind in kinds if "widget" in kind]
    assert report.stat().st_size < 2e6


def test_a_complete_run_is_not_trained_again(complete, monkeypatch, capsys):
    root, _ = complete
    monkeypatch.chdir(root)
    cells("train", run="a", ema_decay=[.5, .9], **TINY)
    assert "steps/s" not in capsys.readouterr().out
    assert len(read_lines(root/"outputs/a/metrics.jsonl")) == 4


def test_other_settings_do_not_continue_a_run(complete, monkeypatch):
    monkeypatch.chdir(complete[0])
    with pytest.raises(ValueError, match="steps is 30, but the run in .* began with 20"):
        cells("train", run="a", ema_decay=[.5, .9], **TINY | dict(steps=30))


def test_refused_by_papermill(tmp_path):
    done = papermill(tmp_path, **TINY, run="b", stepz=3)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ParameterError: stepz=3: there is no parameter")
    assert not (tmp_path/"outputs/b/metrics.jsonl").exists()


@pytest.mark.parametrize("params, words", [
    (dict(stepz=3), ("stepz=3", "did you mean steps")),
    (dict(steps=0), ("steps=0", "from 1 to")),
    (dict(patch_size=7), ("patch_size", "divides")),
    (dict(data="dogs"), ("data='dogs'", "toy", "pets")),
    (dict(lr="fast"), ("lr='fast'", "number")),
    (dict(data="pets"), ("make data",)),
    (dict(device="mps" if torch.cuda.is_available() else "cuda"), ("device=", "choose auto or cpu")),
    (dict(resume="none.pt"), ("none.pt'", "no such file")),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_refused_before_the_first_step(tmp_path, monkeypatch, params, words):
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError) as e:
        cells("train", **TINY | dict(run="b") | params)
    message = str(e.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message
    assert not (tmp_path/"outputs/b/metrics.jsonl").exists()


@slow("half a minute")
def test_real_cats_at_full_size(tmp_path):
    "The full recipe, cut short."
    pets = shared("oxford-iiit-pet")
    params = dict(run="try", data_root=pets.parent, steps=2, batch_size=8, warmup_steps=1, samples=1,
                  num_steps=2)
    done = papermill(tmp_path, "-f", str(ROOT/"nbs/params/full.yaml"), **params)
    assert done.returncode == 0, done.stderr
    run = tmp_path/"outputs/try"
    config = json.loads((run/"config.json").read_text())
    assert abs(config["parameters"] - 23.03e6) < 1e4
    assert len(list((run/"samples/final").glob("*/*.png"))) == 13
    assert Image.open(run/"samples/final/Maine_Coon/0000.png").size == (128, 128)


def test_a_page_runs_without_jupyter(tmp_path):
    "On a machine with PyTorch alone, tests/page.py runs the page and keeps its pictures."
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    params = dict(run="plain", steps=4, warmup_steps=1, image_size=16, dim=32, depth=1, num_heads=2,
                  toy_images=52,
                  samples=1, num_steps=2, ema_decay=[.5])
    command = [sys.executable, ROOT/"tests/page.py", ROOT/"nbs/train.ipynb", "-f", ROOT/"nbs/params/toy.yaml"]
    command += [f"{name}={value}" for name, value in params.items()]
    env = os.environ | dict(TINYCATS_PAGE=str(tmp_path))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path/"outputs/plain/config.json").read_text())
    assert config["step"] == config["steps"] == 4
    assert config["ema_decay"] == [.5]
    assert config["log_every"] == 100
    assert len(list((tmp_path/"page_train").glob("*.png"))) == 5


def test_the_revision_is_that_of_the_code(tmp_path, monkeypatch):
    "Changed code is noted; new results in outputs/ are not a change of code."
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def revision():
        return run_metadata(torch.nn.Linear(1, 1))["git_revision"]

    for name in ("tinycats/__init__.py", "nbs/a.ipynb", "outputs/a/a.json"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.setattr(tinycats, "__file__", str(tmp_path/"tinycats/__init__.py"))
    head = git("rev-parse", "HEAD")
    assert revision() == head
    (tmp_path/"outputs/a/a.json").write_text("{}")
    (tmp_path/"b").touch()
    assert revision() == head
    (tmp_path/"nbs/a.ipynb").write_text("{}")
    assert revision() == f"{head}+changes"


def test_data_settings_are_part_of_the_fingerprint(tmp_path, monkeypatch):
    "Augmentation, balance and times reach the trainer; a run with others does not continue this one."
    settings = dict(augment_prob=.5, balance_from_step=5, time_mean=.5, time_std=1.2)
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    monkeypatch.chdir(tmp_path)
    cells("train", run="a", **TINY, **settings)
    _, state = load_checkpoint(list_checkpoints(tmp_path/"outputs/a/checkpoints")[20])
    expected = settings | dict(augment_dim=5, time_sampling="logit_normal")
    assert {name: state["fingerprint"][name] for name in expected} == expected
    model = load_model(tmp_path/"outputs/a")
    assert model.augment_embedder.weight.abs().max() > 0
    assert sample(model, torch.arange(2), num_steps=2).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="augment_prob is 0.4, but the run in .* began with 0.5"):
        cells("train", run="a", **TINY, **settings | dict(augment_prob=.4))
