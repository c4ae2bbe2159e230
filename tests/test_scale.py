"Larger networks and larger data: the same steps with less memory, and with images that lie on a disk."
import json
import shutil
import sys
from pathlib import Path

import page
import pytest
import torch
from torch.testing import assert_close

from tinycats import dit
from tinycats.checkpoint import load_latest
from tinycats.data import ImageDataset
from tinycats.dit import TinyDiT
from tinycats.params import NETWORK_SIZES
from tinycats.prefetch import Prefetcher, load_dataset, open_images, write_images
from tinycats.toy import TOY_CLASSES, toy_cats
from tinycats.trainer import TrainConfig, Trainer

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
TINY = dict(image_size=16, patch_size=8, dim=64, depth=2, num_heads=2)


def make_data(image_size=16, images=52, **options):
    return ImageDataset(*toy_cats(images, image_size, seed=2), TOY_CLASSES, seed=0, **options)


def make_trainer(folder, data=None, size=TINY, checkpoint_activations=False, dropout=.1, **settings):
    torch.manual_seed(0)
    model = TinyDiT(**size, dropout=dropout, checkpoint_activations=checkpoint_activations)
    defaults = dict(steps=12, batch_size=13, lr=1e-3, warmup_steps=2, ema_decay=[.9], log_every=1,
                    sample_every=0, checkpoint_every=6, precision="fp32")
    data = data or make_data(size["image_size"])
    return Trainer(model, data, folder, TrainConfig(**defaults | settings))


def final_state(trainer):
    "Losses of the run, and its last checkpoint."
    losses = [record["loss"] for record in trainer.fit()]
    return losses, load_latest(trainer.folder/"checkpoints")[1]


def assert_same_run(one, other):
    assert one[0] == other[0]
    for part in ("model", "ema", "optimizer"):
        assert_close(one[1][part], other[1][part], rtol=0, atol=0)


# -- Activation checkpointing ------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    dict(), dict(micro_batch=5), dict(precision="bf16")], ids=["fp32", "micro_batch", "bf16"])
def test_a_run_with_activation_checkpointing_is_the_same_run(tmp_path, settings):
    plain = final_state(make_trainer(tmp_path/"plain", **settings))
    checkpointed = final_state(make_trainer(tmp_path/"other", checkpoint_activations=True, **settings))
    assert len(plain[0]) == 12
    assert_same_run(plain, checkpointed)


def test_a_run_may_begin_to_checkpoint_its_activations(tmp_path):
    plain = final_state(make_trainer(tmp_path/"plain"))
    trainer = make_trainer(tmp_path/"stopped")
    records = trainer.fit()
    while trainer.step < 7:
        next(records)
    records.close()
    checkpointed = make_trainer(tmp_path/"stopped", checkpoint_activations=True)
    losses, state = final_state(checkpointed)
    assert_same_run((plain[0][-len(losses):], plain[1]), (losses, state))


def need_compiler():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler here, which torch.compile needs on a CPU")


def test_compiled_and_checkpointed_is_the_same(tmp_path):
    "Also with CUDA graphs, where there is no CUDA."
    need_compiler()
    settings = dict(size=TINY | dict(depth=1), dropout=0., steps=4)
    eager, _ = final_state(make_trainer(tmp_path/"eager", **settings))
    settings |= dict(checkpoint_activations=True, compile=True, compile_mode="reduce-overhead")
    compiled, _ = final_state(make_trainer(tmp_path/"compiled", **settings))
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_dropout_of_a_compiled_checkpointed_network_is_repeated():
    "If the second pass dropped other numbers than the first, the gradient would not be that of the loss."
    need_compiler()
    torch.manual_seed(0)
    model = TinyDiT(**TINY | dict(depth=1), dropout=.5, checkpoint_activations=True)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.2)
    compiled = torch.compile(model)
    weight = model.blocks[0].attn.proj.weight  # its gradient passes through the dropout of attention and MLP
    x, t, y = torch.randn(4, 3, 16, 16), torch.full((4,), .3), torch.arange(4)

    def loss_at(weights):
        "The loss with other weights, and always the same random numbers."
        with torch.no_grad():
            weight.copy_(weights)
        torch.manual_seed(3)
        return compiled(x, t, y).square().mean()

    start = weight.detach().clone()
    loss_at(start).backward()
    step = 1e-2*weight.grad/weight.grad.norm()
    slope = (loss_at(start + step) - loss_at(start - step)).item()/2e-2
    assert slope == pytest.approx(weight.grad.norm().item(), rel=.02)


