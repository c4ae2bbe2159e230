"""Folders of one's own pictures, with 1, 3, 20 and 37 classes, from training to the explorer; and through the
command line, which chooses a recipe."""
import json
import os
import shutil
import subprocess
import sys

import modal
import pytest
import torch
from helpers import LONG, slow
from PIL import Image
from modal.volume import FileEntry, FileEntryType
from test_evaluate import cells

from tinycats import cloud, pages
from tinycats.checkpoint import list_checkpoints
from tinycats.dit import load_model
from tinycats.explorer import Explorer
from tinycats.folder import load_folder
from tinycats.params import ParameterError

TINY = dict(data="folder", image_size=16, patch_size=8, dim=32, depth=1, num_heads=2, steps=30, batch_size=8,
            warmup_steps=5, log_every=10, sample_every=0, checkpoint_every=10, samples=2, num_steps=2,
            device="cpu", precision="fp32", cfg_scale=1.5)
EVALUATION = dict(samples=2, num_steps=2, device="cpu", precision="fp32", fid=False)

COLOURS = """import torch
def colours():
    return lambda images: torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
"""  # a feature extractor that needs no training


def class_names(k):
    return [f"Sort {i:02d}" for i in range(k)]


def write_pictures(root, k, per_class, seed=0):
    "A folder of `k` classes, each of its own brightness, with noise that makes every picture another one."
    generator = torch.Generator().manual_seed(seed)
    for c, name in enumerate(class_names(k)):
        (root/name).mkdir(parents=True)
        for i in range(per_class):
            pixels = torch.randint(0, 60, (20, 24, 3), generator=generator) + 190*c//max(1, k)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root/name/f"{i}.png")
    return root


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project; the test runs in it, with a cache of its own."
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    return tmp_path


class FolderVolume:
    "A folder in place of a volume of Modal, for what downloads from it."
    def __init__(self, folder):
        self.folder = folder

    def iterdir(self, path, recursive=True):
        for file in sorted((self.folder/path).rglob("*")):
            stat = file.stat()
            kind = FileEntryType.DIRECTORY if file.is_dir() else FileEntryType.FILE
            name = file.relative_to(self.folder).as_posix()
            yield FileEntry(path=name, type=kind, mtime=int(stat.st_mtime), size=stat.st_size)

    def read_file(self, path):
        yield (self.folder/path).read_bytes()


