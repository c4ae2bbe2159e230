"""The scores against other implementations, and on photographs: what is worse must score worse, and a copy
must be found."""
import pytest
import torch
import torch.nn.functional as F
from helpers import shared
from PIL import Image

from tinycats.core import to_float
from tinycats.data import BREEDS, ImageDataset
from tinycats.metrics import (class_matched, detect_copies, extract_features, frechet_distance,
                              high_frequency, high_frequency_ratio, inception, kid, linear_probe,
                              load_extractor, precision_recall)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_images(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)


class MeanColours(torch.nn.Module):
    "24 features: the colours of a 4 x 2 version."
    num_features = 24

    def forward(self, x):
        return F.adaptive_avg_pool2d(x.float(), (4, 2)).flatten(1)/64


@pytest.mark.filterwarnings("ignore:Metric")
@pytest.mark.parametrize("n, seed", [(200, 0), (16, 5)])
def test_torchmetrics_agrees(n, seed):
    "FID and KID as torchmetrics computes them, with more images than features and with fewer."
    fid = pytest.importorskip("torchmetrics.image.fid")
    kernel = pytest.importorskip("torchmetrics.image.kid")
    a = random_images(n, seed)
    b = (random_images(n, seed + 1)*.9 + 10).byte()
    features = [extract_features(MeanColours(), images) for images in (a, b)]

    theirs = fid.FrechetInceptionDistance(feature=MeanColours()).set_dtype(torch.float64)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    ours = frechet_distance(*features)
    assert ours > .01
    assert abs(ours - theirs.compute().item()) < 1e-3*ours + 1e-6

    theirs = kernel.KernelInceptionDistance(feature=MeanColours(), subsets=1, subset_size=n)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    mean = kid(*features, subsets=1)[0]
    assert abs(mean - theirs.compute()[0].item()) < 1e-3*abs(mean) + 1e-5


def test_more_dimensions_than_images():
    "With 30 images in 1,280 dimensions nothing turns negative or imaginary; a shift counts in full."
    a = random(30, 1280).double()
    b = random(40, 1280, seed=1).double()
    assert frechet_distance(a, a) < 1e-6
    assert frechet_distance(a, a + .1) == pytest.approx(12.8, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, b) > 1000
    assert frechet_distance(a*0, a*0) == 0


@pytest.mark.parametrize("measure, arguments, words", [
    (frechet_distance, (random(9, 4), random(9, 5)), "(9, 5)"),
    (frechet_distance, (random(1, 4), random(9, 4)), "at least 2"),
    (kid, (random(9, 4)*torch.inf, random(9, 4)), "not finite"),
    (precision_recall, (random(9, 4), random(8, 4)), "9 real and 8 generated"),
    (precision_recall, (random(3, 4), random(3, 4)), "at least 4")])
def test_refused_in_one_line(measure, arguments, words):
    with pytest.raises(ValueError) as e:
        measure(*arguments)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_on_a_gpu():
    "Images and labels on a GPU give what they give on the CPU."
    x = torch.rand(39, 3, 32, 32)*2 - 1
    labels = torch.arange(39) % 13
    assert high_frequency(x.cuda()).cpu() == pytest.approx(high_frequency(x), rel=1e-4)
    chosen = class_matched(labels.cuda(), labels[:13].cuda()).cpu()
    assert torch.equal(chosen, class_matched(labels, labels[:13]))
    on_gpu = extract_features(MeanColours(), x.cuda(), device="cuda")
    assert torch.allclose(on_gpu, extract_features(MeanColours(), x))


def test_inception_without_a_network(tmp_path, monkeypatch):
    "Whatever is missing, the package or the network, it is one line."
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError) as e:
        inception()
    assert str(e.value).startswith("no FID: ")
    assert "\n" not in str(e.value)


def read_photographs(pets, split):
    "Ten photographs of each cat breed, (120, 3, 144, 144) uint8, and their labels."
    lines = (pets/"annotations"/f"{split}.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line[0] != "#"]
    cats = [row[0] for row in rows if row[2] == "1"]
    images = []
    for breed in BREEDS[:12]:
        for name in [name for name in cats if name.rsplit("_", 1)[0] == breed][:10]:
            image = Image.open(pets/"images"/f"{name}.jpg").convert("RGB")
            side = min(image.size)
            left = (image.width - side)//2
            top = (image.height - side)//2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((144, 144), Image.Resampling.BICUBIC)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            images.append(pixels.view(144, 144, 3).permute(2, 0, 1))
    return torch.stack(images), torch.arange(12).repeat_interleave(10)


@pytest.fixture(scope="module")
def photographs():
    "120 training and 120 held-out cats of all breeds, and the features of a MobileNet."
    pets = shared("oxford-iiit-pet")
    folder = shared("judge")
    net = load_extractor(str(folder/"featnet.py") + ":load", str(folder/"mobilenet_v2.safetensors"))
    return read_photographs(pets, "trainval"), read_photographs(pets, "test"), net


def downscale(images):
    return F.interpolate(to_float(images), (128, 128), mode="area")


def mean_kid(a, b):
    return kid(a, b)[0]


def degrade(images):
    "Three ways to make images worse."
    kernel = torch.ones(3, 1, 5, 5)/25
    noise = random(*images.shape)
    return dict(blurred=F.conv2d(F.pad(images, (2,)*4, mode="reflect"), kernel, groups=3),
                noisy=(images + .2*noise).clamp(-1, 1), pure_noise=noise.clamp(-1, 1)[:60])


def test_photographs_in_order(photographs):
    "Real, blurred and noisy, pure noise: every distance orders them so; fine detail tells blur from noise."
    (train, labels), (test, _), net = photographs
    train = downscale(train)
    test = downscale(test)
    real = extract_features(net, test, 4)
    other = extract_features(net, train, 4)
    worse = degrade(train)
    features = {name: extract_features(net, images, 4) for name, images in worse.items()}
    for distance in (frechet_distance, mean_kid):
        found = {name: distance(some, real) for name, some in features.items()}
        reference = distance(other, real)
        for name in ("blurred", "noisy"):
            assert reference < .8*found[name], (reference, found)
            assert found[name] < .8*found["pure_noise"], (reference, found)
    assert frechet_distance(real, real) < 1e-6
    assert kid(real, real)[0] < 0
    assert precision_recall(real, other)[0] > .5
    assert precision_recall(real, features["blurred"])[0] < .5
    assert .9 < high_frequency_ratio(train, test) < 1.1
    assert high_frequency_ratio(worse["blurred"], test) < .5
    assert high_frequency_ratio(worse["noisy"], test) > 1.3

    predicted = linear_probe(other, labels, 12)(real)
    shuffled = labels[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    assert (predicted == labels).double().mean() > .5  # ten images a breed to learn from
    assert (predicted == shuffled).double().mean() < .2


def test_copied_photographs_are_found(photographs):
    "Training crops and mirrors at random; a copy of that, dimmed and noisy, is a copy."
    (train, _), (test, _), _ = photographs
    names = [str(i) for i in range(120)]
    crops, _ = ImageDataset(train, torch.arange(120), names, size=128).batch(0, 120)
    copied = (.8*crops + .1 + .1*random(*crops.shape)).clamp(-1, 1)
    test = downscale(test)
    train = downscale(train)
    found = detect_copies(copied, test, train, quantile=.02)
    assert found["rate"] > .95
    assert len(found["nearest"].unique()) > 110
    for others in (test, random(20, 3, 128, 128), torch.zeros(20, 3, 128, 128)):
        assert detect_copies(others, test, train, quantile=.02)["rate"] < .03
