"""A wheel in an empty environment, away from the checkout: it describes what it would do in the cloud, and
trains a step here."""
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "settings.ini setup.py MANIFEST.in README.md LICENSE constraints.txt".split()
TINY = dict(
    run="one", toy_images=13, image_size=16, patch_size=8, dim=16, depth=1, num_heads=2, steps=1,
    batch_size=2, warmup_steps=0, log_every=1, samples=1, num_steps=1)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    "The Python of an environment that holds the wheel and, of everything else here, what the wheel requires."
    pytest.importorskip("setuptools")
    there = tmp_path_factory.mktemp("wheel")
    source = there/"source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT/name, source)
    for part in ("tinycats", "nbs"):
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT/part, source/part, ignore=ignore)
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", there]
    command = [sys.executable, "-m", "pip", "wheel", *options, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    venv.create(there/"env", symlinks=True)
    site = next((there/"env").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(next(there.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    others = [p for p in sys.path if p.endswith("site-packages")]
    (site/"others.pth").write_text("\n".join(others))  # but not what they point to: no editable tinycats
    return there/"env"/"bin"/"python"


def run(python, where, *args):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MODAL_", "TINYCATS_", "PYTHON"))}
    env = kept | dict(OMP_NUM_THREADS="1", MODAL_CONFIG_PATH=str(where/"none"))
    return subprocess.run([python, *args], cwd=where, env=env, capture_output=True, text=True)


def test_it_contains_what_papermill_runs(python, tmp_path):
    code = "import tinycats.cloud as c\nprint(c.__file__)\nprint(c.resources_folder())"
    done = run(python, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    module, resources = map(Path, done.stdout.strip().splitlines())
    assert module.is_relative_to(python.parents[1])
    assert resources == module.with_name("resources")
    names = {p.relative_to(resources).as_posix() for p in resources.rglob("*") if p.is_file()}
    assert names >= {"settings.ini", "constraints.txt", "nbs/params/full.yaml"}
    assert names >= {f"nbs/params/{path.name}" for path in ROOT.glob("nbs/params/*.yaml")}
    assert names >= {"nbs/train.ipynb", "nbs/evaluate.ipynb", "nbs/sweep.ipynb"}
    page = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("nbs/page/**/*") if p.is_file()}
    assert "nbs/page/vendor/ort-wasm-simd-threaded.wasm" in page
    assert names >= page
    assert not [name for name in names if name.startswith("nbs/0")]
    assert (resources/"nbs"/"train.ipynb").read_bytes() == (ROOT/"nbs"/"train.ipynb").read_bytes()


def test_dry_run_and_a_step(python, tmp_path):
    done = run(python, tmp_path, *"-m tinycats.cloud --params full --dry-run".split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200,000 steps of 256" in done.stdout
    assert "Debian slim" in done.stdout
    done = run(python, tmp_path, "-c", f"from tinycats.cloud import train; print(train.local({TINY}))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'error': None, 'step': 1" in done.stdout, done.stdout + done.stderr
    assert (tmp_path/"outputs"/"one"/"ema.safetensors").exists()
    assert (tmp_path/"outputs"/"one"/"train.ipynb").exists()
