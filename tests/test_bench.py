"The race: turns are taken in turn, every arm really runs, and what is written stays written."
import json, math, shutil, subprocess, sys
from pathlib import Path

import page, pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from tinycats import bench
from tinycats.dit import TinyDiT
from tinycats.params import ParameterError

NOTEBOOK = Path(__file__).resolve().parents[1]/"nbs"/"bench.ipynb"
TINY = dict(image_size=16, patch_size=8, dim=64, depth=2, num_heads=2)
PACKAGES = {"diffusers": "diffusers", "rectified-flow": "rectified_flow_pytorch"}


def need(arm):
    if (package := PACKAGES.get(arm.split()[0])): pytest.importorskip(package, reason=f"{package} is of the extra `bench`")


def test_arms_take_turns_and_medians_are_told(monkeypatch):
    calls, clock = [], [0.]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    takes = {"a": iter([9, 9, 1, 2, 6]), "b": iter([9, 9, 5, 5, 4])}        # two warm steps, three rounds

    def arm(name):
        def step(): calls.append(name); clock[0] += next(takes[name])
        return lambda: step
    times = bench.race({n: arm(n) for n in "ab"}, rounds=3)
    assert "".join(calls) == "aabb" + "ab"*3
    assert times == dict(a=dict(median=2, min=1, start=18), b=dict(median=5, min=4, start=18))


@pytest.mark.parametrize("takes,n", [(.001, 20), (.1, 5), (.8, 1)])
def test_a_turn_on_a_gpu_lasts_half_a_second(monkeypatch, takes, n):
    calls, clock = [], [0.]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    for name in ("synchronize", "empty_cache"): monkeypatch.setattr(torch.cuda, name, lambda: None)

    def step(): calls.append(1); clock[0] += takes
    assert bench.race({"a": lambda: step}, rounds=3, device="cuda")["a"]["median"] == pytest.approx(takes)
    assert len(calls) == 2 + 3*n


def test_every_race_compiles_for_its_own_size():
    shapes = []

    def backend(graph, inputs):
        shapes.extend(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))
        return graph.forward

    def double(x): return x*2
    for n in (4, 6, 9): bench.race({"a": lambda: (lambda f, x: lambda: f(x))(torch.compile(double, backend=backend), torch.ones(n))}, rounds=1)
    assert shapes == [(4,), (6,), (9,)] and all(type(s[0]) is int for s in shapes)


def test_too_many_versions_of_a_compiled_step_are_an_error():
    def step(x, n): return x*n
    asked, count = torch.compile(step, backend="eager", dynamic=False), iter(range(2, 50))
    with pytest.raises(Exception, match="recompile_limit"): bench.race({"a": lambda: lambda: asked(torch.ones(next(count)), 1)}, rounds=20)


@pytest.mark.parametrize("arm", ["plain", "diffusers", "rectified-flow"])
def test_peers_take_finite_steps(arm):
    need(arm)
    make = {"plain": bench.plain, "diffusers": bench.diffusers, "rectified-flow": bench.rectified_flow}[arm]
    kinds = [dict(), dict(dtype=torch.bfloat16)] + ([dict(best=True)] if arm == "plain" else [])
    for kw in kinds:
        step = make(TINY, 4, **kw)
        losses = [step() for _ in range(2)]
        assert all(math.isfinite(loss) for loss in losses)
        assert all(torch.is_tensor(loss) and not loss.requires_grad for loss in losses) or (arm == "plain" and "best" not in kw)   # no question to the device


def test_ours_takes_finite_steps_and_never_smaller_ones(monkeypatch):
    step = bench.ours(TINY, 4)
    step()
    n, loss = step.__self__.sums[0, :2].tolist()
    assert n == 1 and math.isfinite(loss) and loss > 0
    step.__self__.micro = 2                                                 # as after running out of memory
    with pytest.raises(torch.OutOfMemoryError, match="batch 4 .* 2 at a time"): step()


def test_nobody_compiles_unless_all_may(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *a, **kw: pytest.fail("compiled"))
    monkeypatch.setattr("tinycats.trainer.can_compile", lambda device: True)
    arms = bench.train_arms(TINY, 4, compiled=False)
    assert set(arms) == {n for n in ("tinycats", "tinycats 32", "plain 32", "plain", "diffusers 32", "diffusers", "rectified-flow 32", "rectified-flow")
                         if n.split()[0] not in bench.absent()}
    arms["tinycats"](); arms["plain"]()


@pytest.mark.parametrize("arm", ["tinycats", "tinycats 32", "plain 32", "diffusers 32", "diffusers"])
def test_sampling_arms_draw(arm):
    need(arm)
    pictures = bench.sample_arms(TINY, compiled=False, num_steps=2, n=3)[arm]()()
    assert pictures.shape == (3, 3, 16, 16) and pictures.isfinite().all()


