"Pages from the command line and through make: names and values arrive as they were typed, reports are safe."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tinycats.pages import SPIN_COUNT, plan_page
from tinycats.params import ParameterError, notebook_params
from tinycats.runs import EVALUATION_DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
TINY = "-p toy_images 52 -p image_size 16 -p dim 32 -p depth 1 -p num_heads 2 -p steps 4 -p warmup_steps 1 " \
       "-p samples 1 -p num_steps 1 -p log_every 1 -p ema_decay 0.5"


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder that make takes for the project, with an environment that is ready."
    for name in ("settings.ini", "setup.py", "constraints.txt", "Makefile"):
        shutil.copy(ROOT/name, tmp_path)
    (tmp_path/"ready").touch()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # these tests may themselves be started by make
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def make(project, *words, **env):
    "make with the Python of these tests; what it printed and its exit code."
    if not shutil.which("make"):
        pytest.skip("no make here")
    command = ["make", f"PYTHON_HERE={sys.executable}", "READY=ready", *words]
    return subprocess.run(
        command, cwd=project, env=os.environ | env, capture_output=True, text=True, timeout=240)


def last_line(done):
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    return lines[-1]


def test_a_run_of_digits_keeps_its_name(project):
    "A number for YAML, a name for us; and the report appears under its own name only when it has run."
    done = make(project, "demo", "run=007", f"args={TINY}")
    assert done.returncode == 0, done.stderr
    outputs = project/"outputs"
    assert os.listdir(outputs) == ["007"]
    config = json.loads((outputs/"007/config.json").read_text())
    assert config["run"] == "007"
    assert config["step"] == 4
    report = (outputs/"007/train.ipynb").read_bytes()
    assert not list((outputs/"007").glob("train.*.ipynb"))

    done = make(project, "demo", "run=007", "args=-p stepz 7")  # refused before anything is written
    assert done.returncode != 0
    assert last_line(done) == "stepz='7': there is no parameter stepz; did you mean steps?"
    assert (outputs/"007/train.ipynb").read_bytes() == report

    (outputs/"007/checkpoints").rename(project/"elsewhere")  # now it cannot go on
    done = make(project, "demo", "run=007", f"args={TINY} -p lr 1e-3")
    assert done.returncode != 0
    assert "CheckpointError" in done.stderr
    assert "holds a run at step 4 without its checkpoints" in done.stderr
    assert (outputs/"007/train.ipynb").read_bytes() == report
    failed = nbformat.read(outputs/"007/train.failed.ipynb", 4)
    assert any("without its checkpoints" in str(cell.get("outputs")) for cell in failed.cells)
    assert "Traceback" not in done.stderr


NAMES = ["a'; touch hacked; '", '"; touch hacked; `touch hacked`"', "$(touch hacked)", ""]


@pytest.mark.parametrize("run", NAMES)
def test_a_name_is_never_read_by_a_shell(project, run):
    before = sorted(os.listdir(project))
    done = make(project, "demo", f"run={run.replace('$', '$$')}")
    assert done.returncode != 0
    assert "the plain name of a folder" in last_line(done)
    assert sorted(os.listdir(project)) == before


@pytest.mark.parametrize("run", ["../a", "a b", "a/b", ".a", "x"*300])
def test_a_name_is_that_of_a_folder(project, run):
    with pytest.raises(ParameterError, match="the plain name of a folder"):
        plan_page(["train"], run)


def test_parameters_are_not_read_by_a_shell(project):
    done = make(project, "demo", "args=-p data_root 'a b; touch hacked' -p data pets")
    assert done.returncode != 0
    assert "data_root='a b; touch hacked'" in done.stderr
    assert not (project/"hacked").exists()


def test_the_run_may_be_named_in_several_places(project, monkeypatch):
    (project/"a.yaml").write_text("run: from_file\n")
    monkeypatch.chdir(project)

    def planned(*words, run=None):
        return plan_page(["train", *words], run)[1].parent.name

    assert planned() == "demo"
    assert planned("-p", "run", "2026_01_15") == "2026_01_15"
    assert planned("-f", "a.yaml") == "from_file"
    assert planned("-f", "a.yaml", run="mine") == "mine"
    with pytest.raises(ParameterError, match="run='mine' and -p run yours: name the run once"):
        planned("-p", "run", "yours", run="mine")


def test_evaluate_needs_a_run(project):
    done = make(project, "evaluate", "run=absent")
    assert done.returncode != 0
    assert "there is no folder" in last_line(done)
    assert "train it with make demo run=absent" in last_line(done)
    assert not (project/"outputs").exists()


def test_a_moved_project_still_works():
    "Scripts hold the absolute path of their environment, so make starts programs as modules."
    text = (ROOT/"Makefile").read_text()
    assert text.count("$(VENV)/bin") == 2  # PYTHON_HERE, and the comment that says why
    for script in ("papermill", "voila", "jupyter-lab", "nbdev_test", "pip "):
        assert f"bin/{script}" not in text


def test_a_broken_matplotlib_is_noticed_before_training(project):
    "LaTeX for all text, and no LaTeX."
    (project/"matplotlibrc").write_text("text.usetex: True\n")
    done = make(project, "demo", f"args={TINY}", PATH=f"{Path(shutil.which('make')).parent}")
    if shutil.which("latex"):
        pytest.skip("LaTeX is installed here")
    assert done.returncode != 0
    assert "matplotlib cannot draw here" in last_line(done) or "matplotlib cannot draw here" in done.stderr
    assert not (project/"outputs/demo/metrics.jsonl").exists()


def test_weights_are_saved_before_any_picture(project):
    "The sheet cannot be written, because a folder has its name; the weights are there all the same."
    (project/"outputs/demo/samples/final.png").mkdir(parents=True)
    done = make(project, "demo", f"args={TINY}")
    assert done.returncode != 0
    assert "final.png" in done.stderr
    assert {"model.safetensors", "ema.safetensors", "config.json"} <= set(os.listdir(project/"outputs/demo"))


def test_the_names_of_evaluations_compare_with_the_page():
    "Edited in the page or given on the command line, a setting that is not the default shows in the name."
    declared = notebook_params(ROOT/"nbs/evaluate.ipynb")
    assert EVALUATION_DEFAULTS == {name: declared[name][1] for name in EVALUATION_DEFAULTS}
    others = {"run", "batch_size", "device", "data_root", "features_from", "fid", "name"}  # where, not what
    assert set(declared) == set(EVALUATION_DEFAULTS) | others


def test_the_makefile_and_pages_agree_on_spinning():
    assert f"GOMP_SPINCOUNT ?= {SPIN_COUNT}\n" in (ROOT/"Makefile").read_text()
