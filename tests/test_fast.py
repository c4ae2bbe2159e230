"The fast path: nothing asks the device for an answer, compiled is the same, and importing costs next to nothing."
import os, shutil, subprocess, sys
from collections import Counter

import pytest, torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from tinycats.data import Cats, toy_cats
from tinycats.dit import TinyDiT
from tinycats.trainer import Trainer

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def trainer(folder, device="cpu", depth=2, **kw):
    torch.manual_seed(0)
    model = TinyDiT(16, 8, dim=64, depth=depth, num_heads=2, dropout=.1).to(device)
    cats = Cats(*toy_cats(52, 18, seed=2), size=16, device=device)
    return Trainer(model, cats, folder, **dict(steps=12, batch_size=13, lr=1e-3, warmup_steps=2, ema_decay=(.9, .99), log_every=4, sample_every=0,
                                               checkpoint_every=12, precision="fp32") | kw)


class Questions(TorchDispatchMode):
    "Counts what makes the CPU wait for the device: numbers read, and tensors whose shape depends on them."
    asking = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self): super().__init__(); self.asked = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.asking: self.asked[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_asks_the_device_nothing(tmp_path, precision):
    t = trainer(tmp_path, precision=precision)
    t.take_step()
    with Questions() as q:
        for _ in range(3): t.take_step()
    assert not q.asked
    with Questions() as q: float(t.sums[0, 1])
    assert q.asked == {"_local_scalar_dense": 1}                    # it would have noticed


@GPU
def test_a_step_never_waits_for_the_gpu(tmp_path):
    t = trainer(tmp_path, "cuda", compile=False)
    t.take_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3): t.take_step()
    finally: torch.cuda.set_sync_debug_mode("default")


def test_compiled_is_the_same(tmp_path):
    if not (shutil.which("g++") or shutil.which("clang++")): pytest.skip("no C++ compiler here, which torch.compile needs on a CPU")
    plain, fast = (trainer(tmp_path/name, depth=1, compile=compile) for name, compile in (("plain", False), ("fast", True)))
    for t in (plain, fast): t.model.dropout = 0.
    for t in (plain, fast):
        for block in t.model.blocks: block.dropout = 0.             # a compiled region draws its own
    records = [list(t.fit()) for t in (plain, fast)]
    assert fast.compile and not plain.compile and len(records[0]) == 3
    for a, b in zip(*records):
        assert abs(a["loss"] - b["loss"]) < 1e-4*a["loss"] and abs(a["grad_norm"] - b["grad_norm"]) < 1e-3*a["grad_norm"]
    for p, q in zip(plain.ema[.9].parameters(), fast.ema[.9].parameters()): assert_close(p, q, rtol=1e-3, atol=1e-5)


@GPU
def test_a_batch_is_the_same_on_a_gpu():
    here, there = (Cats(*toy_cats(52, 18, seed=2), size=16, device=d) for d in ("cpu", "cuda"))
    for step in range(5):
        for a, b in zip(here.batch(step, 40), there.batch(step, 40)): assert torch.equal(a, b.cpu())


def test_importing_is_quick():
    "All leaves and the trainer together add no more than 0.3 s to PyTorch's own import: the best of five."
    code = ("import time, torch, torch.optim.swa_utils, torch.nn.functional; begun = time.perf_counter(); import tinycats.data, tinycats.dit, tinycats.flow, tinycats.ema, "
            "tinycats.checkpoint, tinycats.trainer; print(time.perf_counter() - begun)")
    run = lambda: float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ).stdout)
    assert min(run() for _ in range(5)) < .3
