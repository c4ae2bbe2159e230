"Oxford-IIIT Pet as it is: names, counts, split, twins and true sizes."
import json, subprocess, time
from collections import Counter
from pathlib import Path

import pytest, torch
from helpers import shared
from PIL import Image
from tinycats.data import BREEDS, Cats, load_pets, to_uint8

SIZE, ROOT = 32, Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    "Both splits with everything in them, prepared into a cache of their own."
    root = shared("oxford-iiit-pet").parent
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield root, {split: load_pets(root, split, SIZE, twins=True) for split in ("trainval", "test")}


def rows(root, name): return [l.split() for l in (root/"oxford-iiit-pet/annotations"/f"{name}.txt").read_text().splitlines() if l[0] != "#"]


def test_names_and_counts(pets):
    root, splits = pets
    labels = torch.cat([y for _, y in splits.values()])
    ours = {b: n for b, n in zip(BREEDS, labels.bincount().tolist())}
    theirs = Counter(r[0].rsplit("_", 1)[0] for r in rows(root, "list") if r[2] == "1")
    assert set(theirs) == set(BREEDS[:12]) and {b: ours[b] for b in theirs} == dict(theirs)
    assert sum(theirs.values()) == 2371 and ours["Other"] == 4978
    assert [len(y) for _, y in splits.values()] == [3680, 3669]
    assert [int((y < 12).sum()) for _, y in splits.values()] == [1188, 1183]


def test_the_twins_stay_out_of_training(pets):
    root, _ = pets
    train = {r[0] for r in rows(root, "trainval")}
    assert not train & {r[0] for r in rows(root, "test")}
    pairs = "Egyptian_Mau 138 219 Egyptian_Mau 186 6 British_Shorthair 160 278 British_Shorthair 186 271 Bombay 146 82 Abyssinian 151 99".split()
    twins = {f"{b}_{n}" for b, *two in zip(pairs[::3], pairs[1::3], pairs[2::3]) for n in two} & train
    labels = load_pets(root, "trainval", SIZE)[1]
    assert len(twins) == 6 and len(labels) == 3680 - 6 and (labels < 12).sum() == 1182
    assert len(load_pets(root, "test", SIZE)[1]) == 3669 and (load_pets(root, "test", SIZE, dogs=False)[1] < 12).all()


@pytest.mark.parametrize("split, index", [("trainval", 0), ("trainval", 1700), ("test", 3000)])
def test_a_picture_is_the_centre_square_of_its_file(pets, split, index):
    root, splits = pets
    name = rows(root, split)[index][0]
    image = Image.open(root/"oxford-iiit-pet/images"/f"{name}.jpg").convert("RGB")
    side = min(image.size); left, top = (image.width - side)//2, (image.height - side)//2
    truth = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    ours = splits[split][0][index].permute(1, 2, 0)
    assert ours.shape == (SIZE, SIZE, 3) and (ours.int() - torch.frombuffer(bytearray(truth.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3)).abs().max() <= 1


def test_the_cache_is_quick_and_the_same(pets):
    root, splits = pets
    start = time.perf_counter()
    again = load_pets(root, "test", SIZE, twins=True)
    assert time.perf_counter() - start < 3 and all(torch.equal(a, b) for a, b in zip(again, splits["test"]))


def test_batches_are_equal_by_class(pets):
    cats = Cats(*pets[1]["trainval"], size=28)
    x, y = cats.batch(0, 130)
    assert x.shape == (130, 3, 28, 28) and y.bincount().tolist() == [10]*13 and to_uint8(x).float().std() > 20


def test_heads_are_cut_and_a_fifth_is_held_out(pets):
    root, _ = pets
    (train, y), (held, z) = (load_pets(root, split, SIZE, heads=True) for split in ("trainval", "test"))
    assert (torch.cat([y, z]) < 12).sum() == 1181 and .15 < (z < 12).sum()/1181 < .25 and set(z.tolist()) == set(range(13))
    name, w, h, x0, y0, x1, y1 = (root/"oxford-iiit-pet/annotations/head_boxes.csv").read_text().splitlines()[1].split(",")
    image = Image.open(root/"oxford-iiit-pet/images"/f"{name}.jpg").convert("RGB")
    k, centre = image.width/int(w), ((int(x0) + int(x1))/2, (int(y0) + int(y1))/2)
    side = round(1.4*k*max(int(x1) - int(x0), int(y1) - int(y0)))
    left, top = (min(max(0, c*k - side/2), whole - side) for c, whole in zip(centre, image.size))
    truth = image.crop((round(left), round(top), round(left) + side, round(top) + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    truth = torch.frombuffer(bytearray(truth.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)
    assert min((p.int() - truth).abs().float().mean() for p in torch.cat([train, held])) < 3


def test_no_photograph_is_published():
    "Of runs on real cats only what the network drew is stored: no sheet with photographs, no page that shows them."
    kept = subprocess.run(["git", "ls-files", "outputs"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    real = [p for p in kept if p.startswith("outputs/pets")]
    assert not [p for p in real if Path(p).name in ("overview.png", "closest.png")]
    if not kept: pytest.skip("this is no git checkout")
    of_toys = {p.parent for p in ROOT.glob("outputs/*/config.json") if json.loads(p.read_text()).get("data") == "toy"}
    pages = [ROOT/p for p in kept if p.endswith(".ipynb") and not of_toys & set((ROOT/p).parents)]
    assert pages
    for page in pages:
        for cell in json.loads(page.read_text())["cells"]:
            shown = [o for o in cell.get("outputs", ()) if any(k.startswith("image/") for k in o.get("data", {}))]
            assert not shown or not any(w in "".join(cell["source"]) for w in ("breed_sheet(x1", "overview", "closest")), page
