"A wheel in an empty environment, away from the checkout: it says what it would do in the cloud, and trains a step here."
import os, shutil, subprocess, sys, venv, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    "The Python of an environment that holds the wheel and, of everything else here, what the wheel asks for."
    pytest.importorskip("setuptools")
    there = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, there/"source", ignore=lambda folder, names: set(names) - {"settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"} if Path(folder) == ROOT else set())
    for part in ("tinycats", "nbs"): shutil.copytree(ROOT/part, there/"source"/part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", there, there/"source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    venv.create(there/"env", symlinks=True)
    site = next((there/"env").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(next(there.glob("*.whl"))) as wheel: wheel.extractall(site)
    (site/"others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))  # but not what they point to: no editable tinycats
    return there/"env/bin/python"


def run(python, where, *args, **more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MODAL_", "TINYCATS_", "PYTHON"))} | dict(OMP_NUM_THREADS="1", MODAL_CONFIG_PATH=str(where/"none")) | more
    return subprocess.run([python, *args], cwd=where, env=env, capture_output=True, text=True)


def test_it_carries_what_papermill_runs(python, tmp_path):
    done = run(python, tmp_path, "-c", "import tinycats.cloud as c; print(c.__file__); print(*c.recipe().files, c._root(), sep='\\n')")
    assert done.returncode == 0 and str(python.parents[1]) in done.stdout.splitlines()[0], done.stderr
    carried = python.parents[1]/"lib"/f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/tinycats/carried"
    names = {p.relative_to(carried).as_posix() for p in carried.rglob("*") if p.is_file()}
    assert {"settings.ini", "constraints.txt", "nbs/train.ipynb", "nbs/sweep.ipynb", "nbs/params/full.yaml", "nbs/params/pets.yaml"} <= names
    assert not [n for n in names if n.startswith("nbs/0")] and (carried/"nbs/train.ipynb").read_bytes() == (ROOT/"nbs/train.ipynb").read_bytes()
    assert done.stdout.strip().splitlines()[-1] == str(carried)


def test_dry_run_and_a_step(python, tmp_path):
    done = run(python, tmp_path, "-m", "modal", "run", "-m", "tinycats.cloud", "--params", "full", "--dry-run")
    assert done.returncode == 0 and "200,000 steps of 256" in done.stdout and "Debian slim" in done.stdout, done.stdout + done.stderr
    tiny = dict(run="one", toy_pictures=13, image_size=16, patch_size=8, dim=16, depth=1, num_heads=2, steps=1, batch_size=2, warmup_steps=0, log_every=1, samples=1, num_steps=1)
    done = run(python, tmp_path, "-c", f"from tinycats.cloud import train; print(train.local({tiny}))")
    assert done.returncode == 0 and "'said': None, 'step': 1" in done.stdout, done.stdout + done.stderr
    assert (tmp_path/"outputs/one/ema.safetensors").exists() and (tmp_path/"outputs/one/train.ipynb").exists()
