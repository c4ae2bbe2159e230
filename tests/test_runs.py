"What the chapter on training cannot show about itself: runs killed, stopped or started twice, as processes."
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from helpers import slow

from test_checkpoint import KILLS, child, kill, small_disk, wait_for
from tinycats.checkpoint import CheckpointError, RunLock, list_checkpoints, load_latest
from tinycats.data import ImageDataset
from tinycats.dit import TinyDiT
from tinycats.flow import sample
from tinycats.toy import TOY_CLASSES, toy_cats
from tinycats.trainer import TrainConfig, Trainer, cosine_lr, print_progress

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
torch.set_num_threads(1)  # before any work: a forked child has none of its parent's threads
torch.optim.AdamW([torch.zeros(1)])  # imports what a first optimizer needs, once and not in every child
ROOT = Path(__file__).resolve().parents[1]
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def make_data(classes=TOY_CLASSES, device="cpu"):
    return ImageDataset(*toy_cats(40, 16, seed=2), classes, seed=0, device=device)


def shuffled_labels():
    "The same images, each with the label of another."
    images, labels = toy_cats(40, 16, seed=2)
    return images, labels.roll(1)


def make_trainer(folder, device="cpu", dim=32, dropout=.1, data=None, on_sample=None, **settings):
    "A run of 60 short steps with everything random: dropped labels, dropout, uneven micro-batches."
    data = data or make_data(device=device)
    torch.manual_seed(0)
    model = TinyDiT(16, 8, dim=dim, depth=1, num_heads=2, num_classes=data.num_classes, dropout=dropout)
    defaults = dict(steps=60, batch_size=8, micro_batch=3, lr=2e-3, warmup_steps=10, ema_decay=[.5, .98],
                    log_every=1, checkpoint_every=10, precision="fp32")
    return Trainer(model.to(device), data, folder, TrainConfig(**defaults | settings), on_sample=on_sample)


def fit_until(step, **kwargs):
    "Work for a child: train until the record of a step, then leave the loop; None trains to the end."
    for record in make_trainer(**kwargs).fit():
        if record["step"] == step:
            break


def fit_until_signal(step, number, **kwargs):
    "Work for a child: a run that sends itself a signal right after a step."
    def on_sample(trainer):
        if trainer.step == step:
            os.kill(os.getpid(), number)

    fit_until(None, sample_every=1, on_sample=on_sample, **kwargs)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def read_records(folder):
    "The complete lines of a run's records."
    try:
        lines = (folder/"metrics.jsonl").read_text().splitlines(True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(folder):
    return next((r["step"] for r in reversed(read_records(folder))), 0)


def reproducible(folder):
    "The parts of a run's records that do not depend on the clock."
    names = "step", "loss", "lr", "grad_norm", "loss_by_t"
    return [{name: r[name] for name in names} for r in read_records(folder)]


def flatten(state):
    "The tensors and values in nested dicts, lists and tuples, in order."
    if not isinstance(state, (dict, list, tuple)):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    return sum(map(flatten, values), [])


def final_state(folder):
    "All that a finished run's last checkpoint holds, apart from the seconds it took."
    step, state = load_latest(folder/"checkpoints")
    assert step == 60
    assert {"model", "ema", "optimizer", "scaler"} <= set(state)
    return flatten({name: value for name, value in state.items() if name != "train_seconds"})


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_equals_never_having_stopped(tmp_path, precision):
    "60 steps at once; 25 and a fresh process for the rest; and five interruptions: equal to the last bit."
    def settings(name):
        return dict(folder=tmp_path/name, precision=precision, log_every=4)

    assert exit_code(child(lambda: fit_until(None, **settings("once")))) == 0
    assert exit_code(child(lambda: fit_until_signal(25, signal.SIGTERM, **settings("two")))) == 1
    if precision == "fp16":  # a forked process is as good, and quicker
        assert exit_code(child(lambda: fit_until(None, **settings("two")))) == 0
    else:
        code = f"from test_runs import *; fit_until(None, folder=Path({str(tmp_path/'two')!r}), log_every=4)"
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT/"tests", check=True, env=env)

    interruptions = (
        (3, signal.SIGINT, [3]),  # step, signal, the steps that the checkpoint may be at
        (11, signal.SIGTERM, [11]),
        (25, signal.SIGHUP, [25]),
        (37, signal.SIGKILL, [20, 30]),  # that of step 30 may still be on its way
        (44, signal.SIGINT, [44]),
    )
    for step, number, saved in interruptions:
        code = exit_code(child(lambda: fit_until_signal(step, number, **settings("many"))))
        assert code == (-9 if number == signal.SIGKILL else 1)
        assert load_latest(tmp_path/"many/checkpoints")[0] in saved
    assert exit_code(child(lambda: fit_until(None, **settings("many")))) == 0

    for name in ("two", "many"):
        assert reproducible(tmp_path/name) == reproducible(tmp_path/"once")
        assert len(reproducible(tmp_path/name)) == 15
        assert_same(final_state(tmp_path/name), final_state(tmp_path/"once"))
    one_cosine = [cosine_lr(step, 60, lr=2e-3, lr_min=5e-7, warmup_steps=10) for step in range(3, 60, 4)]
    assert [r["lr"] for r in read_records(tmp_path/"many")] == one_cosine


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resume_on_a_gpu(tmp_path):
    "On a GPU sums are not always added in the same order: there the losses agree to one in a thousand."
    once = [r["loss"] for r in make_trainer(tmp_path/"once", "cuda").fit()]
    fit_until(25, folder=tmp_path/"two", device="cuda")
    fit_until(None, folder=tmp_path/"two", device="cuda")
    two = [r["loss"] for r in read_records(tmp_path/"two")]
    torch.testing.assert_close(torch.tensor(two), torch.tensor(once), rtol=1e-3, atol=0)


