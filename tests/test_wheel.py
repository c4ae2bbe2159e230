"""The wheel and the source archive as a stranger gets them: what is inside, and what they do in an
environment that has the requirements and none of the extras, in a folder that knows nothing of tinycats."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from configparser import ConfigParser
from email import message_from_string
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from helpers import slow
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "settings.ini setup.py MANIFEST.in README.md LICENSE constraints.txt".split()
TINY = dict(
    run="one", toy_images=13, image_size=16, patch_size=8, dim=16, depth=1, num_heads=2, steps=20,
    batch_size=2, warmup_steps=0, log_every=1, samples=1, num_steps=1)
SETTINGS = ConfigParser()
SETTINGS.read(ROOT/"settings.ini", encoding="utf-8")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "What `python -m build` makes of a fresh copy: the source archive, and from that the wheel."
    for name in ("build", "setuptools", "wheel"):
        pytest.importorskip(name)
    there = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT/name, there)
    for part in ("tinycats", "nbs", "outputs/toy"):
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT/part, there/part, ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", there]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return there/"dist"


def without_extras():
    "The distributions that the requirements alone bring along, by their canonical names."
    found = set()
    waiting = [Requirement(line) for line in SETTINGS["DEFAULT"]["requirements"].split()]
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in found:
            continue
        found.add(name)
        try:
            lines = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # for another system
            continue
        waiting += [line for line in lines if not line.marker or line.marker.evaluate({"extra": ""})]
    return found


def top_level(name):
    "The files and folders in site-packages that belong to a distribution."
    from importlib.metadata import distribution
    return {path.parts[0] for path in distribution(name).files or []} - {"..", "__pycache__"}


def link_packages(names, site):
    "An environment's site-packages gets links to these distributions of ours, and to nothing else."
    ours = Path(importlib.util.find_spec("torch").origin).parents[1]
    for name in names:
        try:
            entries = top_level(name)
        except PackageNotFoundError:
            continue
        for entry in entries:
            if (ours/entry).exists() and not (site/entry).exists():
                (site/entry).symlink_to(ours/entry)


def make_environment(there, wheel, names):
    "The Python of an empty environment with the wheel and links to some distributions."
    venv.create(there, symlinks=True)
    site = next(there.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    link_packages(names, site)
    return there/"bin"/"python"


@pytest.fixture(scope="module")
def bare(dist, tmp_path_factory):
    "Python with the wheel and its requirements; every extra is missing."
    wheel = next(dist.glob("*.whl"))
    return make_environment(tmp_path_factory.mktemp("bare")/"env", wheel, without_extras())


@pytest.fixture(scope="module")
def full(dist, tmp_path_factory):
    "Python with the wheel and whatever is installed here, but no editable tinycats."
    there = tmp_path_factory.mktemp("full")/"env"
    python = make_environment(there, next(dist.glob("*.whl")), [])
    others = [p for p in sys.path if p.endswith("site-packages")]
    (next(there.glob("lib/python*/site-packages"))/"others.pth").write_text("\n".join(others))
    return python


def run(python, where, *args, **more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MODAL_", "TINYCATS_", "PYTHON"))}
    env = kept | dict(OMP_NUM_THREADS="1", MODAL_CONFIG_PATH=str(where/"none")) | more
    return subprocess.run([python, *args], cwd=where, env=env, capture_output=True, text=True)


def cats(python, where, line, **more):
    return run(python, where, "-m", "tinycats", *line.split(), **more)


def metadata(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_string(wheel.read(name).decode()), wheel.namelist()


def test_twine_accepts_them(dist):
    pytest.importorskip("twine")
    files = sorted(dist.iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_description_says_what_settings_say(dist):
    found, names = metadata(dist)
    settings = SETTINGS["DEFAULT"]
    assert found["Version"] == settings["version"]
    assert (found["License-Expression"] or found["License"]) == "Apache-2.0"  # the latter: an old setuptools
    extras = {key.removesuffix("_requirements") for key in settings if key.endswith("_requirements")}
    assert set(found.get_all("Provides-Extra")) == {*extras, "all"}
    assert "example" not in "".join(value for name, value in found.items())  # no placeholder is published
    base = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert {canonicalize_name(Requirement(line).name) for line in base} == \
        {canonicalize_name(Requirement(line).name) for line in settings["requirements"].split()}
    assert "tinycats/py.typed" in names
    text = found.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20
    assert not [link for link in links if not link.startswith(("http", "#"))], "a relative link leads nowhere"


def test_it_contains_what_its_commands_run(full, tmp_path):
    code = "import tinycats.cloud as c\nprint(c.__file__)\nprint(c.resources_folder())"
    done = run(full, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    module, resources = map(Path, done.stdout.strip().splitlines())
    assert module.is_relative_to(full.parents[1])
    assert resources == module.with_name("resources")
    names = {p.relative_to(resources).as_posix() for p in resources.rglob("*") if p.is_file()}
    assert names >= {"settings.ini", "constraints.txt", "nbs/params/full.yaml"}
    assert names >= {f"nbs/params/{path.name}" for path in ROOT.glob("nbs/params/*.*")}
    assert names >= {f"nbs/{page}.ipynb" for page in ("train", "evaluate", "sweep", "explore")}
    assert names >= {"outputs/toy/ema.safetensors", "outputs/toy/config.json"}
    page = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("nbs/page/**/*") if p.is_file()}
    assert "nbs/page/vendor/ort-wasm-simd-threaded.wasm" in page
    assert names >= page
    assert not [name for name in names if name.startswith("nbs/0")]
    assert (resources/"nbs"/"train.ipynb").read_bytes() == (ROOT/"nbs"/"train.ipynb").read_bytes()


def test_without_extras_it_draws_a_cat(bare, tmp_path):
    "In a folder with a settings.ini of somebody else; nothing but the picture appears."
    from PIL import Image
    (tmp_path/"settings.ini").write_text("[DEFAULT]\nlib_name = of_somebody_else\n")
    (tmp_path/"deep").mkdir()
    done = cats(bare, tmp_path/"deep", "sample --classes Siamese --samples 2 --seed 4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 images, in cats.png\n", "")
    assert os.listdir(tmp_path/"deep") == ["cats.png"]
    assert sorted(os.listdir(tmp_path)) == ["deep", "settings.ini"]
    colours = Image.open(tmp_path/"deep"/"cats.png").convert("RGB").getcolors(10**6)
    assert len(colours) > 500
    code = "from tinycats import load_model, Trainer, show\nprint(load_model('outputs/toy').num_classes)"
    assert run(bare, tmp_path, "-c", code).stdout == "13\n"


def test_without_extras_it_trains(bare, tmp_path):
    code = """
