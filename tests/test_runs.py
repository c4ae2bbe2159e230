"What the chapter on the trainer cannot show about itself: runs that are killed, told to stop, or started twice, as processes and through papermill."
import json, os, random, re, shutil, signal, subprocess, sys, time, warnings
from contextlib import contextmanager
from pathlib import Path

import nbformat, psutil, pytest, torch
from nbclient import NotebookClient
from test_checkpoint import KILLS, child, kill, small_disk, wait_for
from tinycats.checkpoint import claim, load_latest, steps as checkpoints
from tinycats.data import Cats, toy_cats
from tinycats.dit import TinyDiT
from tinycats.trainer import Trainer, lr_at

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
torch.set_num_threads(1)  # before any work: a forked child has none of its parent's threads
torch.optim.AdamW([torch.zeros(1)])  # brings in all that a first optimizer imports, once and not in every child
ROOT = Path(__file__).resolve().parents[1]


def trainer(folder, device="cpu", dim=32, dropout=.1, cats=None, **kw):
    "A run of 60 steps of a few milliseconds, with everything on that is random: label drop, dropout, batches in uneven pieces."
    torch.manual_seed(0)
    net = TinyDiT(16, 8, dim=dim, depth=1, num_heads=2, dropout=dropout).to(device)
    kw = dict(steps=60, batch_size=8, micro_batch=3, lr=2e-3, warmup_steps=10, ema_decay=(.5, .98), log_every=1, checkpoint_every=10, precision="fp32") | kw
    return Trainer(net, cats or Cats(*toy_cats(40, 16, seed=2), seed=0, device=device), folder, **kw)


def until(step, **kw):
    "Work for a child: go on until the record of a step, then leave the loop."
    for record in trainer(**kw).fit():
        if record["step"] == step: break


def stopped(step, sig, **kw):
    "Work for a child: a run that sends itself a signal right after a step."
    until(None, sample_every=1, on_sample=lambda t: t.step == step and os.kill(os.getpid(), sig), **kw)