def test_other_settings_are_refused(tmp_path):
    "Another length, rate, batch, width or set of classes is refused by name, unless allow_changes names it."
    fit_until(12, folder=tmp_path)
    changes = dict(steps=90, lr=1e-3, batch_size=4, time_mean=0., grad_clip=.5)
    others = {name: {name: value} for name, value in changes.items()}
    renamed = make_data(["Tiger", *TOY_CLASSES[1:]])
    others |= dict(classes=dict(data=renamed), seed=dict(seed=1))
    others |= dict(num_images=dict(data=ImageDataset(*toy_cats(41, 16, seed=2), TOY_CLASSES, seed=0)))
    others |= dict(labels_sha256=dict(data=ImageDataset(*shuffled_labels(), TOY_CLASSES, seed=0)))
    for name, kwargs in others.items():
        with pytest.raises(ValueError, match=f"^{name} is .*name ({name}|{name},.*) in allow_changes$") as e:
            next(make_trainer(tmp_path, **kwargs).fit())
        assert "\n" not in str(e.value)
        assert load_latest(tmp_path/"checkpoints")[0] == 12
    for name, value in dict(dim=64, ema_decay=[.9]).items():  # no advice that would be refused afterwards
        with pytest.raises(ValueError, match=f"^{name} is .*: use these or choose another run name$"):
            next(make_trainer(tmp_path, **{name: value}).fit())
        with pytest.raises(ValueError, match=f"^allow_changes names {name}, which cannot change"):
            next(make_trainer(tmp_path, **{name: value}, allow_changes=[name]).fit())
    with pytest.raises(ValueError, match="^classes is .*: use these or choose another run name$"):
        next(make_trainer(tmp_path, data=make_data([*TOY_CLASSES, "Tiger"])).fit())  # num_classes is fixed
    with pytest.raises(ValueError, match="^allow_changes names stepz"):
        next(make_trainer(tmp_path, allow_changes=["stepz"]).fit())
    trainer = make_trainer(tmp_path, lr=1e-3, weight_decay=.3, allow_changes=["lr", "weight_decay"])
    assert next(trainer.fit())["lr"] == cosine_lr(12, 60, lr=1e-3, lr_min=5e-7, warmup_steps=10)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == .3


def test_other_number_of_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="13 classes and the data 14: .*num_classes=14$") as e:
        Trainer(TinyDiT(16, 8, dim=32, depth=1, num_heads=2), make_data([*TOY_CLASSES, "Tiger"]), tmp_path)
    assert "\n" not in str(e.value)


