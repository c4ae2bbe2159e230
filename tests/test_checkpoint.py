"What the chapter on checkpoints cannot show about itself: killed processes, full disks, lost machines."
import json
import mmap
import os
import pickle
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tinycats import checkpoint
from tinycats.checkpoint import CheckpointError, RunLock, load_checkpoint, load_latest
from tinycats.checkpoint import list_checkpoints, prune_checkpoints, save_checkpoint
from tinycats.util import atomic_write, partial_path, remove_partials

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
torch.set_num_threads(1)  # before any work: a forked child has none of its parent's threads
KILLS = int(os.environ.get("TINYCATS_KILLS", 60))


def child(work):
    "Run `work()` in a process of its own, which ends without cleaning up; its id."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException as e:
        print(f"child: {type(e).__name__}: {e}", file=sys.stderr)
    finally:
        os._exit(code)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def wait_for(condition, pid=None, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert pid is None or os.waitpid(pid, os.WNOHANG) == (0, 0), "the child has ended by itself"
        time.sleep(.0005)


def make_state(step, n=400_000):
    "A state that can be recomputed from its step alone."
    half = torch.full((1000,), step % 251, dtype=torch.bfloat16)
    return {"w": torch.arange(n, dtype=torch.float32) * step, "half": half, "names": ["cat", step]}


def assert_is_state(step, state):
    expected = make_state(step)
    for name in ("w", "half"):
        assert state[name].dtype == expected[name].dtype
        assert torch.equal(state[name], expected[name])
    assert state["names"] == expected["names"]


def stray_files(folder):
    "All files that are neither a checkpoint nor the lock file."
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return [p.name for p in files if p.name != ".lock" and p.suffix != ".pt"]


def test_killed_at_any_moment(tmp_path):
    "Killed again and again, mostly while it saves, a run resumes from its last finished save or the next."
    run, folder = tmp_path/"run", tmp_path/"run"/"checkpoints"
    shared = mmap.mmap(-1, 24)  # written by the child: step it began with, last step saved, saving now
    rng = random.Random(0)

    def peek():
        return struct.unpack("qqq", shared[:])

    def work():
        with RunLock(run) as lock:
            begun, _ = load_latest(folder) or (0, None)
            shared[:] = struct.pack("qqq", begun, -1, 0)
            for step in range(begun + 1, begun + 1000):
                lock.heartbeat()
                state = make_state(step)
                shared[16:] = struct.pack("q", 1)
                save_checkpoint(folder, step, state, keep=2)
                shared[:] = struct.pack("qqq", begun, step, 0)

    on_disk, mid_save, most = 0, 0, 0
    for k in range(KILLS):
        shared[:] = struct.pack("qqq", -1, -1, 0)
        pid = child(work)
        wait_for(lambda: peek()[k % 3 < 2] >= 0, pid)  # after its first save or, each third time, before it
        time.sleep(rng.uniform(0, .05))
        kill(pid)
        begun, saved, saving = peek()
        most = most + 1 if saved < 0 else 3  # keep=2, and one more for each kill between rename and prune
        saved, mid_save = max(begun, saved), mid_save + saving
        assert begun == on_disk  # it resumed from where the one before was killed
        (folder/".step_9999999.pt.part").write_bytes(b"half a chec")
        with warnings.catch_warnings(), RunLock(run):  # the next start
            warnings.simplefilter("error")  # not one damaged checkpoint, ever
            on_disk, state = load_latest(folder)
            assert saved <= on_disk <= saved + 1
            assert_is_state(on_disk, state)
            assert stray_files(run) == []
            assert 1 <= len(list_checkpoints(folder)) <= most
            assert list_checkpoints(folder)[on_disk].read_bytes()[:2] == b"PK"
    assert mid_save > KILLS / 2, f"only {mid_save} of {KILLS} kills hit a save"


def test_random_damage(tmp_path):
    "Cut anywhere or changed in any bit, the newest is passed over with exactly one warning that names it."
    save_checkpoint(tmp_path, 1, make_state(1, 2000))
    newest = save_checkpoint(tmp_path, 2, make_state(2, 2000))
    raw = newest.read_bytes()
    rng, expected = random.Random(1), make_state(1, 2000)
    for k in range(300):
        i = rng.randrange(len(raw)) if k > 73 else len(raw) - 1 - k
        flipped = raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1:]
        newest.write_bytes(raw[:i] if k % 3 == 0 else flipped)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step, state = load_latest(tmp_path)
        assert step == 1
        assert torch.equal(state["w"], expected["w"])
        assert len(caught) == 1
        assert newest.name in str(caught[0].message)
    for path in list_checkpoints(tmp_path).values():
        path.write_bytes(b"GIF89a")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="none is valid"):
        load_latest(tmp_path)
    assert load_latest(tmp_path/"new") is None


