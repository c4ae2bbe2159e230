"Oxford-IIIT Pet as it is: names, counts, split, near-duplicates, and the pixels of its images."
import csv
import io
import json
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import shared
from tinycats.core import to_uint8
from tinycats.data import BREEDS, NEAR_DUPLICATES, ImageDataset, load_pets
from tinycats.folder import near_duplicate_groups, open_picture, to_square

SIZE = 32
ROOT = Path(__file__).resolve().parents[1]
OTHER = BREEDS.index("Other")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "The folder with the data set; what is decoded from it goes to a cache of its own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield shared("oxford-iiit-pet").parent


@pytest.fixture(scope="module")
def pets(root):
    "Both splits with everything in them: {split: (images, labels)}."
    return {split: load_pets(root, split, SIZE, keep_near_duplicates=True) for split in ("trainval", "test")}


def annotation_rows(root, name):
    lines = (root/"oxford-iiit-pet"/"annotations"/f"{name}.txt").read_text().splitlines()
    return [line.split() for line in lines if line[0] != "#"]


def open_photo(root, name):
    return Image.open(root/"oxford-iiit-pet"/"images"/f"{name}.jpg").convert("RGB")


def crop_and_resize(photo, left, top, side):
    "Pillow's own result, as a (3, SIZE, SIZE) tensor."
    square = photo.crop((left, top, left + side, top + side))
    resized = square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return pixels.view(SIZE, SIZE, 3).permute(2, 0, 1)


def test_names_and_counts(root, pets):
    labels = torch.cat([y for _, y in pets.values()])
    ours = dict(zip(BREEDS, labels.bincount().tolist()))
    theirs = Counter(row[0].rpartition("_")[0] for row in annotation_rows(root, "list") if row[2] == "1")
    assert set(theirs) == set(BREEDS[:OTHER])
    assert {name: ours[name] for name in theirs} == dict(theirs)
    assert sum(theirs.values()) == 2371
    assert ours["Other"] == 4978
    assert [len(y) for _, y in pets.values()] == [3680, 3669]
    assert [int((y != OTHER).sum()) for _, y in pets.values()] == [1188, 1183]


def test_near_duplicates_stay_out_of_training(root):
    train_names = {row[0] for row in annotation_rows(root, "trainval")}
    test_names = {row[0] for row in annotation_rows(root, "test")}
    assert not train_names & test_names
    assert len(NEAR_DUPLICATES) == 6
    assert set(NEAR_DUPLICATES) <= train_names
    assert set(NEAR_DUPLICATES.values()) <= test_names
    labels = load_pets(root, "trainval", SIZE)[1]
    assert len(labels) == 3680 - 6
    assert (labels != OTHER).sum() == 1188 - 6
    assert len(load_pets(root, "test", SIZE)[1]) == 3669
    assert (load_pets(root, "test", SIZE, dogs=False)[1] != OTHER).all()


@pytest.mark.parametrize("split, index", [("trainval", 0), ("trainval", 1700), ("test", 3000)])
def test_an_image_is_the_centre_square_of_its_file(root, pets, split, index):
    photo = open_photo(root, annotation_rows(root, split)[index][0])
    side = min(photo.size)
    expected = crop_and_resize(photo, (photo.width - side)//2, (photo.height - side)//2, side)
    image = pets[split][0][index]
    assert image.shape == expected.shape
    assert (image.int() - expected).abs().max() <= 1


def test_the_cache_is_quick_and_the_same(root, pets):
    start = time.perf_counter()
    images, labels = load_pets(root, "test", SIZE, keep_near_duplicates=True)
    assert time.perf_counter() - start < 3
    assert torch.equal(images, pets["test"][0])
    assert torch.equal(labels, pets["test"][1])


def test_batches_are_balanced_by_class(pets):
    x1, y = ImageDataset(*pets["trainval"], BREEDS, size=28).batch(0, 130)
    assert x1.shape == (130, 3, 28, 28)
    assert y.bincount().tolist() == [10]*13
    assert to_uint8(x1).float().std() > 20


def test_heads_are_cropped_and_a_fifth_is_held_out(root):
    train_images, train_labels = load_pets(root, "trainval", SIZE, heads=True)
    test_images, test_labels = load_pets(root, "test", SIZE, heads=True)
    cats = (torch.cat([train_labels, test_labels]) != OTHER).sum()
    assert cats == 1181
    assert .15 < (test_labels != OTHER).sum()/cats < .25
    assert set(test_labels.tolist()) == set(range(13))

    with open(root/"oxford-iiit-pet"/"annotations"/"head_boxes.csv", newline="") as file:
        row = next(csv.DictReader(file))
    x0, x1 = int(row["xmin"]), int(row["xmax"])
    y0, y1 = int(row["ymin"]), int(row["ymax"])
    photo = open_photo(root, row["name"])
    scale = photo.width/int(row["orig_width"])
    side = round(1.4*scale*max(x1 - x0, y1 - y0))
    left = round(min(max(0, (x0 + x1)/2*scale - side/2), photo.width - side))
    top = round(min(max(0, (y0 + y1)/2*scale - side/2), photo.height - side))
    expected = crop_and_resize(photo, left, top, side)
    differences = (torch.cat([train_images, test_images]).int() - expected).abs().float().mean((1, 2, 3))
    assert differences.min() < 3


def shows_an_image(cell):
    "Whether a picture is stored in the outputs of a cell."
    stored = [output.get("data", {}) for output in cell.get("outputs", ())]
    return any(kind.startswith("image/") for kind in set().union(*stored))


def test_no_photograph_is_published():
    "Of runs on real cats only generated images are stored: no sheet and no page with photographs."
    command = ["git", "ls-files", "outputs"]
    kept = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not kept:
        pytest.skip("this is no git checkout")
    published = [path for path in kept if path.startswith("outputs/pets")]
    assert not [path for path in published if Path(path).name in ("overview.png", "closest.png")]
    configs = ROOT.glob("outputs/*/config.json")
    toy_runs = {path.parent for path in configs if json.loads(path.read_text()).get("data") == "toy"}
    pages = [ROOT/path for path in kept if path.endswith(".ipynb")]
    pages = [page for page in pages if not toy_runs & set(page.parents)]
    assert pages
    for page in pages:
        for cell in json.loads(page.read_text())["cells"]:
            source = "".join(cell["source"])
            if shows_an_image(cell):
                assert not any(word in source for word in ("_sheet(x1", "overview", "closest")), page


def test_a_user_without_a_home(root, monkeypatch, tmp_path):
    "Where the system knows no home, decoded images are kept among the temporary files."
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    images, labels = load_pets(root, "test", 16, dogs=False, heads=True)
    assert len(images) == len(labels) > 100


def test_a_photograph_saved_again_is_a_near_duplicate():
    "At a lower quality, and smaller: nearer than the limit. Two different photographs are further apart."
    root = shared("oxford-iiit-pet")
    originals, copies = [], []
    for path in sorted((root/"images").glob("[A-Z]*.jpg"))[::60]:
        photo = open_picture(path)
        smaller = photo.resize((photo.width*2//3, photo.height*2//3))
        for image, quality in ((photo, 40), (smaller, 80)):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)
            copies.append(to_square(open_picture(io.BytesIO(file.getvalue())), 54))
        originals.append(to_square(photo, 54))
    n = len(originals)
    groups = near_duplicate_groups(torch.stack([*originals, *copies]))
    assert groups[:n].tolist() == list(range(n))
    assert groups[n:].equal(torch.arange(n).repeat_interleave(2))
