"The fast path: no step waits for the device, compiled is the same, and importing costs next to nothing."
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tinycats.data import ImageDataset
from tinycats.dit import TinyDiT
from tinycats.flow import flow_loss
from tinycats.toy import TOY_CLASSES, toy_cats
from tinycats.trainer import TrainConfig, Trainer

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def make_data(device="cpu"):
    return ImageDataset(*toy_cats(52, 18, seed=2), TOY_CLASSES, size=16, device=device)


def make_trainer(folder, device="cpu", depth=2, dropout=.1, **settings):
    torch.manual_seed(0)
    model = TinyDiT(16, 8, dim=64, depth=depth, num_heads=2, dropout=dropout).to(device)
    defaults = dict(steps=12, batch_size=13, lr=1e-3, warmup_steps=2, ema_decay=[.9, .99], log_every=4,
                    sample_every=0, checkpoint_every=12, precision="fp32")
    return Trainer(model, make_data(device), folder, TrainConfig(**defaults | settings))


class Synchronisations(TorchDispatchMode):
    "Counts what makes the CPU wait for the device: numbers read, and tensors whose shape depends on them."
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.waiting:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait_for_the_device(tmp_path, precision):
    trainer = make_trainer(tmp_path, precision=precision)
    trainer.train_step()
    with Synchronisations() as found:
        for _ in range(3):
            trainer.train_step()
    assert not found.counts
    with Synchronisations() as found:
        float(trainer.means.sums[0, 1])
    assert found.counts == {"_local_scalar_dense": 1}  # it would have noticed


@GPU
def test_a_step_never_waits_for_the_gpu(tmp_path):
    trainer = make_trainer(tmp_path, "cuda", compile=False)
    trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_is_the_same(tmp_path):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler here, which torch.compile needs on a CPU")
    settings = dict(depth=1, dropout=0.)  # a compiled region has random numbers of its own
    eager = make_trainer(tmp_path/"eager", compile=False, **settings)
    compiled = make_trainer(tmp_path/"compiled", compile=True, **settings)
    eager_records, compiled_records = list(eager.fit()), list(compiled.fit())
    assert compiled.loss_fn is not flow_loss
    assert eager.loss_fn is flow_loss
    assert len(eager_records) == 3
    for a, b in zip(eager_records, compiled_records, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4*a["loss"]
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-3*a["grad_norm"]
    for p, q in zip(eager.ema[.9].parameters(), compiled.ema[.9].parameters()):
        assert_close(p, q, rtol=1e-3, atol=1e-5)


@GPU
def test_a_batch_is_the_same_on_a_gpu():
    on_cpu, on_gpu = make_data("cpu"), make_data("cuda")
    for step in range(5):
        for a, b in zip(on_cpu.batch(step, 40), on_gpu.batch(step, 40)):
            assert torch.equal(a, b.cpu())


IMPORTS = """
import time, torch, torch.optim.swa_utils, torch.nn.functional
start = time.perf_counter()
import tinycats.data, tinycats.dit, tinycats.flow, tinycats.ema, tinycats.checkpoint, tinycats.trainer
print(time.perf_counter() - start)
"""


def import_seconds():
    command = [sys.executable, "-c", IMPORTS]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout)


def test_importing_is_quick():
    "All leaves and the trainer together add no more than 0.3 s to PyTorch's own import: the best of three."
    assert min(import_seconds() for _ in range(3)) < .3
