"The figures against other people's, and on photographs: what is worse must look worse, and a copy must be found."
import pytest, torch, torch.nn.functional as F
from helpers import shared
from PIL import Image
from tinycats.data import BREEDS, Cats, to_float
from tinycats.metrics import (copies, features, fit_probe, frechet_distance, high_frequency, high_frequency_ratio, inception, kid, load_features, matched, precision_recall)


def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:Metric")
def test_torchmetrics_agrees():
    "FID and KID as torchmetrics computes them, on the same features; with more pictures than features and with fewer."
    fid, kernel = (pytest.importorskip(f"torchmetrics.image.{n}") for n in ("fid", "kid"))

    class Colours(torch.nn.Module):
        num_features = 24
        def forward(self, x): return F.adaptive_avg_pool2d(x.float(), (4, 2)).flatten(1)/64
    for n, seed in ((200, 0), (16, 5)):
        a, b = (torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(s)) for s in (seed, seed + 1))
        b = (b*.9 + 10).byte()
        theirs = fid.FrechetInceptionDistance(feature=Colours()).set_dtype(torch.float64)
        theirs.update(a, real=True); theirs.update(b, real=False)
        ours = frechet_distance(features(Colours(), a), features(Colours(), b))
        assert ours > .01 and abs(ours - theirs.compute().item()) < 1e-3*ours + 1e-6
        theirs = kernel.KernelInceptionDistance(feature=Colours(), subsets=1, subset_size=n)
        theirs.update(a, real=True); theirs.update(b, real=False)
        mean = kid(features(Colours(), a), features(Colours(), b), subsets=1)[0]
        assert abs(mean - theirs.compute()[0].item()) < 1e-3*abs(mean) + 1e-5


def test_more_dimensions_than_pictures():
    "With 30 pictures in 1,280 dimensions nothing turns negative or imaginary, and a shift still counts in full."
    a, b = random(30, 1280).double(), random(40, 1280, seed=1).double()
    assert frechet_distance(a, a) < 1e-6 and frechet_distance(a, a + .1) == pytest.approx(12.8, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a)) and frechet_distance(a, b) > 1000
    assert frechet_distance(a*0, a*0) == 0


@pytest.mark.parametrize("measure, arguments, words", [
    (frechet_distance, (random(9, 4), random(9, 5)), "(9, 5)"), (frechet_distance, (random(1, 4), random(9, 4)), "at least 2"),
    (kid, (random(9, 4)*torch.inf, random(9, 4)), "not finite"), (precision_recall, (random(9, 4), random(8, 4)), "9 real and 8 drawn"),
    (precision_recall, (random(3, 4), random(3, 4)), "at least 4")])
def test_refused_in_one_line(measure, arguments, words):
    with pytest.raises(ValueError) as e: measure(*arguments)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_away_from_the_cpu():
    "Where there is a GPU: pictures and labels there give what they give here."
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    x, labels = torch.rand(39, 3, 32, 32)*2 - 1, torch.arange(39) % 13
    assert high_frequency(x.cuda()).cpu() == pytest.approx(high_frequency(x), rel=1e-4)
    assert torch.equal(matched(labels.cuda(), labels[:13].cuda()).cpu(), matched(labels, labels[:13]))
    eyes = lambda pictures: pictures.float().mean((2, 3))
    assert torch.allclose(features(eyes, x.cuda(), device="cuda"), features(eyes, x))


def test_inception_without_a_network(tmp_path, monkeypatch):
    "Whatever is missing, the package or the network, it is one line."
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError) as e: inception()
    assert str(e.value).startswith("no FID: ") and "\n" not in str(e.value)


@pytest.fixture(scope="module")
def photographs():
    "120 training and 120 held-out cats of all breeds, at 128 px, and the features of a MobileNet."
    pets, judge = shared("oxford-iiit-pet"), shared("judge")
    def read(split):
        rows = [l.split() for l in (pets/"annotations"/f"{split}.txt").read_text().splitlines() if l[0] != "#"]
        names = [n for b in BREEDS[:12] for n in [r[0] for r in rows if r[2] == "1" and r[0].rsplit("_", 1)[0] == b][:10]]
        squares = []
        for name in names:
            image = Image.open(pets/"images"/f"{name}.jpg").convert("RGB"); s = min(image.size)
            left, top = (image.width - s)//2, (image.height - s)//2
            small = image.crop((left, top, left + s, top + s)).resize((144, 144), Image.Resampling.BICUBIC)
            squares.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(144, 144, 3).permute(2, 0, 1))
        return torch.stack(squares), torch.arange(12).repeat_interleave(10)
    net = load_features(str(judge/"featnet.py") + ":load", str(judge/"mobilenet_v2.safetensors"))
    return read("trainval"), read("test"), lambda x: features(net, x, 4)


def whole(pictures): return F.interpolate(to_float(pictures), (128, 128), mode="area")


def test_photographs_in_order(photographs):
    "Real, blurred and noisy, pure noise: every distance orders them so, and fine detail tells blur from noise."
    (train, labels), (test, _), eyes = photographs
    train, test = whole(train), whole(test)
    real, others = eyes(test), eyes(train)
    kernel = torch.ones(3, 1, 5, 5)/25
    worse = dict(blurred=F.conv2d(F.pad(train, (2,)*4, mode="reflect"), kernel, groups=3), noisy=(train + .2*random(*train.shape)).clamp(-1, 1), nothing=random(*train.shape).clamp(-1, 1)[:60])
    seen = {name: eyes(x) for name, x in worse.items()}
    for distance in (frechet_distance, lambda a, b: kid(a, b)[0]):
        floor, blurred, noisy, nothing = (distance(x, real) for x in (others, *seen.values()))
        assert floor < .8*blurred and floor < .8*noisy and max(blurred, noisy) < .8*nothing, (floor, blurred, noisy, nothing)
    assert frechet_distance(real, real) < 1e-6 and kid(real, real)[0] < 0
    assert precision_recall(real, others)[0] > .5 > precision_recall(real, seen["blurred"])[0]
    sharp, soft, rough = (high_frequency_ratio(x, test) for x in (train, worse["blurred"], worse["noisy"]))
    assert .9 < sharp < 1.1 and soft < .5 and rough > 1.3

    probe = fit_probe(others, labels)
    right, shuffled = ((probe(real) == y).double().mean() for y in (labels, labels[torch.randperm(120, generator=torch.Generator().manual_seed(0))]))
    assert right > .5 and shuffled < .2                                                    # ten pictures a breed to learn from


def test_stolen_photographs_are_found(photographs):
    "What training shows is cut out at random and mirrored; a copy of that, dimmed and noisy, is a copy."
    (train, labels), (test, _), _ = photographs
    cut, _ = Cats(train, torch.arange(120), size=128, num_classes=120).batch(0, 120)
    stolen = (.8*cut + .1 + .1*random(*cut.shape)).clamp(-1, 1)
    found = copies(stolen, whole(test), whole(train), quantile=.02)
    assert found["rate"] > .95 and len(found["nearest"].unique()) > 110
    for honest in (whole(test), random(20, 3, 128, 128), torch.zeros(20, 3, 128, 128)): assert copies(honest, whole(test), whole(train), quantile=.02)["rate"] < .03