def test_the_newest_valid_one_is_never_removed(tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, make_state(step, 10), keep=9)
    for step in (3, 4, 5, 6):
        list_checkpoints(tmp_path)[step].write_bytes(b"")
    prune_checkpoints(tmp_path, keep=3)
    assert list(list_checkpoints(tmp_path)) == [6, 5, 4, 2]
    save_checkpoint(tmp_path, 3, make_state(3, 10), keep=1)  # the run resumes below the damaged ones
    assert list(list_checkpoints(tmp_path)) == [6, 3]
    with pytest.warns(UserWarning):
        assert load_latest(tmp_path)[0] == 3


def assert_full_disk_changes_nothing(folder, step, big):
    with pytest.raises(OSError) as e:
        save_checkpoint(folder, step, big, keep=1)
    message = str(e.value)
    assert f"step_{step:07d}.pt needs" in message
    assert "bytes" in message
    assert "\n" not in message
    assert os.listdir(folder) == ["step_0000001.pt"]
    assert load_latest(folder)[0] == 1
    return message


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root on Linux)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(tmp_path):
    with small_disk(tmp_path/"small", "3m") as disk:
        save_checkpoint(disk/"c", 1, make_state(1, 250_000))
        for step in (2, 3, 4):
            message = assert_full_disk_changes_nothing(disk/"c", step, make_state(step, 600_000))
            assert "No space left" in message
        save_checkpoint(disk/"c", 5, make_state(5, 250_000), keep=1)  # what fits is still saved
        assert list(list_checkpoints(disk/"c")) == [5]