def test_gradients_are_clipped(tmp_path):
    "The first moment of Adam after one step is a tenth of the gradient, whose norm is at most grad_clip."
    for grad_clip, low, high in ((1e-2, .009, .0101), (None, .1, 1e3)):
        trainer = make_trainer(tmp_path, grad_clip=grad_clip)
        trainer.train_step()
        moments = [state["exp_avg"].flatten() for state in trainer.optimizer.state.values()]
        assert low < 10*torch.cat(moments).norm() < high


def test_a_clock_that_is_set_back(tmp_path, monkeypatch, capsys):
    "An hour at each look: durations, speeds and the lines of progress do not notice."
    times = itertools.count(time.time(), -3600)
    monkeypatch.setattr(time, "time", lambda: next(times))
    records = list(print_progress(make_trainer(tmp_path, log_every=20).fit(), 60, every_s=0))
    for record in records:
        assert 0 < record["steps_per_s"] < 1e5
        assert 0 <= record["eta_s"] < 3600
    assert 0 < json.loads((tmp_path/"config.json").read_text())["train_seconds"] < 3600
    assert capsys.readouterr().out.count("ETA") == 3


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_run_that_was_taken_over_writes_nothing(tmp_path, log_every):
    "Before each record and each checkpoint it finds that the lock is another run's."
    def take_over(trainer):
        (tmp_path/".lock").write_text(json.dumps(dict(token="x", pid=7, host="elsewhere")))
        wait_for(lambda: trainer.checkpointer.saved_step == 10)
        before.update({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})

    before = {}
    trainer = make_trainer(tmp_path, log_every=log_every, sample_every=15, on_sample=take_over)
    with pytest.raises(CheckpointError, match="taken over by process 7 on elsewhere; this run must stop"):
        list(trainer.fit())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(list_checkpoints(tmp_path/"checkpoints")) == [10]


def test_steps_that_explode_are_no_success(tmp_path):
    "A rate of 1e10: the weights leave every sensible range, and nothing is published as a result."
    with pytest.raises(FloatingPointError, match="has exploded|had no finite gradient|no finite gradient in"):
        list(make_trainer(tmp_path, steps=20, lr=1e10, warmup_steps=1).fit())
    assert list_checkpoints(tmp_path/"checkpoints") == {}
    assert list(make_trainer(tmp_path, steps=20).fit())[-1]["step"] == 20  # the name is not lost


def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    "Before any work, and in one line."
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    message = r"^compile=True: the compiler needs g\+\+.*; install that, or leave compile at None$"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path/"a", compile=True)
    assert not (tmp_path/"a").exists()


def test_killed_at_any_moment(tmp_path):
    "Killed again and again, a run resumes from its last finished save and ends like one never killed."
    rng, begun, tries = random.Random(0), 0, KILLS//3
    run, twin = tmp_path/"a", tmp_path/"b"
    settings = dict(steps=100_000, checkpoint_every=4, keep=2, warmup_steps=10)

    def newest():
        return max(list_checkpoints(run/"checkpoints"), default=0)

    for _ in range(tries):
        pid = child(lambda: fit_until(None, folder=run, **settings))
        wait_for(lambda: newest() >= begun + 4, pid)
        time.sleep(rng.uniform(0, .1))
        kill(pid)
        reached, before = last_step(run), begun
        assert json.loads((run/"config.json").read_text())["step"] == before  # it resumed from there
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            begun, _ = load_latest(run/"checkpoints")
        due = (reached - 1)//4*4  # the newest one due or, while that is written, the one before
        assert before < begun, (before, begun, reached)
        assert begun >= due - 4, (before, begun, reached)
    fit_until(begun + 1, folder=run, **settings)
    assert [r["step"] for r in read_records(run)] == list(range(1, begun + 2))  # no line twice or missing
    assert {p.name for p in run.iterdir()} == {".lock", "checkpoints", "config.json", "metrics.jsonl"}
    assert not list(tmp_path.rglob("*.part"))
    assert exit_code(child(lambda: fit_until(begun + 1, folder=twin, **settings))) == 0
    assert reproducible(run) == reproducible(twin)


class SlowDiT(TinyDiT):
    "A network that takes its time."
    def forward(self, *args):
        time.sleep(self.seconds)
        return super().forward(*args)


