"Parameters on their whole way: papermill's command line, its cell, the kernel, the line that refuses."
import json, os, subprocess, sys
from pathlib import Path

import nbformat, pytest, yaml
from nbformat.v4 import new_code_cell, new_notebook
from tinycats.params import TrainConfig, check_params, notebook_params

ROOT = Path(__file__).resolve().parents[1]
TYPES = "from tinycats.params import *"
CELL = '''run:RunName = "demo" # folder under outputs/
steps:PositiveInt = 1500 # optimizer steps
lr:PositiveFloat = 1e-3 # learning rate
micro_batch:Optional[BatchSize] = None # images at a time; None: the whole batch
batch_size:BatchSize = 64 # images a step
ema_decay:EmaDecays = [0.98, 0.995] # moving averages to keep'''
READ = "import json\nglobals().update(params := read_params(globals()))"
AGAIN = "records, stepz = [1], 3\nread_params(globals())"  # as when a cell is run again later
SHOW = "assert params['steps'] == steps\nprint(json.dumps(params))"


@pytest.fixture
def papermill(tmp_path):
    cells = [new_code_cell(TYPES), new_code_cell(CELL, metadata={"tags": ["parameters"]})]
    cells += map(new_code_cell, (READ, AGAIN, SHOW))
    spec = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), tmp_path/"in.ipynb")

    def run(*args, **env):
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING"]
        command += ["--stdout-file", "-", "in.ipynb", "out.ipynb", *args]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)
        return done, nbformat.read(tmp_path/"out.ipynb", 4) if (tmp_path/"out.ipynb").exists() else None
    return run


def test_coerced_on_the_whole_way(papermill, tmp_path):
    (tmp_path/"p.yaml").write_text("lr: 1e-4\nema_decay: 0.9\nmicro_batch: 8\n")
    args = ["-p", "steps", "1e3", "-p", "micro_batch", "None", "-p", "run", "7"]
    done, _ = papermill("-f", str(tmp_path/"p.yaml"), *args)
    assert done.returncode == 0, done.stderr
    expected = dict(run="7", steps=1000, lr=1e-4, micro_batch=None, batch_size=64, ema_decay=[.9])
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("args, line", [
    (["-p", "stepz", "100"], "stepz=100: there is no parameter stepz; did you mean steps?"),
    (["-p", "steps", "1500.5"], "steps=1500.5: needs a whole number from 1 to 1,000,000,000"),
    (["-p", "lr", "None"], "lr=None: needs a number above 0"),
])
def test_refused_in_one_line(papermill, args, line):
    line = f"ParameterError: {line}"
    done, out = papermill(*args)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith(line)
    outputs = sum((cell.get("outputs", []) for cell in out.cells), [])
    errors = [output.traceback for output in outputs if output.output_type == "error"]
    assert errors == [[line]]


def test_only_the_cell_declares(papermill, tmp_path):
    "Annotated variables of an IPython start-up file are no parameters."
    startup = tmp_path/"ipython"/"profile_default"/"startup"
    startup.mkdir(parents=True)
    (startup/"00.py").write_text("api_key: str = 'secret'\ncache: dict = {}\n")
    done, _ = papermill("-p", "steps", "7", IPYTHONDIR=str(tmp_path/"ipython"))
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == [line.split(":")[0] for line in CELL.splitlines()]


def test_help_knows_every_parameter(papermill):
    done, _ = papermill("--help-notebook")
    for line in CELL.splitlines():
        name, _, kind = line.split(" =")[0].partition(":")
        assert f"  {name}: {kind} (default" in done.stdout
    assert "images at a time; None: the whole batch" in done.stdout


def test_every_setting_is_a_parameter_of_train():
    "Defaults and constraints of a setting exist once: train.ipynb declares each with TrainConfig's type."
    declared = notebook_params(ROOT/"nbs/train.ipynb")
    kinds = {name: kind for name, (kind, _) in declared.items() if name in TrainConfig.model_fields}
    assert kinds == {name: kind for name, (kind, _) in TrainConfig.declared().items()}
    defaults = {name: default for name, (_, default) in declared.items()}
    assert TrainConfig.from_params(defaults).model_dump() == {name: defaults[name] for name in kinds}


@pytest.mark.parametrize("page, name", [
    ("train", "full"), ("train", "pets128"), ("train", "pets64"), ("train", "toy"), ("train", "sweep"),
    ("train", "pets128_patch8"), ("train", "pets64_second"), ("evaluate", "evaluate_pets"),
    ("ablation", "ablation64"), ("ablation", "ablation64_further"), ("ablation", "ablation128")])
def test_parameter_files_are_accepted(page, name):
    "Each file means what it says: nothing in it is unknown, refused or changed by coercion."
    declared = notebook_params(ROOT/"nbs"/f"{page}.ipynb")
    content = yaml.safe_load((ROOT/"nbs/params"/f"{name}.yaml").read_text())
    for given in content if isinstance(content, list) else [content]:
        params = check_params(given, declared)
        assert {key: params[key] for key in given} == given


def test_every_parameter_file_is_tested():
    files = {path.stem for path in (ROOT/"nbs/params").glob("*.yaml")}
    tested = {"full", "pets128", "pets128_patch8", "pets64", "pets64_second", "toy", "sweep"}
    assert files == tested | {"evaluate_pets", "ablation64", "ablation64_further", "ablation128"}


def test_the_full_recipe():
    "full.yaml is the recipe to the letter, and so are the defaults of TrainConfig."
    recipe = yaml.safe_load((ROOT/"nbs/params/full.yaml").read_text())
    params = check_params(recipe, notebook_params(ROOT/"nbs/train.ipynb"))
    expected = dict(
        steps=200_000, batch_size=256, lr=1e-4, lr_min=5e-7, weight_decay=1e-4, warmup_steps=10_000,
        ema_decay=[.9999], grad_clip=1., class_dropout_prob=.1, log_every=100, sample_every=5_000,
        checkpoint_every=10_000, image_size=128, patch_size=16, dim=384, depth=12, num_heads=6, num_steps=50,
        cfg_scale=1.5, solver="euler", prediction="clean", data="pets")
    assert {name: params[name] for name in expected} == expected
    assert TrainConfig.from_params(params) == TrainConfig()