def test_file_too_large(tmp_path):
    "The same by a limit on the size of files, which needs no rights."
    resource = pytest.importorskip("resource")
    save_checkpoint(tmp_path/"c", 1, make_state(1, 1000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert_full_disk_changes_nothing(tmp_path/"c", 2, make_state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_all_is_flushed_before_the_rename(tmp_path, monkeypatch):
    "For a power cut, which a kill cannot imitate: flush, rename, flush the folder, remove the old one."
    save_checkpoint(tmp_path, 1, {})
    calls = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def note_fsync(fd):
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    def note_replace(source, target):
        calls.append("rename")
        assert Path(source).parent == Path(target).parent
        replace(source, target)

    def note_unlink(path, **kwargs):
        calls.extend(["remove"] * (path.suffix == ".pt"))
        unlink(path, **kwargs)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(Path, "unlink", note_unlink)
    save_checkpoint(tmp_path, 2, {}, keep=1)
    assert calls == ["fsync file", "rename", "fsync folder", "remove"]


def lock_in_child(folder, **kwargs):
    "A process that holds `folder` until it is killed; its id."
    reader, writer = os.pipe()

    def work():
        with RunLock(folder, **kwargs):
            os.write(writer, b"locked")
            time.sleep(60)

    pid = child(work)
    os.close(writer)
    assert os.read(reader, 6) == b"locked"
    os.close(reader)
    return pid


def refusal(folder, **kwargs):
    "The one line with which a second run is refused."
    with pytest.raises(CheckpointError) as e:
        RunLock(folder, **kwargs).__enter__()
    assert "\n" not in str(e.value)
    return str(e.value)


def test_second_run_is_refused_until_the_first_is_killed(tmp_path):
    pid = lock_in_child(tmp_path)
    try:
        message = refusal(tmp_path)
        assert f"process {pid} on {os.uname().nodename}" in message
        assert re.search(r"begun \d s ago, last seen \d s ago", message)
        assert str(pid) in refusal(tmp_path, timeout_s=0)  # the file lock holds, whatever the heartbeat
    finally:
        kill(pid)
    with RunLock(tmp_path) as lock:
        assert lock.owner()["pid"] == os.getpid()
    assert os.listdir(tmp_path) == [".lock"]
    assert RunLock(tmp_path).owner() == {}


def test_a_refused_run_touches_nothing(tmp_path):
    "The temporary file may be the checkpoint that the owner is writing right now."
    pid = lock_in_child(tmp_path)
    part = tmp_path/"checkpoints"/".step_0000009.pt.0a1b2c3d.part"
    part.parent.mkdir()
    part.write_bytes(b"half a chec")
    try:
        refusal(tmp_path)
        assert part.exists()
        assert RunLock(tmp_path).owner()["pid"] == pid
    finally:
        kill(pid)


def test_heartbeats_are_frequent(tmp_path, monkeypatch):
    "By default a lock writes a heartbeat every 15 seconds, and counts as dead after a minute without."
    waits, lock = [], RunLock(tmp_path)

    def wait(seconds):
        waits.append(seconds)
        return len(waits) > 3

    monkeypatch.setattr(lock.stop, "wait", wait)
    with lock:
        lock.thread.join()
    assert waits == [lock.heartbeat_s] * 4
    assert lock.heartbeat_s <= lock.timeout_s / 4
    assert lock.timeout_s == 60


def test_never_two_at_a_time(tmp_path):
    "Four processes lock and release one folder; inside, each makes a file that must not be there."
    def work():
        won, end = 0, time.monotonic() + 1
        while time.monotonic() < end:
            try:
                with RunLock(tmp_path):
                    os.close(os.open(tmp_path/"inside", os.O_CREAT | os.O_EXCL))
                    time.sleep(.001)
                    os.remove(tmp_path/"inside")
                    won += 1
            except CheckpointError:
                pass
        (tmp_path/f"won {won} {os.getpid()}").touch()

    pids = [child(work) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0]*4
    assert sum(int(p.name.split()[1]) for p in tmp_path.glob("won *")) > 10


WATCH = dict(heartbeat_s=.1, timeout_s=1)  # short, so that the tests need not wait for a minute


def leave_lock(path, clock=0.):
    "The lock file of a process on another machine of the same name, whose clock differs by some seconds."
    host, now = os.uname().nodename, time.time() + clock
    owner = dict(host=host, pid=7, machine=f"{host} other", token="x", since=now - 500, time=now)
    path.write_text(json.dumps(owner))


@pytest.mark.parametrize("without_locks", [False, True])
@pytest.mark.parametrize("clock", [0, -10_000, 10_000], ids=["right", "slow", "fast"])
def test_another_machine_is_watched(tmp_path, monkeypatch, caplog, without_locks, clock):
    "Only whether its lock file changes counts, never its clock: alive it keeps the folder, gone it loses it."
    if without_locks:
        monkeypatch.setattr(checkpoint, "fcntl", None)
    lock_file, done = tmp_path/".lock", threading.Event()

    def beat():
        while not done.wait(.1):
            leave_lock(lock_file, clock)

    leave_lock(lock_file, clock)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        message = refusal(tmp_path, **WATCH)
    finally:
        done.set()
        thread.join()
    assert f"process 7 on {os.uname().nodename}" in message
    start = time.monotonic()
    with RunLock(tmp_path, **WATCH) as lock:
        assert lock.owner()["pid"] == os.getpid()
    assert time.monotonic() - start >= 1
    assert "watching for 1 s whether that is alive" in caplog.text


def test_nonsense_in_the_lock_file(tmp_path):
    for rubbish in (b"", b"\xff\xfe", b"[1]", b"{", b"["*4000, b"{}"*4000, b'{"token": 1}', b"x"*10**6):
        (tmp_path/".lock").write_bytes(rubbish)
        with RunLock(tmp_path) as lock:
            lock.heartbeat()
            assert (tmp_path/".lock").stat().st_size == 512


def test_heartbeat_alone(tmp_path, monkeypatch):
    "Without file locks a living process keeps the folder by its heartbeat; a killed one loses it later."
    monkeypatch.setattr(checkpoint, "fcntl", None)
    pid = lock_in_child(tmp_path, heartbeat_s=.05)
    try:
        assert f"process {pid}" in refusal(tmp_path, **WATCH)
    finally:
        kill(pid)
    with RunLock(tmp_path, **WATCH):
        pass


def test_a_run_taken_over_in_its_sleep_writes_nothing(tmp_path, monkeypatch):
    "SIGSTOP without file locks: a second run takes over; the first wakes, finds another owner and stops."
    monkeypatch.setattr(checkpoint, "fcntl", None)

    def work():
        with RunLock(tmp_path, heartbeat_s=.05) as lock:
            for n in range(10_000):
                time.sleep(.002)
                lock.check()
                with open(tmp_path/"first", "a") as file:
                    file.write(f"{n}\n")

    pid = child(work)
    wait_for(lambda: (tmp_path/"first").exists(), pid)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(.1)
    before = (tmp_path/"first").read_text()
    with RunLock(tmp_path, **WATCH) as second:
        os.kill(pid, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        second.heartbeat()
    after = (tmp_path/"first").read_text()
    assert after.startswith(before)
    assert after.count("\n") <= before.count("\n") + 1  # the one that it had begun


def test_a_partial_file_is_never_published_by_another_run(tmp_path):
    "A writer that lost its temporary file fails; it must not rename that of a second writer."
    path, replace = tmp_path/"a", os.replace

    def swept_and_rewritten(source, target):
        remove_partials(tmp_path)
        partial_path(path).write_bytes(b"half of the second run's cont")
        replace(source, target)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "replace", swept_and_rewritten)
        with pytest.raises(OSError, match="No such file"):
            atomic_write(path, b"the first run's content")
    assert not path.exists()


def test_removed_lock_file(tmp_path):
    "Without its lock file a run makes it anew, unless a second run was quicker."
    with RunLock(tmp_path) as first:
        os.remove(tmp_path/".lock")
        first.heartbeat()
        assert f"process {os.getpid()}" in refusal(tmp_path)
        os.remove(tmp_path/".lock")
        pid = lock_in_child(tmp_path)
        try:
            with pytest.raises(CheckpointError, match=f"taken over by process {pid} "):
                first.check()
        finally:
            kill(pid)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("elsewhere")],
                         ids=["pipe", "folder", "link"])
def test_what_is_no_file_is_refused(tmp_path, make):
    "As a lock file and as a checkpoint; nothing waits for a pipe and nothing is written through a link."
    make(tmp_path/".lock")
    before = psutil.Process().num_fds()
    assert ".lock is no regular file: remove it" in refusal(tmp_path)
    assert psutil.Process().num_fds() == before
    (tmp_path/"checkpoints").mkdir()
    make(tmp_path/"checkpoints/step_0000009.pt")
    with pytest.raises(CheckpointError, match="step_0000009.pt"):
        load_checkpoint(tmp_path/"checkpoints/step_0000009.pt")
    assert not (tmp_path/"elsewhere").exists()


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
def test_another_users_folder(tmp_path):
    "A run folder that this user may not write to: one line with the remedy."
    (tmp_path/"run").mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == os.environ.get("USER", "root") and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o055)

    def work():
        if os.geteuid() == 0:
            os.setuid(65534)
        else:
            (tmp_path/"run").chmod(0o555)
        assert "choose another run, or have the owner of the folder changed" in refusal(tmp_path/"run")

    assert os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1]) == 0