def test_a_long_step_is_aborted(tmp_path):
    "Stopped in the middle of a long step, a run saves after the next micro-batch, all weights unchanged."
    trainer = make_trainer(tmp_path, batch_size=40, micro_batch=1)
    trainer.model.__class__, trainer.model.seconds = SlowDiT, .1
    before = [p.clone() for p in trainer.model.parameters()]
    pid = os.getpid()
    helper = child(lambda: (time.sleep(.5), os.kill(pid, signal.SIGTERM)))
    start, handlers = time.monotonic(), [signal.getsignal(s) for s in STOP_SIGNALS]
    with pytest.raises(SystemExit) as e:
        next(trainer.fit())
    assert e.value.code == 143
    assert time.monotonic() - start < 2
    assert exit_code(helper) == 0
    assert load_latest(tmp_path/"checkpoints")[0] == 0
    assert_same(list(trainer.model.parameters()), before)
    assert handlers == [signal.getsignal(s) for s in STOP_SIGNALS]


def test_nohup_is_respected(tmp_path):
    def work():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        fit_until_signal(5, signal.SIGHUP, folder=tmp_path)

    assert exit_code(child(work)) == 0
    assert load_latest(tmp_path/"checkpoints")[0] == 60


def fill(disk, room):
    "Leave `room` bytes free or, with None, all that was filled before."
    (disk/"filler").write_bytes(b"")
    if room is not None:
        (disk/"filler").write_bytes(bytes(shutil.disk_usage(disk).free - room))


def fit_on_full_disk(disk, name, room, full_at, free_at=None, **settings):
    "A run on a disk that becomes full at one step and is free again from another on."
    fill(disk, None)
    trainer = make_trainer(disk/name, keep=2, **settings)
    checkpointer = trainer.checkpointer
    for record in trainer.fit():
        if record["step"] == full_at:
            wait_for(lambda: checkpointer.pending is None or checkpointer.is_done)
            fill(disk, room)
        if record["step"] == free_at:
            fill(disk, None)


@pytest.mark.parametrize("room", [64 << 10, 0], ids=["room for records", "no room at all"])
def test_full_disk(tmp_path, caplog, room):
    "Stop in one line, or warn once and train on; the checkpoint before is intact, and so is every record."
    with small_disk(tmp_path/"small", "8m") as disk:
        stops, goes, never = disk/"stops", disk/"goes", disk/"never"
        with pytest.raises(OSError) as e:
            fit_on_full_disk(disk, "stops", room, full_at=12)
        message = "No space left on device: .*(step_0000020.pt needs|metrics.jsonl needs)"
        assert re.search(message, str(e.value))
        assert "\n" not in str(e.value)
        assert list(list_checkpoints(stops/"checkpoints")) == [10]
        assert load_latest(stops/"checkpoints")[0] == 10
        fill(disk, None)
        records = list(make_trainer(stops).fit())
        assert records[0]["step"] == 11  # with room made, the same command resumes
        shutil.rmtree(stops)
        caplog.clear()

        fit_on_full_disk(disk, "goes", room, full_at=12, free_at=25, tolerate_disk_full=True)
        assert load_latest(goes/"checkpoints")[0] == 60
        assert list(list_checkpoints(goes/"checkpoints")) == [60, 50]
        assert len(caplog.records) == 1
        assert "Going on without it" in caplog.text
        steps = [r["step"] for r in read_records(goes)]  # every line can be read, and none is cut short
        assert steps[-1] == 60
        assert (goes/"metrics.jsonl").read_text().endswith("\n")
        assert (steps == list(range(1, 61))) == (room > 0)
        shutil.rmtree(goes)

        with pytest.raises(OSError, match="No space left.*step_0000060.pt needs"):
            fit_on_full_disk(disk, "never", room, full_at=12, tolerate_disk_full=True)
        assert list(list_checkpoints(never/"checkpoints")) == [10]
        assert load_latest(never/"checkpoints")[0] == 10


