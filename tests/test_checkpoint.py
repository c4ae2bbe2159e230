"What the chapter on checkpoints cannot show about itself: killed processes, full disks, machines that are gone."
import json, mmap, os, pickle, random, re, shutil, signal, stat, struct, subprocess, sys, time, warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tinycats import checkpoint
from tinycats.checkpoint import CheckpointError, claim, load, load_latest, prune, save, steps, write_whole

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
torch.set_num_threads(1)  # before any work: a forked child has none of its parent's threads
KILLS = int(os.environ.get("TINYCATS_KILLS", 60))


def child(work):
    "Run `work()` in a process of its own, which ends without cleaning up; its id"
    pid = os.fork()
    if pid: return pid
    code = 1
    try: work(); code = 0
    except BaseException as e: print(f"child: {type(e).__name__}: {e}", file=sys.stderr)
    finally: os._exit(code)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def wait_for(what, pid=None, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        assert pid is None or os.waitpid(pid, os.WNOHANG) == (0, 0), "the child has ended by itself"
        time.sleep(.0005)


def state(step, n=400_000):
    "A state that can be recomputed from its step alone"
    half = torch.full((1000,), step % 251, dtype=torch.bfloat16)
    return {"w": torch.arange(n, dtype=torch.float32) * step, "half": half, "names": ["cat", step]}


def is_state(step, got):
    want = state(step)
    alike = lambda k: got[k].dtype == want[k].dtype and torch.equal(got[k], want[k])
    return alike("w") and alike("half") and got["names"] == want["names"]


def strays(folder):
    "All files that are neither a checkpoint nor the claim"
    return [p.name for p in Path(folder).rglob("*") if p.is_file() and p.name != ".claim" and p.suffix != ".pt"]


def test_killed_at_any_moment(tmp_path):
    "Killed again and again, mostly while it saves, a run always goes on from its last finished save or the one after"
    run, folder = tmp_path/"run", tmp_path/"run"/"checkpoints"
    shared, rng = mmap.mmap(-1, 24), random.Random(0)          # the child's: (step it began with, last step saved, saving now)
    peek = lambda: struct.unpack("qqq", shared[:])

    def work():
        with claim(run) as held:
            begun, _ = load_latest(folder) or (0, None)
            shared[:] = struct.pack("qqq", begun, -1, 0)
            for step in range(begun + 1, begun + 1000):
                held.beat()
                next_state = state(step)
                shared[16:] = struct.pack("q", 1)
                save(folder, step, next_state, keep=2)
                shared[:] = struct.pack("qqq", begun, step, 0)

    on_disk, mid_save, most = 0, 0, 0
    for k in range(KILLS):
        shared[:] = struct.pack("qqq", -1, -1, 0)
        pid = child(work)
        wait_for(lambda: peek()[k % 3 < 2] >= 0, pid)          # after its first save or, each third time, before it
        time.sleep(rng.uniform(0, .05))
        kill(pid)
        begun, saved, saving = peek()
        most = most + 1 if saved < 0 else 3                     # keep=2, and one more for each kill between name and prune
        saved, mid_save = max(begun, saved), mid_save + saving
        assert begun == on_disk                                # it went on from where the one before was killed
        (folder/".step_9999999.pt.part").write_bytes(b"half a chec")
        with warnings.catch_warnings(), claim(run):            # the next start
            warnings.simplefilter("error")                     # not one damaged checkpoint, ever
            on_disk, got = load_latest(folder)
            assert saved <= on_disk <= saved + 1 and is_state(on_disk, got)
            assert strays(run) == [] and 1 <= len(steps(folder)) <= most
            assert steps(folder)[on_disk].read_bytes()[:2] == b"PK"
    assert mid_save > KILLS / 2, f"only {mid_save} of {KILLS} kills hit a save"


def test_random_damage(tmp_path):
    "Cut anywhere or changed in any bit, the newest is passed over with exactly one warning that names it"
    save(tmp_path, 1, state(1, 2000)); good = save(tmp_path, 2, state(2, 2000)); raw = good.read_bytes()
    rng, want = random.Random(1), state(1, 2000)
    for k in range(300):
        i = rng.randrange(len(raw)) if k > 73 else len(raw) - 1 - k
        good.write_bytes(raw[:i] if k % 3 == 0 else raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1:])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step, got = load_latest(tmp_path)
        assert step == 1 and torch.equal(got["w"], want["w"])
        assert len(said) == 1 and good.name in str(said[0].message)
    for p in steps(tmp_path).values(): p.write_bytes(b"GIF89a")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="none is good"): load_latest(tmp_path)
    assert load_latest(tmp_path/"new") is None