def bring_home(folder, store, monkeypatch):
    "Move a run to where a cloud would keep it, and download it, as `make pull` does."
    store.mkdir()
    shutil.move(folder, store)
    before = {p.relative_to(store): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    volumes = {cloud.OUTPUTS_VOLUME: FolderVolume(store)}
    monkeypatch.setattr(modal.Volume, "from_name", volumes.get)
    assert cloud.pull(folder.name, checkpoints=True) == folder
    downloaded = {p.relative_to(folder.parent): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert not [p for p, content in before.items() if p.name != ".lock" and downloaded.get(p) != content]


def check_explorer(run, names):
    "The explorer offers the classes of the run, and samples the last of them."
    explorer = Explorer(run=run, class_name=names[-1], n=1, num_steps=2)
    try:
        assert explorer.wait()
        assert explorer.panel.classes == names
        assert "finished after" in explorer.view.status.value, explorer.view.status.value
        assert names[-1] in explorer.view.status.value
    finally:
        explorer.close()


@pytest.mark.parametrize("k, per_class", [
    (1, 24), (3, 8), pytest.param(20, 4, marks=slow("six seconds")), (37, 4)])
def test_any_number_of_classes(k, per_class, project, monkeypatch):
    "All that follows the training works with a run as it was downloaded from a cloud."
    write_pictures(project/"mine", k, per_class)
    params = TINY | dict(run="own", data_root=str(project/"mine"))
    trained = cells("train", **params)
    names = class_names(k) if k > 1 else ["Sort 00"]
    folder = project/"outputs/own"
    model = load_model(folder)
    assert model.classes == names
    assert json.loads((folder/"config.json").read_text())["classes"] == names
    assert sorted(p.name for p in (folder/"samples/final").iterdir() if p.is_dir()) == names
    assert trained["trainer"].step == 30
    bring_home(folder, project/"volume", monkeypatch)

    (project/"features.py").write_text(COLOURS)
    with_classifier = k == 1 and LONG
    features = "classes" if with_classifier else "features.py:colours"
    evaluated = cells("evaluate", run="own", features=features, **EVALUATION)
    assert evaluated["real"].classes == names
    assert len(evaluated["real"].heldout[1].unique()) == k
    real = evaluated["real"]
    assert len(real.training[1]) + len(real.heldout[1]) == k*per_class
    assert len(real.heldout[1]) < len(real.training[1]) or per_class == 4
    scores = json.loads(next((folder/"evaluation").glob("*/scores.json")).read_text())
    assert set(scores["class_accuracy_by_class"]) == set(names)
    check_explorer("outputs/own", names)

    shutil.copytree(folder, project/"outputs/other")
    swept = cells("sweep", runs=["own", "other"], per_class=1, num_steps=2)
    assert swept["runs"] == ["own", "other"]

    before = load_model(folder/"model.safetensors").state_dict()
    for path in list_checkpoints(folder/"checkpoints").values():
        if path.name != "step_0000020.pt":
            path.unlink()
    resumed = cells("train", **params)
    assert resumed["trainer"].step == 30
    assert all(torch.equal(value, before[name]) for name, value in resumed["model"].state_dict().items())


def test_another_folder_of_as_many_classes_is_told_from_the_first(project):
    write_pictures(project/"mine", 3, 6)
    write_pictures(project/"other", 3, 6, seed=1)
    cells("train", **TINY | dict(run="own", data_root="mine", steps=20))
    with pytest.raises(ValueError, match="the images differ from those that the run .* began with"):
        cells("train", **TINY | dict(run="own", data_root="other", steps=20))
    (project/"mine/Sort 00").rename(project/"mine/Another")
    with pytest.raises(ValueError, match="classes is .*Another"):
        cells("train", **TINY | dict(run="own", data_root="mine", steps=20))
    with pytest.raises(ParameterError, match="its classes are Another"):
        cells("evaluate", run="own", **EVALUATION)


def test_warm_start_with_other_classes(project):
    write_pictures(project/"mine", 3, 8)
    write_pictures(project/"more", 5, 8, seed=1)
    cells("train", **TINY | dict(run="first", data_root="mine"))
    first = load_model("outputs/first/ema.safetensors").state_dict()
    begun = cells("train", **TINY | dict(run="second", data_root="more", init_from="outputs/first", steps=1,
                                         warmup_steps=1, lr=1e-12, lr_min=0))
    rows = begun["model"].state_dict()["y_embedder.weight"]
    torch.testing.assert_close(rows[:3], first["y_embedder.weight"][:3])
    torch.testing.assert_close(rows[4], first["y_embedder.weight"][:3].mean(0))
    torch.testing.assert_close(rows[5], first["y_embedder.weight"][3])
    with pytest.raises(ParameterError, match="give -p patch_size 8, or leave init_from out"):
        cells("train", **TINY | dict(run="third", data_root="more", init_from="outputs/first", patch_size=4))
    assert not (project/"outputs/third/checkpoints").exists()
    before = (project/"outputs/second/config.json").read_text()
    for other in (None, "outputs/third"):
        with pytest.raises(ParameterError, match="began with -p init_from outputs/first: give that"):
            cells("train", **TINY | dict(run="second", data_root="more", init_from=other, steps=1))
    assert (project/"outputs/second/config.json").read_text() == before
    again = dict(run="second", data_root="more", init_from="outputs/first", resume="never")
    with pytest.raises(FileExistsError, match="resume"):
        cells("train", **TINY | again)
    checkpoint, = (project/"outputs/second/checkpoints").glob("*.pt")
    with pytest.raises(ParameterError, match="init_from='outputs/first': .* leave one of them out"):
        cells("train", **TINY | again | dict(run="branch", resume=str(checkpoint)))
    assert not (project/"outputs/branch").exists()


def test_a_recipe_is_chosen_and_kept(project, monkeypatch, capsys):
    write_pictures(project/"mine", 2, 15)
    words = ["train", "-p", "run", "own", "-p", "data", "folder", "-p", "data_root", "mine"]
    quick = "-p steps 4 -p dim 32 -p depth 1 -p num_heads 2 -p samples 1 -p num_steps 2".split()
    command = [sys.executable, "-m", "tinycats.pages", *words, *quick]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "30 pictures in 2 classes. Chosen for them" in done.stdout
    assert "30 pictures: Sort 00 15, Sort 01 15; 4 held out" in done.stdout
    config = json.loads((project/"outputs/own/config.json").read_text())
    assert (config["image_size"], config["dropout"], config["augment_prob"]) == (32, .1, .15)
    assert (config["dim"], config["steps"]) == (32, 4)  # as they were given
    planned = []
    monkeypatch.setattr(pages, "run_page", lambda source, target, params: planned.append(params))
    pages.main(words)  # without the parameters that were given before
    assert "as the run began" in capsys.readouterr().out
    assert {name: config[name] for name in planned[0]} == planned[0]
    assert {"steps", "dim", "dropout", "lr", "image_size"} <= set(planned[0])


@pytest.mark.parametrize("words, message", [
    (["-p", "data_root", "none"], "there is no folder"),
    (["-p", "data_root", "empty"], "holds no pictures"),
    (["-p", "data_root", "settings.ini"], "is a file: name the folder"),
    (["-p", "data_root", "mine", "-p", "init_from", "outputs/never"], "init_from=.*no weights"),
])
def test_refused_in_one_line_before_any_work(words, message, project, monkeypatch):
    write_pictures(project/"mine", 2, 4)
    (project/"empty").mkdir()
    monkeypatch.setattr(pages, "run_page", None)
    with pytest.raises(SystemExit, match=message) as refused:
        pages.main(["train", "-p", "data", "folder", *words])
    assert "\n" not in str(refused.value)
    assert not (project/"outputs").exists()


STRANGE = {  # files in place of mine/Sort 00/0.png, and what is said about them
    "empty.jpg": (lambda path: path.write_bytes(b""), "Sort 00/empty.jpg .it is empty"),
    "page.jpg": (lambda path: path.write_text("<html>"), "Sort 00/page.jpg .its content is none of JPEG"),
    "pipe.png": (os.mkfifo, "Sort 00/pipe.png .no file"),
    "dead.png": (lambda path: path.symlink_to("nowhere"), "Sort 00/dead.png .no file, or a link to none"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="files as on Linux and macOS")
@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_file_is_named(name, project):
    "Named at once, and left out where that is asked for."
    write_pictures(project/"mine", 2, 4)
    make, message = STRANGE[name]
    make(project/"mine/Sort 00"/name)
    with pytest.raises(ValueError, match=f"1 of 9 images cannot be decoded: {message}.*skip_broken=True"):
        load_folder("mine", 16)
    with pytest.warns(UserWarning, match="left out"):
        assert len(load_folder("mine", 16, skip_broken=True).labels) == 8


def test_what_may_not_be_meant_so_is_said(project):
    "Formats that are not read, folders in classes, pictures of two classes, classes with none held out."
    write_pictures(project/"mine", 2, 4)
    (project/"mine/Sort 01/IMG_1.HEIC").write_bytes(b"")
    shutil.copytree(project/"mine/Sort 00", project/"mine/Sort 02/more")
    for i in (1, 2, 3):
        (project/f"mine/Sort 01/{i}.png").unlink()
    lines = load_folder("mine", 16).report().splitlines()
    assert lines[1].startswith("without 1 picture in other formats, such as Sort 01/IMG_1.HEIC: convert")
    assert lines[2] == "1 folder inside of classes, such as Sort 02/more: of the class around it"
    assert lines[3].startswith("4 near-duplicates, such as Sort 02/more/0.png of Sort 00/0.png")
    assert lines[4].startswith("4 near-duplicates in another class")
    assert lines[5] == "none held out of Sort 01: too few different pictures"


def test_a_picture_that_is_edited_in_place_is_noticed(project):
    "Even if it keeps its size and its date."
    path = write_pictures(project/"mine", 1, 4)/"Sort 00/2.png"
    before = load_folder("mine", 16).images
    content, stat = bytearray(path.read_bytes()), path.stat()
    pixels = torch.full((20, 24, 3), 200, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    path.write_bytes(path.read_bytes().ljust(len(content), b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = load_folder("mine", 16).images
    assert not torch.equal(after[2], before[2])
    assert torch.equal(after[:2], before[:2])


def test_evaluation_with_few_held_out(project, capsys):
    "Eighteen pictures: two or more held out of a class and none of another, which is said; and none of all."
    write_pictures(project/"mine", 2, 15)
    for i in range(12):
        (project/f"mine/Sort 00/{i}.png").unlink()
    write_pictures(project/"few", 2, 3)
    cells("train", **TINY | dict(run="own", data_root="mine", steps=4))
    (project/"features.py").write_text(COLOURS)
    options = EVALUATION | dict(run="own", features="features.py:colours")
    evaluated = cells("evaluate", **options)
    shown = capsys.readouterr().out
    assert evaluated["chosen"] == [1]
    assert "without Sort 00: none of its images are held out" in shown
    assert "held-out images are few: distances" in shown
    assert "means nothing" in evaluated["metrics"].score_table(evaluated["found"])
    with pytest.raises(ParameterError, match="^classes='Sort 00': none of its images are held out"):
        cells("evaluate", **options, classes=["Sort 00"])
    with pytest.raises(ParameterError, match="none of its images are held out"):
        cells("evaluate", **options, data_root="few")


def test_pages_that_compare_need_held_out_pictures(project):
    "A run on so few pictures that none is held out: each page that compares with those says so in a line."
    write_pictures(project/"few", 2, 3)
    cells("train", **TINY | dict(run="own", data_root="few", ema_decay=[.5, .7]))
    for page in ("evaluate", "compare_ema", "settings"):
        with pytest.raises(ParameterError, match="^classes='Sort 00': none of its images are held out"):
            cells(page, run="own")