def test_data_smaller_than_a_batch(tmp_path):
    few = ImageDataset(*toy_cats(3, 16, seed=2, classes=["Siamese", "Bombay"]), TOY_CLASSES, seed=0)
    records = make_trainer(tmp_path, data=few, steps=3, warmup_steps=1).fit()
    assert [r["step"] for r in records if r["loss"] > 0] == [1, 2, 3]
    with pytest.raises(ValueError, match="no images") as e:
        ImageDataset(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    assert "\n" not in str(e.value)


TINY = dict(run="a", toy_images=130, image_size=16, patch_size=8, dim=32, depth=1, num_heads=2, steps=100_000,
            batch_size=8, warmup_steps=5, log_every=1, sample_every=0, checkpoint_every=20, keep=2)


def start(where, notebook=None, **params):
    "Papermill with train.ipynb in a process, from the folder `where`, which plays the project's root."
    where.mkdir(exist_ok=True)
    (where/"settings.ini").write_text("lib_name = tinycats\n")
    options = []
    for name, value in ({} if notebook else TINY | params).items():
        options += ["-p", name, str(value)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT/'tests'}"}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING",
               notebook or ROOT/"nbs/train.ipynb", "out.ipynb", *options]
    with open(where/"log", "w") as log:
        return subprocess.Popen(command, cwd=where, stdout=log, stderr=log, env=env)


def kernel_of(papermill):
    children = psutil.Process(papermill.pid).children()
    return next(p for p in children if "ipykernel_launcher" in p.cmdline())


def is_gone(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition, papermill=None, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert papermill is None or papermill.poll() is None, "papermill has ended by itself"
        time.sleep(.01)


@contextmanager
def papermills(*places, **params):
    "Papermill in each of the folders, side by side; whatever is left at the end is killed."
    if not sys.platform.startswith("linux"):
        pytest.skip("finds the kernel as Linux does")
    started, kernels = [], []
    try:
        for place in places:
            started.append(start(place, **params))
        yield started
    finally:
        for papermill in started:
            if papermill.poll() is None:
                kernels += psutil.Process(papermill.pid).children()
                papermill.kill()
            papermill.wait()
        for kernel in kernels:
            if not is_gone(kernel):
                kernel.kill()


def test_killed_through_papermill(tmp_path):
    "kill -9 for kernel and papermill: each start resumes from the newest checkpoint or the one before."
    rng, places, tries = random.Random(0), [tmp_path/"one", tmp_path/"two"], 2
    begun = dict.fromkeys(places, 0)

    def newest(place):
        return max(list_checkpoints(place/"outputs/a/checkpoints"), default=0)

    def kill_both(place, papermill):
        "Kill kernel and papermill in random order, and check what the run has left."
        run, before = place/"outputs/a", begun[place]
        wait_until(lambda: newest(place) >= before + 20, papermill)
        time.sleep(rng.uniform(0, .3))
        kernel = kernel_of(papermill)
        for victim in rng.sample([kernel, papermill], 2):
            victim.kill()
        papermill.wait()
        wait_until(lambda: is_gone(kernel))
        steps = [r["step"] for r in read_records(run)]
        assert steps == list(range(1, steps[-1] + 1))  # it resumed without a gap or a step twice
        begun[place], _ = load_latest(run/"checkpoints")
        assert begun[place] > before
        assert begun[place] >= (steps[-1] - 1)//20*20 - 20
        assert json.loads((run/"config.json").read_text())["step"] == before  # where this start began

    for _ in range(tries):
        with papermills(*places) as started:
            for place, papermill in zip(places, started):
                kill_both(place, papermill)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_drawing_is_stopped(tmp_path, number):
    "A sheet that would take for ever ends at once, and its step is saved; though a checkpoint was not due."
    def draw(trainer):
        (tmp_path/"drawing").touch()
        sample(trainer.ema[.5], torch.zeros(64).long(), num_steps=10**6)

    run = tmp_path/"a"
    pid = child(lambda: fit_until(None, folder=run, sample_every=7, checkpoint_every=60, on_sample=draw))
    wait_for((tmp_path/"drawing").exists, pid)
    time.sleep(.2)
    sent = time.monotonic()
    os.kill(pid, number)
    assert exit_code(pid) == 1
    assert time.monotonic() - sent < 3
    assert load_latest(run/"checkpoints")[0] == 7
    assert json.loads((run/"config.json").read_text())["step"] == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_papermill_is_stopped(tmp_path, number):
    "Sent to papermill alone, each of these lets the kernel end its step and save; the lock is free at once."
    run = tmp_path/"outputs/a"
    with papermills(tmp_path, checkpoint_every=100_000) as (papermill,):
        wait_until(lambda: last_step(run) >= 5, papermill)
        kernel, sent = kernel_of(papermill), time.monotonic()
        papermill.send_signal(number)
        wait_until(lambda: is_gone(kernel), seconds=10)
        took = time.monotonic() - sent
        assert papermill.wait(20) != 0
        assert took < 5
    step, _ = load_latest(run/"checkpoints")
    assert last_step(run) <= step <= last_step(run) + 1
    assert json.loads((run/"config.json").read_text())["step"] == step
    if number == signal.SIGINT:
        import nbformat # not above: a GPU machine without Jupyter runs other tests of this file
        cells = nbformat.read(tmp_path/"out.ipynb", 4).cells
        outputs = sum((cell.get("outputs", []) for cell in cells), [])
        errors = [o["evalue"] for o in outputs if o["output_type"] == "error"]
        message = f"stopped at step {step} of 100000, saved in .*: the same command goes on from there$"
        assert re.match(message, errors[0])
    with RunLock(run):
        pass


SLOW_DISK = """
import time, tinycats.checkpoint
from test_runs import *
write = tinycats.checkpoint.atomic_write
def write_slowly(*args):
    time.sleep(3)
    return write(*args)
tinycats.checkpoint.atomic_write = write_slowly
for _ in make_trainer(Path("run"), steps=100_000, checkpoint_every=100_000).fit():
    pass
"""


def test_a_slow_save_is_finished(tmp_path):
    "A kernel ends within a second of its papermill; a save that takes three is finished all the same."
    import nbformat
    kernelspec = dict(name="python3", display_name="", language="python")
    cells = [nbformat.v4.new_code_cell(SLOW_DISK)]
    notebook, run = tmp_path/"slow.ipynb", tmp_path/"run"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernelspec)), notebook)
    with papermills(tmp_path, notebook=notebook) as (papermill,):
        wait_until(lambda: last_step(run) >= 5, papermill)
        kernel = kernel_of(papermill)
        papermill.terminate()
        wait_until(lambda: is_gone(kernel))
    assert last_step(run) <= load_latest(run/"checkpoints")[0] <= last_step(run) + 1


