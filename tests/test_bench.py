"""The benchmark: arms take turns, every arm really runs, and what is written stays written."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import page
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinycats.dit import TinyDiT
from tinycats.params import ParameterError

NOTEBOOK = Path(__file__).resolve().parents[1]/"nbs"/"bench.ipynb"
TINY = dict(image_size=16, patch_size=8, dim=64, depth=2, num_heads=2)
bench = page.load_definitions(NOTEBOOK)
STEPS = {"plain": bench.plain_step, "diffusers": bench.diffusers_step,
         "rectified-flow": bench.rectified_flow_step}


def need(arm):
    "Skip where the package of an arm is not installed."
    package = bench.PACKAGES.get(arm.split()[0])
    if package:
        pytest.importorskip(package, reason=f"{package} is of the extra `bench`")


class Clock:
    "A clock that only the steps under test move."
    def __init__(self, monkeypatch):
        self.now = 0.
        self.calls = []
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)

    def arm(self, name, durations):
        durations = iter(durations)

        def step():
            self.calls.append(name)
            self.now += next(durations)
        return lambda: step


def test_arms_take_turns_and_medians_are_reported(monkeypatch):
    clock = Clock(monkeypatch)
    arms = {"a": clock.arm("a", [9, 9, 1, 2, 6]), "b": clock.arm("b", [9, 9, 5, 5, 4])}
    times = bench.interleaved_timing(arms, rounds=3)  # after two warm-up steps
    assert "".join(clock.calls) == "aabb" + "ab"*3
    assert times == dict(a=dict(median=2, min=1, start=18), b=dict(median=5, min=4, start=18))


@pytest.mark.parametrize("seconds, n", [(.001, 20), (.1, 5), (.8, 1)])
def test_a_turn_on_a_gpu_lasts_half_a_second(monkeypatch, seconds, n):
    clock = Clock(monkeypatch)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    times = bench.interleaved_timing({"a": clock.arm("a", [seconds]*100)}, rounds=3, device="cuda")
    assert times["a"]["median"] == pytest.approx(seconds)
    assert len(clock.calls) == 2 + 3*n


def test_every_comparison_compiles_for_its_own_size():
    shapes = []

    def backend(graph, inputs):
        shapes.extend(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))
        return graph.forward

    def double(x):
        return x*2

    def make(n):
        compiled = torch.compile(double, backend=backend)
        x = torch.ones(n)
        return lambda: compiled(x)

    for n in (4, 6, 9):
        bench.interleaved_timing({"a": lambda n=n: make(n)}, rounds=1)
    assert shapes == [(4,), (6,), (9,)]
    assert all(type(shape[0]) is int for shape in shapes)


def test_too_many_versions_of_a_compiled_step_are_an_error():
    def multiply(x, n):
        return x*n

    compiled = torch.compile(multiply, backend="eager", dynamic=False)
    sizes = iter(range(2, 50))
    arms = {"a": lambda: lambda: compiled(torch.ones(next(sizes)), 1)}
    with pytest.raises(Exception, match="recompile_limit"):
        bench.interleaved_timing(arms, rounds=20)


@pytest.mark.parametrize("arm", list(STEPS))
def test_peers_take_finite_steps(arm):
    need(arm)
    variants = [dict(), dict(dtype=torch.bfloat16)] + [dict(best=True)]*(arm == "plain")
    for options in variants:
        step = STEPS[arm](TINY, 4, **options)
        losses = [step() for _ in range(2)]
        assert all(math.isfinite(loss) for loss in losses)
        if arm != "plain" or "best" in options:  # the loss stays on the device
            assert all(torch.is_tensor(loss) for loss in losses)
            assert not any(loss.requires_grad for loss in losses)


def test_ours_takes_finite_steps_and_never_smaller_ones():
    step = bench.tinycats_step(TINY, 4)
    step()
    n, loss = step.__self__.means.sums[0, :2].tolist()
    assert n == 1
    assert math.isfinite(loss)
    assert loss > 0
    step.__self__.micro_batch = 2  # as after running out of memory
    with pytest.raises(torch.OutOfMemoryError, match="batch 4 .* 2 at a time"):
        step()


def test_no_arm_compiles_unless_all_may(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *a, **kw: pytest.fail("compiled"))
    monkeypatch.setattr("tinycats.trainer.can_compile", lambda device: True)
    arms = bench.train_arms(TINY, 4, compiled=False)
    names = ["tinycats", "tinycats 32", "plain 32", "plain", "diffusers 32", "diffusers", "rectified-flow 32",
             "rectified-flow"]
    assert set(arms) == {name for name in names if name.split()[0] not in bench.missing_packages()}
    arms["tinycats"]()
    arms["plain"]()


@pytest.mark.parametrize("arm", ["tinycats", "tinycats 32", "plain 32", "diffusers 32", "diffusers"])
def test_sampling_arms_generate(arm):
    need(arm)
    images = bench.sample_arms(TINY, compiled=False, num_steps=2, n=3)[arm]()()
    assert images.shape == (3, 3, 16, 16)
    assert images.isfinite().all()


@pytest.mark.parametrize("name", bench.DIFFUSERS_SCHEDULERS)
def test_schedulers_of_diffusers_go_where_our_solvers_go(name):
    "A velocity that leads straight to an image; and one that curves, in many steps."
    need("diffusers")
    x0, x1 = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = []

    def straight(x, t):
        calls.append(t)
        return (x1 - x)/(1 - t)

    assert bench.scheduler_loop(straight, x0, name, 5) == pytest.approx(x1, abs=.01)
    assert len(calls) == 5
    assert calls[0] == pytest.approx(0, abs=.002)

    def gaussian(x, t):  # the images are N(.3, .5^2)
        return (.3 + t*.25/(t**2*.25 + (1 - t)**2)*(x - t*.3) - x)/(1 - t)

    assert bench.scheduler_loop(gaussian, x0, name, 99) == pytest.approx(.3 + .5*x0, abs=.03)


def test_quality_is_measured_for_every_solver(monkeypatch):
    train = bench.metrics.train_classifier
    monkeypatch.setattr(bench.metrics, "train_classifier", lambda *args, steps: train(*args, steps=20))
    found = bench.quality_by_evaluations(counts=(2, 8), samples=1, seeds=(0,))
    solvers = ["euler", "ab2"] + [f"diffusers {name}" for name in bench.DIFFUSERS_SCHEDULERS]
    assert list(found) == [name for name in solvers if name.split()[0] not in bench.missing_packages()]
    assert list(found["euler"]) == [2, 8, 50]
    for scores in found.values():
        assert scores[8]["fd"] > 0
        assert scores[8]["detail"] > 0
    assert found["ab2"][8]["fd"] < found["ab2"][2]["fd"]


def test_arms_of_equal_quality_generate():
    need("diffusers")
    needed = {"euler": 9, "ab2": 3, "diffusers Heun": 3, "diffusers DPM-Solver++": None}
    arms = bench.quality_arms(TINY, needed, n=3)
    assert list(arms) == ["tinycats ab2, 3", "tinycats euler, 9", "tinycats euler, 50", "plain Euler, 50",
                          "diffusers Euler, 50", "diffusers Heun, 3"]
    for make in arms.values():
        images = make()()
        assert images.shape == (3, 3, 16, 16)
        assert images.isfinite().all()


@pytest.mark.parametrize("size", [TINY, bench.SIZES["demo"], bench.SIZES["full"] | dict(depth=2)])
def test_flops_are_those_that_pytorch_counts(size):
    net = TinyDiT(**size)
    side = size["image_size"]
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(2, 3, side, side), torch.rand(2), torch.zeros(2, dtype=torch.long))
    assert counter.get_total_flops()*3 == pytest.approx(2*bench.flops(**size), rel=1e-6)


def test_memory_is_measured_in_another_process():
    ballast = torch.ones(2**28)  # a gigabyte here must not show there
    found = bench.peak_memory("tinycats 32", "demo", 16, compiled=False)
    weights = sum(p.numel() for p in TinyDiT(**bench.SIZES["demo"]).parameters())*20/2**20
    assert ballast.nbytes == 2**30
    assert weights < found < 1000


def test_a_failing_subprocess_says_why():
    assert bench.run_subprocess("print(1)") == "1\n"
    with pytest.raises(RuntimeError, match="^KeyError: 'no such arm'$"):
        bench.run_subprocess("{}['no such arm']")
    with pytest.raises(RuntimeError, match="ended with -9, perhaps out of memory"):
        bench.run_subprocess("import os; os.kill(os.getpid(), 9)")


def table(**medians):
    return {name.replace("_", " "): dict(median=value) for name, value in medians.items()}


def test_ratios_are_theirs_over_ours():
    train = table(tinycats=1, tinycats_compiled=.5, tinycats_32=2, plain_32=3, plain=2, plain_32_compiled=2.5)
    assert bench.ratios(train, table(tinycats=1)) == dict(train_vs_seed=3, train_vs_seed_equal=1.25)
    train |= table(diffusers=4, diffusers_32=5)
    found = bench.ratios(train, table(tinycats=1, tinycats_32=2, diffusers=1.5, diffusers_32=3))
    expected = dict(train_vs_seed=3, train_vs_seed_equal=1.25, train_vs_diffusers=8,
                    train_vs_diffusers_equal=2.5, sample_vs_diffusers=1.5, sample_vs_diffusers_equal=1.5)
    assert found == expected


def test_a_cpu_and_a_gpu_share_a_file(tmp_path):
    path = tmp_path/"new"/"bench.json"
    assert bench.read_report(path) == {}
    on_cpu = dict(command="make bench", cpu_train_vs_seed=2., train={"a": 1})
    on_gpu = dict(command="make bench", gpu_mfu=.3, train={"a": 2})
    gpu_tables = dict(command="make bench", train={"a": 2})
    bench.write_report(path, on_cpu)
    bench.write_report(path, on_gpu, "cuda")
    assert json.loads(path.read_text()) == on_cpu | dict(gpu=gpu_tables, gpu_mfu=.3)
    quick = dict(command="make bench quick=1", load=3)
    bench.write_report(path, quick)  # a new run replaces the old one of its kind
    assert bench.read_report(path) == quick | dict(gpu=gpu_tables, gpu_mfu=.3)
    bench.write_report(path, dict(gpu_steps_per_s=9), "cuda")
    assert bench.read_report(path) == quick | dict(gpu={}, gpu_steps_per_s=9)
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match="bench.json is not JSON .*: move it away"):
        bench.write_report(path, on_cpu)
    assert path.read_text() == "{"


def only_clang(name):
    return "/bin/clang++" if name == "clang++" else None


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    assert not bench.has_compiler()
    monkeypatch.setattr(bench.shutil, "which", only_clang)
    assert bench.has_compiler()


@pytest.mark.parametrize("device, words", [("mps", "choose auto, cpu or cuda"), ("cuda", "no CUDA GPU here")])
def test_a_device_that_cannot_be_measured_is_refused_in_a_line(monkeypatch, tmp_path, device, words):
    import matplotlib.pyplot as plt
    monkeypatch.setattr(plt, "show", plt.show)  # page.main replaces it
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match=f"^device='{device}': .*{words}") as e:
        page.main(NOTEBOOK, f"device={device}", f"out={tmp_path}")
    assert "\n" not in str(e.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("quick, meant", [("", False), ("0", False), ("no", False), ("1", True),
                                          ("yes", True)])
def test_make_knows_what_quick_means(quick, meant):
    make = shutil.which("make")
    if not make:
        pytest.skip("no make here")
    command = [make, "-n", "bench", f"quick={quick}"]
    done = subprocess.run(command, cwd=NOTEBOOK.parents[1], capture_output=True, text=True)
    assert f"-p quick {meant}\n" in done.stdout, done.stderr


def test_every_switch_takes_finite_steps():
    for arm, make in bench.switch_arms(TINY, 4, compiled=False).items():
        step = make()
        for _ in range(5):
            step()
        assert math.isfinite(step.__self__.means.pop()["loss"]), arm
    assert bench.switch_arms(TINY, 4, compiled=False)["EMA every 4 steps"]().__self__.ema.every == 4
    assert list(bench.switch_arms(TINY, 4, "cuda")) == ["all off", *reversed(bench.EQUAL_RESULTS)]


def test_compiled_adamw_is_adamw():
    if not bench.has_compiler():
        pytest.skip("no C++ compiler here, which torch.compile needs on a CPU")
    fused = bench.tinycats_step(TINY, 4, precision="fp32", compile=False, lr=1e-2, warmup_steps=2)
    compiled = bench.tinycats_step(TINY, 4, precision="fp32", compile=False, lr=1e-2, warmup_steps=2)
    before = [p.detach().clone() for p in compiled.__self__.model.parameters()]
    compiled = bench.with_compiled_adamw(compiled)
    for _ in range(4):  # at four learning rates
        fused()
        compiled()
    for p, q, old in zip(fused.__self__.model.parameters(), compiled.__self__.model.parameters(), before):
        torch.testing.assert_close(q, p, rtol=0, atol=2e-4)
        assert (q - old).abs().max() > 2e-3


def test_waiting_for_data_is_measured(tmp_path, monkeypatch):
    "A reader that takes longer than a step shows as waiting, and two of them read twice as much."
    path = bench.write_images(tmp_path/"images.npy", bench.generated_parts(40, side=16, part=15), 40)
    assert bench.open_images(path).float().std() > 70
    monkeypatch.setitem(bench.SIZES, "full", TINY)
    crops = bench.ImageDataset.crops

    def slow(self, step, batch_size):
        bench.time.sleep(.5)
        return crops(self, step, batch_size)

    monkeypatch.setattr(bench.ImageDataset, "crops", slow)
    found = bench.waiting_share(path, 4, steps=3)
    assert found["waiting"] > .3  # the rest is the step itself, on a machine that may be busy
    assert found["step_s"] > .45
    assert max(bench.reading_rate(path, 4, steps=4).values()) <= 8
    assert bench.reading_rate(path, 4, ahead=2, steps=6)["cache"] > 8


# -- Several processes ---------------------------------------------------------------------------------------

def test_processes_have_a_reference_with_as_many_threads():
    assert bench.process_arms("cpu", cores=2) == {
        "1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}
    assert list(bench.process_arms("cpu", cores=8).values()) == [(1, 4), (1, 8), (2, 4)]
    assert list(bench.process_arms("cpu", cores=1).values()) == [(1, 1), (2, 1)]
    assert list(bench.process_arms("cuda", cores=16, gpus=1).values()) == [(1, 16)]
    assert list(bench.process_arms("cuda", cores=24, gpus=6).values()) == [(1, 4), (2, 4), (4, 4), (6, 4)]


def test_the_parts_of_a_step_are_timed(monkeypatch):
    "A part that takes longer shows as that part; together they are the step."
    step = bench.tinycats_step(TINY, 4, compile=False)
    update = bench.Trainer._update_weights

    def slow(self, *args):
        bench.time.sleep(.2)
        update(self, *args)

    monkeypatch.setattr(bench.Trainer, "_update_weights", slow)
    found = bench.measure_steps(step, 2, "cpu")
    assert step.__self__.step == 4
    assert found["step_s"] > .2
    parts = found["parts"]
    assert .2 < parts["update"] < .4
    assert 0 < parts["forward and backward"] < .2
    assert parts["all-reduce"] == parts["waiting for the others"] == 0
    assert bench.Trainer._update_weights is slow  # nothing stays patched
    total = sum(bench.median_parts([found])["parts"].values())
    assert total == pytest.approx(found["step_s"], rel=1e-3)


def test_one_and_two_processes_are_timed():
    arms = dict(one=(1, 1), two=(2, 1))
    found = bench.time_processes(TINY, 5, "cpu", arms, rounds=2)
    for name, times in found.items():
        assert (times["processes"], times["threads"]) == arms[name]
        assert sum(times["parts"].values()) == pytest.approx(times["step_s"], rel=1e-2)
        assert (times["parts"]["all-reduce"] > 0) == (name == "two")
    assert 0 < bench.efficiencies(found)["two"]["efficiency"] < 4
    lines = bench.processes_table(found).splitlines()
    assert [line.count("|") for line in lines] == [9]*4
    assert lines[3].startswith("| two | ")
    assert lines[3].count("%)") == 5


def test_checkpoints_of_two_processes_are_timed(tmp_path):
    "Rank 0 waits for each checkpoint to be copied; nothing of the run is left."
    found = bench.time_checkpoints(TINY, 5, "cpu", {"two": (2, 1)}, rounds=3, every=6, place=tmp_path)
    assert 0 < found["two"]["step_s"] < 5
    assert found["two"]["stall_s"] > 0
    assert [line.count("|") for line in bench.checkpoint_table(found).splitlines()] == [6]*3
    assert not any(tmp_path.iterdir())


def test_a_slow_checkpoint_costs_what_it_takes():
    "Two seconds of standing still, and five steps that take half as long again."
    steady = [1.]*10
    slow = [3.] + [1.5]*5 + [1.]*6
    found = bench.checkpoint_cost([slow, slow, steady + [1., 1.]])
    assert found == dict(step_s=1., stall_s=2., total_s=4.5)


def test_groups_work_in_turns_and_say_why_they_end():
    code = """
for n in turns():
    if n == 3:
        {}["no such arm"]
    answer([join_ranks().size, n])"""
    with bench.ProcessGroup(code, 2, 1) as group:
        assert [group.turn(1), group.turn(2)] == [[2, 1], [2, 2]]
        with pytest.raises(RuntimeError, match="^KeyError: 'no such arm'$"):
            group.turn(3)


def test_groups_take_turns(monkeypatch):
    "One works while the others wait, and what it finds in its first turn is left out."
    calls = []

    class Group:
        def __init__(self, code, processes, threads, place):
            self.name = f"{code} {processes} {threads} {place}"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            calls.append("closed")

        def turn(self, n):
            calls.append(self.name)
            return n*len(calls)

    monkeypatch.setattr(bench, "ProcessGroup", Group)
    found = bench.take_turns(dict(a=(1, 2), b=(2, 1)), "code", rounds=2, n=10, place="here")
    assert calls == ["code 1 2 here", "code 2 1 here"]*3 + ["closed"]*2
    assert found == dict(a=[30, 50], b=[40, 60])