class Malicious:
    "An object whose pickle calls a function."
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("forced", [None, "1"])
def test_a_malicious_pickle_runs_nothing(tmp_path, monkeypatch, forced):
    "With and without a checksum, and also where the environment makes torch trust everybody."
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    hacked, folder = tmp_path/"hacked", tmp_path/"c"
    save_checkpoint(folder, 1, make_state(1, 10))
    calls = [(os.system, f"touch '{hacked}'"), (os.mkdir, str(hacked)), (eval, f"open({str(hacked)!r}, 'w')")]
    for call in calls:
        path = folder/"step_0000002.pt"
        plain = pickle.dumps({"step": 2, "state": Malicious(*call)})
        torch.save({"step": 2, "state": Malicious(*call)}, path)
        zipped = path.read_bytes()
        with_checksum = [plain + checkpoint._checksum(plain), zipped[:-2] + checkpoint._checksum(zipped[:-2])]
        for raw in (plain, zipped, *with_checksum):
            path.write_bytes(raw)
            with pytest.raises(CheckpointError) as e:
                load_checkpoint(path)
            assert path.name in str(e.value)
            assert "\n" not in str(e.value)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert load_latest(folder)[0] == 1
            assert len([w for w in caught if path.name in str(w.message)]) == 1
            assert not hacked.exists()
    pickle.loads(plain)
    assert hacked.exists()  # the trap works: only `load_checkpoint` does not step into it


def test_what_could_not_be_loaded_is_not_written(tmp_path):
    for bad in (tmp_path, lambda: 0, Malicious(print), np.float64(1), open(os.devnull)):
        with pytest.raises(CheckpointError, match="step 3 cannot be saved") as e:
            save_checkpoint(tmp_path/"c", 3, {"bad": bad})
        assert "\n" not in str(e.value)
    assert list_checkpoints(tmp_path/"c") == {}
    assert stray_files(tmp_path) == []


def test_atomic_write_of_other_files(tmp_path):
    path = tmp_path/"config.json"
    assert atomic_write(path, '{"class": "Maine_Coon"}').read_text() == '{"class": "Maine_Coon"}'
    assert atomic_write(path, b"{}").read_bytes() == b"{}"
    assert os.listdir(tmp_path) == ["config.json"]