def exit_of(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def records(folder):
    "The whole lines of a run's records."
    try: return [json.loads(line) for line in (folder/"metrics.jsonl").read_text().splitlines(True) if line.endswith("\n")]
    except FileNotFoundError: return []


def last(folder): return next((r["step"] for r in reversed(records(folder))), 0)


def course(folder): return [{k: r[k] for k in ("step", "loss", "lr", "grad_norm", "loss_by_t")} for r in records(folder)]


def flat(x): return [y for v in (x.values() if isinstance(x, dict) else x) for y in flat(v)] if isinstance(x, (dict, list, tuple)) else [x]


def end(folder):
    "All that a finished run's last checkpoint holds, apart from the seconds it took."
    step, state = load_latest(folder/"checkpoints")
    assert step == 60 and {"model", "ema", "optimizer", "scaler"} <= set(state)
    return flat({k: v for k, v in state.items() if k != "train_seconds"})


def same(a, b):
    return len(a) == len(b) and all(torch.equal(u, v) if torch.is_tensor(u) else u == v for u, v in zip(a, b))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_equals_never_having_stopped(tmp_path, precision):
    "60 steps at once; 25 and a fresh process for the rest; and five interruptions, one in the warm-up: equal to the last bit"
    kw = lambda name: dict(folder=tmp_path/name, precision=precision, log_every=4)
    assert exit_of(child(lambda: until(None, **kw("whole")))) == 0
    assert exit_of(child(lambda: stopped(25, signal.SIGTERM, **kw("two")))) == 1
    code = f"from test_runs import *; until(None, folder=Path({str(tmp_path/'two')!r}), log_every=4)"
    if precision == "fp16": assert exit_of(child(lambda: until(None, **kw("two")))) == 0   # a forked one is as good, and quicker
    else: subprocess.run([sys.executable, "-c", code], cwd=ROOT/"tests", check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for step, sig, ended, at in ((3, signal.SIGINT, 1, 3), (11, signal.SIGTERM, 1, 11), (25, signal.SIGHUP, 1, 25), (37, signal.SIGKILL, -9, 30), (44, signal.SIGINT, 1, 44)):
        assert exit_of(child(lambda: stopped(step, sig, **kw("many")))) == ended
        assert at - 10*(sig == signal.SIGKILL) <= load_latest(tmp_path/"many/checkpoints")[0] <= at   # step 30 may still be on its way
    assert exit_of(child(lambda: until(None, **kw("many")))) == 0
    for name in ("two", "many"):
        assert course(tmp_path/name) == course(tmp_path/"whole") and len(course(tmp_path/name)) == 15
        assert same(end(tmp_path/name), end(tmp_path/"whole"))
    one_cosine = [lr_at(s, 60, 2e-3, 5e-7, 10) for s in range(3, 60, 4)]  # over the run's true length, not a slice's
    assert [r["lr"] for r in records(tmp_path/"many")] == one_cosine


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resume_on_a_gpu(tmp_path):
    "On a GPU sums are not always added in the same order: there the losses agree to one in a thousand"
    whole = [r["loss"] for r in trainer(tmp_path/"whole", "cuda").fit()]
    for r in trainer(tmp_path/"two", "cuda").fit():
        if r["step"] == 25: break
    for _ in trainer(tmp_path/"two", "cuda").fit(): pass
    torch.testing.assert_close(torch.tensor([r["loss"] for r in records(tmp_path/"two")]), torch.tensor(whole), rtol=1e-3, atol=0)


def test_the_horizon_is_the_runs(tmp_path):
    "Another length, rate, batch, width or number of breeds is refused by name, unless the caller says which change is meant"
    until(12, folder=tmp_path)
    few = Cats(*toy_cats(40, 16, seed=2), seed=0, num_classes=14)
    for name, kw in dict(steps=dict(steps=90), lr=dict(lr=1e-3), batch_size=dict(batch_size=4), dim=dict(dim=64), breeds=dict(cats=few)).items():
        with pytest.raises(ValueError, match=f"^{name} is .*name {name} in changes$") as e: next(trainer(tmp_path, **kw).fit())
        assert "\n" not in str(e.value) and load_latest(tmp_path/"checkpoints")[0] == 12
    with pytest.raises(ValueError, match="^the network in .* has another shape") as e: next(trainer(tmp_path, dim=64, changes=["dim"]).fit())
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="^changes names stepz"): next(trainer(tmp_path, changes=["stepz"]).fit())
    t = trainer(tmp_path, lr=1e-3, weight_decay=.3, changes=["lr", "weight_decay"])
    assert next(t.fit())["lr"] == lr_at(12, 60, 1e-3, 5e-7, 10) and t.optimizer.param_groups[0]["weight_decay"] == .3


def test_killed_at_any_moment(tmp_path):
    "Killed with kill -9 after each bit of progress, a run goes on from where its last finished save was, and its end is that of a run never killed"
    rng, begun, tries = random.Random(0), 0, KILLS//3
    kw = dict(folder=tmp_path/"a", steps=100_000, checkpoint_every=4, keep=2, warmup_steps=10)
    newest = lambda: max(checkpoints(tmp_path/"a/checkpoints"), default=0)
    for k in range(tries):
        pid = child(lambda: until(None, **kw))
        wait_for(lambda: newest() >= begun + 4, pid)
        time.sleep(rng.uniform(0, .1))
        kill(pid)
        reached, before = last(tmp_path/"a"), begun
        assert json.loads((tmp_path/"a/config.json").read_text())["step"] == before     # it went on from where the one before was killed
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            begun, _ = load_latest(tmp_path/"a/checkpoints")
        assert before < begun and begun >= (reached - 1)//4*4 - 4, (before, begun, reached)   # the newest one due, or, while it is written, the one before
    until(begun + 1, **kw)                                                              # no line twice or missing, no stray file
    assert [r["step"] for r in records(tmp_path/"a")] == list(range(1, begun + 2))
    assert {p.name for p in (tmp_path/"a").iterdir()} == {".claim", "checkpoints", "config.json", "metrics.jsonl"} and not list(tmp_path.rglob("*.part"))
    assert exit_of(child(lambda: until(begun + 1, **kw | {"folder": tmp_path/"b"}))) == 0
    assert course(tmp_path/"a") == course(tmp_path/"b")


class Slow(TinyDiT):
    "A network of which a piece of a batch takes its time."
    def forward(self, *args): time.sleep(self.nap); return super().forward(*args)


def test_a_long_step_is_given_up(tmp_path):
    "Told to stop in the middle of a step of four seconds, a run saves after the next piece of the batch, and has not moved a weight"
    t = trainer(tmp_path, batch_size=40, micro_batch=1)
    t.model.__class__, t.model.nap = Slow, .1
    before = [p.clone() for p in t.model.parameters()]
    pid = os.getpid()
    helper = child(lambda: (time.sleep(.5), os.kill(pid, signal.SIGTERM)))
    start, handlers = time.monotonic(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit) as e: next(t.fit())
    assert e.value.code == 143 and time.monotonic() - start < 2 and exit_of(helper) == 0
    assert load_latest(tmp_path/"checkpoints")[0] == 0 and same(list(t.model.parameters()), before)
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_nohup_is_respected(tmp_path):
    def work():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stopped(5, signal.SIGHUP, folder=tmp_path)
    assert exit_of(child(work)) == 0 and load_latest(tmp_path/"checkpoints")[0] == 60


def fill(disk, room):
    "Leave `room` bytes free, or, with None, all that was filled before."
    (disk/"filler").write_bytes(b"")
    if room is not None: (disk/"filler").write_bytes(bytes(shutil.disk_usage(disk).free - room))


def crowded(disk, name, room, full_at, free_at=None, **kw):
    "A run on a disk that becomes full at one step and is free again from another on."
    fill(disk, None)
    t = trainer(disk/name, keep=2, **kw)
    for r in t.fit():
        if r["step"] == full_at: wait_for(lambda: t.writing is None or t.writing.done()); fill(disk, room)
        if r["step"] == free_at: fill(disk, None)


@pytest.mark.parametrize("room", [64 << 10, 0], ids=["room for records", "no room at all"])
def test_full_disk(tmp_path, caplog, room):
    "Stop in one line, or go on with one warning; either way the checkpoint before is intact, and so is every line of the records"
    with small_disk(tmp_path/"small", "8m") as disk:
        with pytest.raises(OSError) as e: crowded(disk, "stops", room, 12)
        assert re.search(r"No space left on device: .*(step_0000020.pt needs|metrics.jsonl has)", str(e.value)) and "\n" not in str(e.value)
        assert list(checkpoints(disk/"stops/checkpoints")) == [10] and load_latest(disk/"stops/checkpoints")[0] == 10
        fill(disk, None)
        assert [r["step"] for r in trainer(disk/"stops").fit()][0] == 11           # with room made, the same command goes on
        shutil.rmtree(disk/"stops"); caplog.clear()

        crowded(disk, "goes", room, 12, 25, if_disk_full="go on")
        assert load_latest(disk/"goes/checkpoints")[0] == 60 and list(checkpoints(disk/"goes/checkpoints")) == [60, 50]
        assert len(caplog.records) == 1 and "Going on without it" in caplog.text
        steps = [r["step"] for r in records(disk/"goes")]                            # every line can be read, and none is cut short
        assert steps[-1] == 60 and (disk/"goes/metrics.jsonl").read_text().endswith("\n") and (steps == list(range(1, 61))) == (room > 0)
        shutil.rmtree(disk/"goes")

        with pytest.raises(OSError, match="No space left.*step_0000060.pt needs"): crowded(disk, "never", room, 12, if_disk_full="go on")
        assert list(checkpoints(disk/"never/checkpoints")) == [10] and load_latest(disk/"never/checkpoints")[0] == 10


def test_data_smaller_than_a_batch(tmp_path):
    few = Cats(*toy_cats(3, 16, seed=2, breeds=["Siamese", "Bombay"]), seed=0)
    assert [r["step"] for r in trainer(tmp_path, cats=few, steps=3, warmup_steps=1).fit() if r["loss"] > 0] == [1, 2, 3]
    with pytest.raises(ValueError, match="no pictures") as e: Cats(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    assert "\n" not in str(e.value)


TINY = dict(run="a", toy_pictures=130, image_size=16, patch_size=8, dim=32, depth=1, num_heads=2, steps=100_000, batch_size=8, warmup_steps=5,
            log_every=1, sample_every=0, checkpoint_every=20, keep=2)


def start(where, notebook=None, **params):
    "Papermill with train.ipynb in a process, from the folder `where`, which plays the project's root."
    where.mkdir(exist_ok=True); (where/"settings.ini").touch()
    options = [] if notebook else [x for k, v in (TINY | params).items() for x in ("-p", k, str(v))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT/'tests'}"}
    with open(where/"said", "w") as said:
        return subprocess.Popen([sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING", notebook or ROOT/"nbs/train.ipynb", "out.ipynb", *options],
                                cwd=where, stdout=said, stderr=said, env=env)


def kernel_of(mill): return next(p for p in psutil.Process(mill.pid).children() if "ipykernel_launcher" in p.cmdline())


def gone(process):
    try: return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


def wait_until(what, mill=None, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        assert mill is None or mill.poll() is None, (Path(mill.args[0]), "papermill has ended by itself")
        time.sleep(.01)


@contextmanager
def mills(*places, **params):
    "Papermill in each of the folders, side by side; whatever is left at the end is killed."
    if not sys.platform.startswith("linux"): pytest.skip("finds the kernel as Linux does")
    started, kernels = [], []
    try:
        for p in places: started.append(start(p, **params))
        yield started
    finally:
        for m in started:
            if m.poll() is None:
                kernels += psutil.Process(m.pid).children()
                m.kill()
            m.wait()
        for k in kernels:
            if not gone(k): k.kill()


def test_killed_through_papermill(tmp_path):
    "kill -9 for the kernel and for papermill, eight times: each start goes on from a checkpoint, the newest one due or the one before it"
    rng, places, tries = random.Random(0), [tmp_path/"one", tmp_path/"two"], 4
    run = lambda p: p/"outputs/a"
    newest = lambda p: max(checkpoints(run(p)/"checkpoints"), default=0)
    begun = dict.fromkeys(places, 0)
    for k in range(tries):
        with mills(*places) as started:
            for p, mill in zip(places, started):
                wait_until(lambda: newest(p) >= begun[p] + 20, mill)
                time.sleep(rng.uniform(0, .3))
                kernel = kernel_of(mill)
                for victim in rng.sample([kernel, mill], 2): victim.kill()
                mill.wait()
                wait_until(lambda: gone(kernel))
                rows, before = [r["step"] for r in records(run(p))], begun[p]
                assert rows == list(range(1, rows[-1] + 1))                          # it went on at its checkpoint, without a gap or a step twice
                begun[p], _ = load_latest(run(p)/"checkpoints")
                assert begun[p] > before and begun[p] >= (rows[-1] - 1)//20*20 - 20
                assert json.loads((run(p)/"config.json").read_text())["step"] == before   # where this start began


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_papermill_is_stopped(tmp_path, how):
    "Told to papermill alone, each of these lets the kernel end its step and save; the next start may have the folder at once"
    run = tmp_path/"outputs/a"
    with mills(tmp_path, checkpoint_every=100_000) as (mill,):
        wait_until(lambda: last(run) >= 5, mill)
        kernel, at = kernel_of(mill), time.monotonic()
        mill.send_signal(how)
        wait_until(lambda: gone(kernel), seconds=10)
        took = time.monotonic() - at
        assert mill.wait(20) != 0 and took < 5
    step, _ = load_latest(run/"checkpoints")
    assert last(run) <= step <= last(run) + 1 and json.loads((run/"config.json").read_text())["step"] == step
    if how == signal.SIGINT:
        said = [o["evalue"] for c in nbformat.read(tmp_path/"out.ipynb", 4).cells for o in c.get("outputs", []) if o["output_type"] == "error"]
        assert re.match(f"stopped at step {step} of 100000, saved in .*: the same command goes on from there$", said[0])
    with claim(run): pass


SLOW_DISK = """
import time, tinycats.checkpoint as c
from test_runs import *
write = c.write_whole
def slowly(*args): time.sleep(3); return write(*args)
c.write_whole = slowly
for _ in trainer(Path("run"), steps=100_000, checkpoint_every=100_000).fit(): pass
"""


def test_a_slow_save_is_finished(tmp_path):
    "A kernel ends within a second of its papermill if nobody stops it; a save that takes three is finished all the same"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SLOW_DISK)], metadata=dict(kernelspec=dict(name="python3", display_name="", language="python")))
    nbformat.write(nb, tmp_path/"slow.ipynb")
    with mills(tmp_path, notebook=tmp_path/"slow.ipynb") as (mill,):
        wait_until(lambda: last(tmp_path/"run") >= 5, mill)
        kernel = kernel_of(mill)
        mill.terminate()
        wait_until(lambda: gone(kernel))
    assert last(tmp_path/"run") <= load_latest(tmp_path/"run/checkpoints")[0] <= last(tmp_path/"run") + 1


def test_second_run_is_refused(tmp_path):
    "The last line says which host, which process, and since when"
    run = tmp_path/"outputs/a"
    pid = child(lambda: until(None, folder=run, steps=100_000, sample_every=1, on_sample=lambda t: time.sleep(.3)))
    try:
        wait_for(lambda: last(run) > 0, pid)
        before = (run/"config.json").read_bytes()
        with mills(tmp_path) as (mill,): assert mill.wait(60) == 1
    finally: kill(pid)
    said = (tmp_path/"said").read_text().strip().splitlines()[-1]
    assert re.search(rf"outputs/a is in use by process {pid} on {os.uname().nodename}, begun \d+ s ago, last seen \d+ s ago", said)
    assert (run/"config.json").read_bytes() == before


def test_output_does_not_grow_without_end(tmp_path):
    "200,000 steps, as far as logging goes: a record every 25 of them, and a page of less than 5 MB"
    cells = ["from test_runs import *; from tinycats.gallery import plot_curves; from tinycats.trainer import progress",
             "t = trainer(Path('run'), steps=200_000, log_every=25, checkpoint_every=10_000, warmup_steps=50)",
             "def take_step(): t.step += 1; t.sums += 1",
             "t.take_step = take_step",
             "for record in progress(t.fit(), t.steps, every_s=0): pass",
             "plot_curves(records(Path('run')))"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    old, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH", ""), f"{ROOT}:{ROOT/'tests'}"
    try: NotebookClient(nb, timeout=120, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    finally: os.environ["PYTHONPATH"] = old
    nbformat.write(nb, tmp_path/"page.ipynb")
    printed = "".join(o["text"] for o in nb.cells[4].outputs)
    assert len(records(tmp_path/"run")) == 8_000 and 90 < printed.count("ETA") < 110 and (tmp_path/"page.ipynb").stat().st_size < 5e6