from tinycats import ImageDataset, TinyDiT, Trainer, TrainConfig, toy_cats
data = ImageDataset(*toy_cats(13, size=16))
model = TinyDiT(16, patch_size=8, dim=16, depth=1, num_heads=2)
steps = [r["step"] for r in Trainer(model, data, "outputs/mine", TrainConfig(steps=2, batch_size=2)).fit()]
print(steps)
"""
    done = run(bare, tmp_path, "-c", code)
    assert done.stdout == "[2]\n", done.stderr
    assert (tmp_path/"outputs/mine/metrics.jsonl").exists()


MISSING = {
    "train": "papermill, ipykernel are not installed: pip install 'tinycats[lab]'",
    "explore": "voila, ipykernel are not installed: pip install 'tinycats[lab]'",
    "cloud --dry-run": "modal, papermill are not installed: pip install 'tinycats[cloud]'",
    "export toy": "onnx, onnxscript are not installed: pip install 'tinycats[onnx]'",
    "page toy": "onnx, onnxscript, onnxruntime are not installed: pip install 'tinycats[onnx]'",
    "push toy user/toy": "huggingface_hub is not installed: pip install 'tinycats[hub]'",
    "sample user/toy": "huggingface_hub is not installed: pip install 'tinycats[hub]'",
    "log toy": "tensorboard is not installed: pip install 'tinycats[log]'"}


@pytest.mark.parametrize("line", MISSING)
def test_a_missing_extra_is_named_in_one_line(bare, tmp_path, line):
    done = cats(bare, tmp_path, line)
    assert (done.returncode, done.stderr) == (1, MISSING[line] + "\n")


def test_the_module_of_the_cloud_names_its_extra_too(bare, tmp_path):
    done = run(bare, tmp_path, "-m", "tinycats.cloud", "--dry-run")
    assert (done.returncode, done.stderr) == (1, "modal is not installed: pip install 'tinycats[cloud]'\n")


@slow("half a minute")
def test_with_lab_it_trains_20_steps(full, tmp_path):
    "In a folder below one with a settings.ini of somebody else."
    (tmp_path/"settings.ini").write_text("[DEFAULT]\nlib_name = of_somebody_else\n")
    (tmp_path/"mine").mkdir()
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in TINY.items())
    done = cats(full, tmp_path/"mine", f"train {flags}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 steps" in done.stdout
    assert (tmp_path/"mine/outputs/one/ema.safetensors").exists()
    assert (tmp_path/"mine/outputs/one/train.ipynb").exists()
    assert sorted(os.listdir(tmp_path)) == ["mine", "settings.ini"]
    done = cats(full, tmp_path/"mine", "sample one --samples 1")
    assert (done.returncode, done.stdout) == (0, "13 images, in cats.png\n"), done.stderr
    done = cats(full, tmp_path/"mine", "evaluate absent")
    assert "train it with make demo run=absent or tinycats train absent" in done.stderr
    assert not (tmp_path/"mine/outputs/absent").exists()


@slow("half a minute")
def test_the_cloud_from_a_wheel(full, tmp_path):
    done = run(full, tmp_path, *"-m tinycats.cloud --params full --dry-run".split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200,000 steps of 256" in done.stdout
    assert "Debian slim" in done.stdout
    again = cats(full, tmp_path, "cloud --params full --dry-run")
    assert again.stdout == done.stdout
    tiny = TINY | dict(steps=1)
    done = run(full, tmp_path, "-c", f"from tinycats.cloud import train; print(train.local({tiny}))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'error': None, 'step': 1" in done.stdout, done.stdout + done.stderr
    assert (tmp_path/"outputs"/"one"/"ema.safetensors").exists()


@slow("two minutes")
def test_every_command_of_a_stranger_ends_well(full, tmp_path):
    "In an empty HOME, below a settings.ini of somebody else; each command says what to do with its result."
    (tmp_path/"settings.ini").write_text("[DEFAULT]\nlib_name = of_somebody_else\n")
    home = tmp_path/"home"
    home.mkdir()
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in TINY.items())
    expected = {
        f"train {flags}": 'the network: tinycats.load_model("outputs/one")',
        "evaluate one --samples 1": "generation_metadata.json",
        "sample one --samples 1": "13 images, in cats.png",
        "log one": "tensorboard --logdir " + str(Path("outputs/one/tensorboard")),
        "export one": "one.onnx",
        "page toy": "python3 -m http.server -d " + str(Path("outputs/toy/page"))}
    for line, words in expected.items():
        done = cats(full, tmp_path, line, HOME=str(home))
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert words in done.stdout
        assert "WARNING" not in done.stderr
    assert sorted(os.listdir(tmp_path/"outputs")) == ["one", "toy"]


def test_what_is_not_there_is_one_line(full, tmp_path):
    done = cats(full, tmp_path, "sample pets64")
    assert done.stderr == ("no weights at outputs/pets64: there are toy; `tinycats train pets64` makes this "
                           "one\n")
    gone = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path/"hf"), HF_TOKEN="hf_none")
    (tmp_path/"outputs").mkdir()
    resources = next((full.parents[1]/"lib").glob("python*/site-packages/tinycats/resources"))
    done = cats(full, tmp_path, f"push {resources/'outputs'/'toy'} user/toy", **gone)
    assert done.stderr.startswith("user/toy: no answer from the Hub")
    assert len(done.stderr.splitlines()) == 1