def test_second_run_is_refused(tmp_path):
    "The last line names the host, the process, and since when it runs."
    run = tmp_path/"outputs/a"
    settings = dict(steps=100_000, sample_every=1, on_sample=lambda trainer: time.sleep(.3))
    pid = child(lambda: fit_until(None, folder=run, **settings))
    try:
        wait_for(lambda: last_step(run) > 0, pid)
        before = (run/"config.json").read_bytes()
        with papermills(tmp_path) as (papermill,):
            assert papermill.wait(60) == 1
    finally:
        kill(pid)
    last_line = (tmp_path/"log").read_text().strip().splitlines()[-1]
    owner = rf"process {pid} on {os.uname().nodename}, begun \d+ s ago, last seen \d+ s ago"
    assert re.search(f"outputs/a is in use by {owner}", last_line)
    assert (run/"config.json").read_bytes() == before


LONG_RUN = [
    """from test_runs import *
from tinycats.trainer import print_progress
from tinycats.viz import plot_curves
settings = dict(steps=200_000, log_every=25, checkpoint_every=10_000, warmup_steps=50)
trainer = make_trainer(Path("run"), **settings)""",
    """def train_step():
    trainer.step += 1
    trainer.means.sums[:, 0] += 1
trainer.train_step = train_step""",
    """for record in print_progress(trainer.fit(), 200_000, every_s=0):
    pass""",
    """plot_curves(read_records(Path("run")))"""]


@slow("half a minute")
def test_output_does_not_grow_without_end(tmp_path, monkeypatch):
    "200,000 steps, as far as logging goes: a record every 25 of them, and a page of less than 5 MB."
    import nbformat
    from nbclient import NotebookClient
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT/'tests'}")
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in LONG_RUN])
    NotebookClient(page, timeout=120, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    nbformat.write(page, tmp_path/"page.ipynb")
    printed = "".join(o["text"] for o in page.cells[2].outputs)
    assert len(read_records(tmp_path/"run")) == 8_000
    assert 90 < printed.count("ETA") < 110
    assert (tmp_path/"page.ipynb").stat().st_size < 5e6