def test_the_newest_good_one_is_never_removed(tmp_path):
    for s in range(1, 7): save(tmp_path, s, state(s, 10), keep=9)
    for s in (3, 4, 5, 6): steps(tmp_path)[s].write_bytes(b"")
    prune(tmp_path, keep=3)
    assert list(steps(tmp_path)) == [6, 5, 4, 2]
    save(tmp_path, 3, state(3, 10), keep=1)                     # the run goes on below the damaged ones
    assert list(steps(tmp_path)) == [6, 3]
    with pytest.warns(UserWarning): assert load_latest(tmp_path)[0] == 3


def full_disk_leaves_all_as_it_was(folder, step, big):
    with pytest.raises(OSError) as e: save(folder, step, big, keep=1)
    said = str(e.value)
    assert f"step_{step:07d}.pt needs" in said and "bytes" in said and "\n" not in said
    assert os.listdir(folder) == ["step_0000001.pt"] and load_latest(folder)[0] == 1
    return said


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root on Linux)")
    try: yield folder
    finally: subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(tmp_path):
    with small_disk(tmp_path/"small", "3m") as disk:
        save(disk/"c", 1, state(1, 250_000))
        for step in (2, 3, 4): assert "No space left" in full_disk_leaves_all_as_it_was(disk/"c", step, state(step, 600_000))
        save(disk/"c", 5, state(5, 250_000), keep=1)           # what fits is still saved
        assert list(steps(disk/"c")) == [5]


def test_file_too_large(tmp_path):
    "The same by a limit on the size of files, which needs no rights"
    resource = pytest.importorskip("resource")
    save(tmp_path/"c", 1, state(1, 1000))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try: full_disk_leaves_all_as_it_was(tmp_path/"c", 2, state(2))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_all_is_synced_before_the_name_is_given(tmp_path, monkeypatch):
    "For a power cut, which a kill cannot imitate: the file synced, renamed, its folder synced, then the old one removed"
    save(tmp_path, 1, {}); did, fsync, replace, unlink = [], os.fsync, os.replace, Path.unlink
    def note_fsync(fd): did.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file"); fsync(fd)
    def note_replace(a, b): did.append("rename"); assert Path(a).parent == Path(b).parent; replace(a, b)
    def note_unlink(p, **kw): did.extend(["remove"] * (p.suffix == ".pt")); unlink(p, **kw)
    for where, name, note in (os, "fsync", note_fsync), (os, "replace", note_replace), (Path, "unlink", note_unlink):
        monkeypatch.setattr(where, name, note)
    save(tmp_path, 2, {}, keep=1)
    assert did == ["sync file", "rename", "sync folder", "remove"]


def holder(folder, **kw):
    "A process that holds `folder` until it is killed; its id"
    def work():
        with claim(folder, **kw): time.sleep(60)
    pid = child(work)
    wait_for(lambda: (claim(folder).owner()).get("pid") == pid, pid)
    return pid


def refusal(folder, **kw):
    with pytest.raises(CheckpointError) as e: claim(folder, **kw).__enter__()
    assert "\n" not in str(e.value)
    return str(e.value)


def test_second_run_is_refused_until_the_first_is_killed(tmp_path):
    pid = holder(tmp_path)
    try:
        said = refusal(tmp_path)
        assert f"process {pid} on {os.uname().nodename}" in said
        assert re.search(r"begun \d s ago, last seen \d s ago", said)
        assert str(pid) in refusal(tmp_path, expires=0)         # the lock holds, however old the heartbeat
    finally: kill(pid)
    with claim(tmp_path) as held: assert held.owner()["pid"] == os.getpid()
    assert os.listdir(tmp_path) == [".claim"] and claim(tmp_path).owner() == {}


def test_never_two_at_a_time(tmp_path):
    "Four processes claim and release one folder as fast as they can; inside, each makes a file that must not be there"
    def work():
        won, end = 0, time.monotonic() + 1
        while time.monotonic() < end:
            try:
                with claim(tmp_path):
                    os.close(os.open(tmp_path/"inside", os.O_CREAT | os.O_EXCL))
                    time.sleep(.001)
                    os.remove(tmp_path/"inside")
                    won += 1
            except CheckpointError: pass
        (tmp_path/f"won {won} {os.getpid()}").touch()
    assert [os.waitpid(pid, 0)[1] for pid in [child(work) for _ in range(4)]] == [0]*4
    assert sum(int(p.name.split()[1]) for p in tmp_path.glob("won *")) > 10