def test_the_training_page_builds_a_named_size_and_checkpoints_its_activations(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.setattr(plt, "show", plt.show)  # page.main replaces it
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("TINYCATS_PAGE", str(tmp_path))
    monkeypatch.setitem(NETWORK_SIZES, "B", dict(dim=32, depth=3, num_heads=2))  # the real one takes minutes
    recomputed = []

    def checkpoint(block, *args, **kwargs):
        recomputed.append(block)
        return dit.torch.utils.checkpoint.checkpoint(block, *args, **kwargs)

    monkeypatch.setattr(dit, "checkpoint", checkpoint)
    monkeypatch.chdir(tmp_path)
    Path("settings.ini").touch()
    params = dict(run="sized", size="B", checkpoint_activations=True, steps=2, warmup_steps=1, image_size=16,
                  toy_images=52, samples=1, num_steps=2, precision="fp32")
    page.main(Path(__file__).parents[1]/"nbs"/"train.ipynb", *(f"{k}={v}" for k, v in params.items()))
    config = json.loads((tmp_path/"outputs/sized/config.json").read_text())
    assert [config[name] for name in ("size", "dim", "depth", "num_heads")] == ["B", 32, 3, 2]
    assert len(recomputed) == 2*3  # in two steps of three blocks; none while pictures are drawn


# -- Larger pictures ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("image_size, patch_size", [(256, 16), (64, 4)])
def test_256_tokens_train(tmp_path, image_size, patch_size):
    "256 px at patch 16 and 64 px at patch 4: a position for each token, and a loss that falls."
    size = dict(image_size=image_size, patch_size=patch_size, dim=96, depth=2, num_heads=3)
    trainer = make_trainer(tmp_path, data=make_data(image_size, images=26), size=size, steps=30, lr=2e-3)
    positions = trainer.model.pos_embed
    assert positions.shape == (256, 96)
    assert torch.cdist(positions, positions).fill_diagonal_(9).min() > .1
    losses, _ = final_state(trainer)
    assert sum(losses[-5:]) < .8*sum(losses[:5])


# -- Switches of the training step -------------------------------------------------------------------------

def test_the_mode_reaches_the_compiler(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, mode=None: seen.append(mode) or f)
    monkeypatch.setattr("tinycats.trainer._missing_for_compile", lambda device: [])
    for mode in ("default", "reduce-overhead"):
        make_trainer(tmp_path, compile=True, compile_mode=mode)
    make_trainer(tmp_path, compile_mode="reduce-overhead")  # a CPU does not compile by itself
    assert seen == ["default", "reduce-overhead"]


def test_an_average_that_moves_every_third_step_resumes(tmp_path):
    whole = final_state(make_trainer(tmp_path/"whole", ema_every=3))
    trainer = make_trainer(tmp_path/"stopped", ema_every=3)
    records = trainer.fit()
    while trainer.step < 7:  # in the middle of three steps
        next(records)
    records.close()
    losses, state = final_state(make_trainer(tmp_path/"stopped", ema_every=3))
    assert_same_run((whole[0][-len(losses):], whole[1]), (losses, state))
    with pytest.raises(ValueError, match="ema_every is 1, but the run in .* began with 3"):
        final_state(make_trainer(tmp_path/"stopped"))


# -- Data larger than the device ---------------------------------------------------------------------------

@pytest.mark.parametrize("ahead", [1, 2])
def test_a_run_from_a_memory_mapped_file_is_the_same_run(tmp_path, ahead):
    images, labels = toy_cats(52, 18, seed=2)
    options = dict(classes=TOY_CLASSES, size=16, seed=0)
    write_images(tmp_path/"cats.npy", images.split(10), 52)

    def from_disk(where="host"):
        return load_dataset(open_images(tmp_path/"cats.npy"), labels, where=where, ahead=ahead, **options)

    assert isinstance(from_disk(), Prefetcher)
    whole = final_state(make_trainer(tmp_path/"device", ImageDataset(images, labels, **options)))
    trainer = make_trainer(tmp_path/"host", from_disk())
    records = trainer.fit()
    while trainer.step < 7:
        next(records)
    records.close()
    losses, state = final_state(make_trainer(tmp_path/"host", from_disk()))
    assert_same_run((whole[0][-len(losses):], whole[1]), (losses, state))


@GPU
def test_prefetched_batches_on_a_gpu_are_those_of_images_on_it():
    images, labels = toy_cats(52, 18, seed=2)
    for augment_prob in (0, .5):
        options = dict(classes=TOY_CLASSES, size=16, augment_prob=augment_prob)
        on_gpu = load_dataset(images, labels, "cuda", where="device", **options)
        prefetched = load_dataset(images, labels, "cuda", where="host", ahead=2, **options)
        for step in range(50):
            for tensor, expected in zip(prefetched.batch(step, 40), on_gpu.batch(step, 40), strict=True):
                assert tensor.device.type == "cuda"
                assert torch.equal(tensor, expected)