@pytest.mark.parametrize("size", [TINY, bench.SIZES["demo"], bench.SIZES["full"] | dict(depth=2)])
def test_flops_are_those_pytorch_counts(size):
    net, s = TinyDiT(**size), size["image_size"]
    with FlopCounterMode(display=False) as counter: net(torch.randn(2, 3, s, s), torch.rand(2), torch.zeros(2, dtype=torch.long))
    assert counter.get_total_flops()*3 == pytest.approx(2*bench.flops(**size), rel=1e-6)


def test_memory_is_measured_elsewhere():
    ballast = torch.ones(2**28)                                             # a gigabyte here must not show there
    found = bench.peak_memory("tinycats 32", "demo", 16, compiled=False)
    weights = sum(p.numel() for p in TinyDiT(**bench.SIZES["demo"]).parameters())*20/2**20
    assert ballast.nbytes == 2**30 and weights < found < 1000


def test_what_fails_alone_says_why():
    assert bench.alone("print(1)") == "1\n"
    with pytest.raises(RuntimeError, match="^KeyError: 'no such arm'$"): bench.alone("{}['no such arm']")
    with pytest.raises(RuntimeError, match="ended with -9, perhaps for want of memory"): bench.alone("import os; os.kill(os.getpid(), 9)")


def test_ratios_are_theirs_over_ours():
    table = lambda **t: {k.replace("_", " "): dict(median=v) for k, v in t.items()}
    train = table(tinycats=1, tinycats_compiled=.5, tinycats_32=2, plain_32=3, plain=2, plain_32_compiled=2.5)
    assert bench.ratios(train, table(tinycats=1)) == dict(train_vs_seed=3, train_vs_seed_equal=1.25)
    train |= table(diffusers=4, diffusers_32=5)
    found = bench.ratios(train, table(tinycats=1, tinycats_32=2, diffusers=1.5, diffusers_32=3))
    assert found == dict(train_vs_seed=3, train_vs_seed_equal=1.25, train_vs_diffusers=8, train_vs_diffusers_equal=2.5,
                         sample_vs_diffusers=1.5, sample_vs_diffusers_equal=1.5)


def test_a_cpu_and_a_gpu_share_a_file(tmp_path):
    path = tmp_path/"new"/"bench.json"
    assert bench.read_report(path) == {}
    cpu, gpu = dict(command="make bench", cpu_train_vs_seed=2., train={"a": 1}), dict(command="make bench", gpu_mfu=.3, train={"a": 2})
    bench.write_report(path, cpu)
    bench.write_report(path, gpu, "cuda")
    assert json.loads(path.read_text()) == cpu | dict(gpu=dict(command="make bench", train={"a": 2}), gpu_mfu=.3)
    bench.write_report(path, dict(command="make bench quick=1", load=3))                   # a new run replaces the old of its kind
    assert bench.read_report(path) == dict(command="make bench quick=1", load=3, gpu=dict(command="make bench", train={"a": 2}), gpu_mfu=.3)
    bench.write_report(path, dict(gpu_steps_per_s=9), "cuda")
    assert bench.read_report(path) == dict(command="make bench quick=1", load=3, gpu={}, gpu_steps_per_s=9)
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match="bench.json is not JSON .*: move it away"): bench.write_report(path, cpu)
    assert path.read_text() == "{"


def test_without_a_compiler_nobody_compiles(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    assert not bench.compiles()
    monkeypatch.setattr(bench.shutil, "which", lambda name: "/bin/" + name if name == "clang++" else None)
    assert bench.compiles()


@pytest.mark.parametrize("device,words", [("mps", "choose auto, cpu or cuda"), ("cuda", "finds no CUDA GPU here")])
def test_a_device_that_cannot_be_measured_is_refused_in_a_line(monkeypatch, tmp_path, device, words):
    import matplotlib.pyplot as plt
    monkeypatch.setattr(plt, "show", plt.show)                              # page.main puts its own there
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match=f"^device='{device}': .*{words}") as e:
        page.main(NOTEBOOK, f"device={device}", f"out={tmp_path}")
    assert "\n" not in str(e.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize("quick,meant", [("", False), ("0", False), ("no", False), ("1", True), ("yes", True)])
def test_make_knows_what_quick_means(quick, meant):
    make = shutil.which("make")
    if not make: pytest.skip("no make here")
    done = subprocess.run([make, "-n", "bench", f"quick={quick}"], cwd=NOTEBOOK.parents[1], capture_output=True, text=True)
    assert f"-p quick {meant} " in done.stdout, done.stderr