@pytest.mark.parametrize("without_locks", [False, True])
def test_other_machine_expires(tmp_path, monkeypatch, without_locks):
    "Of a container that is gone only its heartbeat is left, also if ours has the same name"
    if without_locks: monkeypatch.setattr(checkpoint, "fcntl", None)
    host = os.uname().nodename
    def left(age):
        who = dict(host=host, pid=7, machine=f"{host} other", token="x", since=time.time() - 500, time=time.time() - age)
        (tmp_path/".claim").write_text(json.dumps(who))
    left(20); said = refusal(tmp_path)
    assert f"process 7 on {host}" in said and "begun 500 s ago" in said and "last seen 20 s ago" in said
    for age in (61, 10_000, -10_000):
        left(age)
        with claim(tmp_path) as held: assert held.owner()["pid"] == os.getpid()
    for rubbish in (b"", b"\xff\xfe", b"[1]", b"{"):
        (tmp_path/".claim").write_bytes(rubbish)
        with claim(tmp_path): pass


def test_heartbeat_alone(tmp_path, monkeypatch):
    "Without locks a living process keeps the folder by its heartbeat, and a killed one loses it when that has grown old"
    monkeypatch.setattr(checkpoint, "fcntl", None)
    pid = holder(tmp_path, every=.05)
    try:
        time.sleep(1.2)
        assert f"process {pid}" in refusal(tmp_path, expires=1)
    finally: kill(pid)
    assert f"process {pid}" in refusal(tmp_path, expires=30)
    time.sleep(1.2)
    with claim(tmp_path, expires=1): pass


def test_a_sleeper_notices(tmp_path, monkeypatch):
    "Stopped for long and taken over, the first run finds another name in the folder, and leaves that claim alone"
    monkeypatch.setattr(checkpoint, "fcntl", None)
    with claim(tmp_path, every=60, expires=.1) as first:
        time.sleep(.2)
        second = claim(tmp_path, every=60, expires=.1).__enter__()
        with pytest.raises(CheckpointError, match="taken over by process"): first.beat()
    second.beat()
    second.__exit__()


class Stranger:
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call[0], self.call[1:]


@pytest.mark.parametrize("forced", [None, "1"])
def test_a_malicious_pickle_runs_nothing(tmp_path, monkeypatch, forced):
    "With and without a seal, and also where the environment asks torch to trust everybody"
    if forced: monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    here, folder = tmp_path/"was here", tmp_path/"c"
    save(folder, 1, state(1, 10))
    for k, call in enumerate([(os.system, f"touch '{here}'"), (os.mkdir, str(here)), (eval, f"open({str(here)!r}, 'w')")]):
        path = folder/"step_0000002.pt"
        plain = pickle.dumps({"step": 2, "state": Stranger(*call)})
        torch.save({"step": 2, "state": Stranger(*call)}, path)
        zipped = path.read_bytes()
        for raw in (plain, zipped, plain + checkpoint._seal(plain), zipped[:-2] + checkpoint._seal(zipped[:-2])):
            path.write_bytes(raw)
            with pytest.raises(CheckpointError) as e: load(path)
            assert path.name in str(e.value) and "\n" not in str(e.value)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert load_latest(folder)[0] == 1
            assert len([w for w in said if path.name in str(w.message)]) == 1 and not here.exists()
    pickle.loads(plain); assert here.exists()                  # the trap works: only `load` does not step into it


def test_what_could_not_be_read_is_not_written(tmp_path):
    for bad in (tmp_path, lambda: 0, Stranger(print), np.float64(1), open(os.devnull)):
        with pytest.raises(CheckpointError, match="step 3 cannot be saved") as e: save(tmp_path/"c", 3, {"bad": bad})
        assert "\n" not in str(e.value)
    assert steps(tmp_path/"c") == {} and strays(tmp_path) == []


def test_write_whole_for_other_files(tmp_path):
    assert write_whole(tmp_path/"config.json", '{"breed": "Maine_Coon"}').read_text() == '{"breed": "Maine_Coon"}'
    assert write_whole(tmp_path/"config.json", b"{}").read_bytes() == b"{}" and os.listdir(tmp_path) == ["config.json"]
