"Parameters on their whole way: papermill's command line, its cell, the kernel, the line that refuses."
import json, subprocess, sys

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook

CELL = '''run:str = "demo" # folder under outputs/
steps:int = 1500 # optimizer steps
lr:float = 1e-3 # learning rate
micro_batch:int = None # pictures at once; None for the whole batch
batch_size:int = 64 # pictures a step
ema_decay:list[float] = [0.98, 0.995] # averages to keep'''
READ = "import json\nfrom tinycats.params import read_params\nglobals().update(params := read_params(globals()))"


@pytest.fixture
def papermill(tmp_path):
    cells = [new_code_cell(CELL, metadata={"tags": ["parameters"]}), new_code_cell(READ),
             new_code_cell("from tinycats.params import *\nrecords, stepz = [1], 3\nread_params(globals())"),  # a second look, as when a cell is run again
             new_code_cell("assert params['steps'] == steps\nprint(json.dumps(params))")]
    spec = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), tmp_path/"in.ipynb")

    def run(*args):
        done = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING", "--stdout-file", "-",
                               "in.ipynb", "out.ipynb", *args], cwd=tmp_path, capture_output=True, text=True)
        return done, nbformat.read(tmp_path/"out.ipynb", 4) if (tmp_path/"out.ipynb").exists() else None
    return run


def test_taken_for_what_they_mean(papermill, tmp_path):
    (tmp_path/"p.yaml").write_text("lr: 1e-4\nema_decay: 0.9\nmicro_batch: 8\n")
    done, _ = papermill("-f", str(tmp_path/"p.yaml"), "-p", "steps", "1e3", "-p", "micro_batch", "None", "-p", "run", "7")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict(run="7", steps=1000, lr=1e-4, micro_batch=None, batch_size=64, ema_decay=[.9])


@pytest.mark.parametrize("args, line", [
    (["-p", "stepz", "100"], "ParameterError: stepz=100: there is no parameter stepz; did you mean steps?"),
    (["-p", "steps", "0"], "ParameterError: steps=0: needs steps >= 1"),
    (["-p", "steps", "1500.5"], "ParameterError: steps=1500.5: needs a whole number, such as 4"),
])
def test_refused_in_one_line(papermill, args, line):
    done, out = papermill(*args)
    assert done.returncode != 0 and done.stderr.rstrip().endswith(line)
    assert "".join(o.traceback[0] for c in out.cells for o in c.get("outputs", []) if o.output_type == "error") == line


def test_help_knows_every_parameter(papermill):
    done, _ = papermill("--help-notebook")
    assert all(f"  {line.split(':')[0]}: " in done.stdout for line in CELL.splitlines())
    assert "pictures at once; None for the whole batch" in done.stdout
