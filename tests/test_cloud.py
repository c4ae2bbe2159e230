"""The training notebook in Modal's containers, run with Modal's own client and container entrypoint against a
stand-in for its servers, and what can be tested without either."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers import LONG, has_shared, shared, slow
from test_folder import write_pictures
from tinycats import cloud
from tinycats.checkpoint import list_checkpoints
from tinycats.data import BREEDS
from tinycats.toy import toy_cats

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    data="pets", image_size=16, patch_size=8, dim=16, depth=1, num_heads=2, steps=300, batch_size=4,
    warmup_steps=5, ema_decay=[.5], log_every=2, sample_every=150, checkpoint_every=20, samples=1,
    num_steps=2, precision="fp32")
TOY = TINY | dict(data="toy", toy_images=13)
MODAL_RUN = ["modal", "run", "-m", "tinycats.cloud"]
MODAL_RUN_DETACHED = ["modal", "run", "--detach", "-m", "tinycats.cloud"]
PYTHON = [sys.executable, "-m", "tinycats.cloud"]


def flags(**params):
    "Parameters as words of a command line."
    words = []
    for name, value in params.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def environment(**more):
    "This process's environment without what Modal or a run put there."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MODAL_", "TINYCATS_"))}
    return kept | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") | more

CONTROL_PLANE = "modal/modal_offline.py"
HAS_CONTAINERS = sys.platform.startswith("linux") and os.geteuid() == 0 and has_shared(CONTROL_PLANE)


def run_offline(there, command, *words, faults=()):
    "A command against a stand-in for Modal's servers; the committed volumes outlive it, in there/state."
    script = shared(CONTROL_PLANE)
    if not HAS_CONTAINERS:
        pytest.skip("modal_offline.py needs Linux and root")
    (there/"home").mkdir(exist_ok=True)
    (there/"home"/"settings.ini").write_text("lib_name = tinycats\n")
    command = [sys.executable, script, "--state", there/"state", "--faults", json.dumps(list(faults)), "--",
               *command, *words]
    done = subprocess.run(command, cwd=there/"home", env=environment(), capture_output=True, text=True)
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert not summary["unimplemented"], (summary, done.stderr)
    assert not summary["faults_unused"], (summary, done.stderr)
    return summary, done


def volume(there, name=cloud.OUTPUTS_VOLUME):
    return there/"state"/"volumes"/name


def newest(checkpoints):
    "The step of the newest checkpoint in a folder, 0 without one."
    return max(list_checkpoints(checkpoints), default=0)


def endings(summary):
    return [a["end"] for a in sorted(summary["attempts"], key=lambda a: a["attempt"])]


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def first_step(there, number):
    "The first step that the n-th container of the last run reported."
    log = max((there/"state"/"tasks").glob(f"*-{number}/log"), key=lambda p: int(p.parent.name.split("-")[0]))
    return int(re.search(r"step +(\d+)/", log.read_text())[1])


def complete_weights(folder, steps=300):
    "A run's weights, once it is seen to be complete: every record once, report, pictures and config there."
    records = [json.loads(line) for line in open(folder/"metrics.jsonl")]
    assert [record["step"] for record in records] == list(range(2, steps + 1, 2))
    config = json.loads((folder/"config.json").read_text())
    assert config["step"] == steps
    assert "wall_seconds" in config
    assert (folder/"samples"/"final.png").exists()
    assert f": {steps} steps, " in (folder/"train.ipynb").read_text()
    ema = {f"ema {name}": tensor for name, tensor in load_file(folder/"ema.safetensors").items()}
    return load_file(folder/"model.safetensors") | ema


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    "Oxford-IIIT Pet in its own layout, with 26 toy cats in it: the folder, and the archives as downloaded."
    base = tmp_path_factory.mktemp("pets")/"oxford-iiit-pet"
    (base/"images").mkdir(parents=True)
    (base/"annotations").mkdir()
    rows = []
    for i, (image, label) in enumerate(zip(*toy_cats(26, 24, seed=3))):
        breed = BREEDS[label]
        name = f"{'beagle' if breed == 'Other' else breed}_{i}"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(base/"images"/f"{name}.jpg")
        rows.append(f"{name} {label + 1} {2 if breed == 'Other' else 1} 1\n")
    for name, lines in dict(trainval=rows[:20], test=rows[20:], list=rows).items():
        (base/"annotations"/f"{name}.txt").write_text("".join(lines))
    for part in ("images", "annotations"):
        shutil.make_archive(base/part, "gztar", base, part)
    return base


def fill_data_volume(there, pets):
    "The data volume as it is once the archives have been downloaded."
    volume(there, cloud.DATA_VOLUME).mkdir(parents=True)
    for archive in pets.glob("*.tar.gz"):
        shutil.copy(archive, volume(there, cloud.DATA_VOLUME))


def train_command(**params):
    "Python that runs the notebook without a container."
    return [sys.executable, "-c", f"from tinycats.cloud import train; print(train.local({params!r}))"]


@pytest.fixture(scope="module")
def undisturbed(pets, tmp_path_factory):
    "A run on this computer that was not disturbed: its weights, its folder, and how long it took."
    there = tmp_path_factory.mktemp("undisturbed")
    (there/"settings.ini").write_text("lib_name = tinycats\n")
    start = time.monotonic()
    command = train_command(**TINY, run="undisturbed", data_root=str(pets.parent))
    done = subprocess.run(command, cwd=there, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = there/"outputs"/"undisturbed"
    return dict(weights=complete_weights(folder), folder=folder, seconds=time.monotonic() - start)


# -- In containers -------------------------------------------------------------------------------------------

@slow("one and a half minutes")
def test_sweep_of_three_interrupted_three_times(tmp_path, pets, undisturbed):
    """The data are prepared once, and three containers run side by side. SIGINT to the main process of the
    first, SIGINT to all processes of the second, kill -9 for the third."""
    fill_data_volume(tmp_path, pets)
    (tmp_path/"sweep.yaml").write_text("- {run: a, keep: 2}\n- {run: b, keep: 3}\n- {run: c, keep: 4}\n")
    plans = dict(a=("sigint", "main", 40), b=("sigint", "all", 60), c=("kill", "", 40))
    faults = []
    for i, (run, (kind, to, step)) in enumerate(plans.items()):
        when = {"when": f"{run}/checkpoints/step_00000{step}.pt", "in": "committed"}
        faults.append(dict(function="train", input=i, kind=kind, to=to) | when)
    summary, done = run_offline(
        tmp_path, MODAL_RUN, "--sweep", str(tmp_path/"sweep.yaml"), "--gpu", "rtx-pro-6000", *flags(**TINY),
        faults=faults)
    assert summary["exit"] == 0, done.stdout + done.stderr
    assert sorted(endings(summary)) == ["kill", "sigint", "sigint"] + ["success"]*4
    assert not any(a["retry"] for a in summary["attempts"])
    check_interrupts(tmp_path)
    for i, run in enumerate("abc"):
        assert_same(complete_weights(volume(tmp_path)/run), undisturbed["weights"])
        assert_same(complete_weights(tmp_path/"home"/"outputs"/run), undisturbed["weights"])  # downloaded
        ours = [a for a in summary["attempts"] if (a["function"], a["input"]) == ("train", i)]
        last = next(a["attempt"] for a in ours if a["end"] == "success")
        assert first_step(tmp_path, last) > (20, 40, 40)[i]  # resumed from what was committed
        assert f"{run}: step 300" in done.stdout
    assert not list((tmp_path/"home"/"outputs").glob("*/checkpoints"))
    assert not list((tmp_path/"home").rglob("*.part"))
    check_definitions(tmp_path)
    check_sweep_page(tmp_path/"home")


def check_interrupts(there):
    "The interrupted containers ended by themselves, and well in time."
    log = (there/"state"/"log").read_text()
    assert "killed after grace" not in log
    for i in range(2):
        task = re.search(rf"^.* fault (ta-\d+) .*\"input\": {i},", log, re.M)[1]
        struck = float(re.search(rf"^(\S+) run 1 fault {task} ", log, re.M)[1])
        ended = float(re.search(rf"^(\S+) run 1 end {task} ", log, re.M)[1])
        assert ended - struck < 20


def check_definitions(there):
    "What Modal was given: image, files, volumes, time limit and retries; the GPU only with the calls."
    functions = json.loads((there/"state"/"definitions.json").read_text())["functions"]
    assert set(functions) == {"train", "evaluate", "prepare", "store_pictures"}
    train = functions["train"]
    commands = "\n".join(train["image_commands"])
    for part in ("FROM python:3.11", "slim", "-c /constraints.txt", "torch", "OMP_NUM_THREADS=1"):
        assert part in commands
    names = {path.split("/")[-1] for path in train["files"]}
    assert names >= {"train.ipynb", "cloud.py", "settings.ini", "constraints.txt"}
    assert not [path for path in train["files"] if "test" in path or "outputs" in path]
    assert train["timeout_secs"] == 86_400
    assert train["retry_policy"]["retries"] == 4
    assert [v["mount_path"] for v in train["volume_mounts"]] == ["/cats/outputs", "/cats/store"]
    for function in functions.values():
        assert "gpu_type" not in function["resources"].get("gpu_config", {})
    bound = re.findall(r" bind \S+ (\w+) (.*)$", (there/"state"/"log").read_text(), re.M)
    assert bound
    assert all(name == "train" for name, _ in bound)
    assert all('gpu_type: "RTX-PRO-6000"' in options for _, options in bound)


def check_sweep_page(home):
    "sweep.ipynb compares the three runs."
    options = ["--no-progress-bar", "--log-level", "WARNING", "-p", "runs", "a,b,c", "-p", "num_steps", "2"]
    command = [sys.executable, "-m", "papermill", ROOT/"nbs"/"sweep.ipynb", "sweep.ipynb", *options]
    done = subprocess.run(command, cwd=home, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = []
    for cell in json.loads((home/"sweep.ipynb").read_text())["cells"]:
        shown += [output["data"] for output in cell.get("outputs", []) if "data" in output]
    assert len([data for data in shown if "image/png" in data]) >= 2
    table = "".join("".join(data.get("text/markdown", [])) for data in shown)
    assert "| keep | 2 | 3 | 4 |" in table
    assert "| step | 300 | 300 | 300 |" in table
    assert "| steps |" not in table


def hang(there, run, until):
    "Once a run's newest committed checkpoint has reached a step, its kernel hangs. Work of a thread."
    while newest(volume(there)/run/"checkpoints") < until:
        time.sleep(.05)
    for process in psutil.Process().children(recursive=True):
        if "ipykernel_launcher" in process.cmdline():
            process.suspend()


def test_failed_cell_then_time_limit_then_nothing_to_do(tmp_path, pets, undisturbed):
    """Detached, so the servers try again: after a cell that fails, and after a kernel that hangs until its
    time is up. Complete, the run returns immediately."""
    fill_data_volume(tmp_path, pets)
    (volume(tmp_path)/"d"/"samples"/"step_0000150.png").mkdir(parents=True)  # the sheet cannot be saved
    threading.Thread(target=hang, args=(tmp_path, "d", 200), daemon=True).start()
    limit = max(10, int(1.4*undisturbed["seconds"]))
    summary, done = run_offline(
        tmp_path, MODAL_RUN_DETACHED, *flags(run="d", **TINY), "--retries", "8", "--timeout", str(limit))
    trained = [a for a in summary["attempts"] if a["function"] == "train"]
    attempts = sorted(trained, key=lambda a: a["attempt"])
    ends = [a["end"] for a in attempts]
    assert ends[:2] == ["failure", "timeout"], done.stdout + done.stderr
    assert ends[-1] == "success", done.stdout + done.stderr
    assert [a["retry"] for a in attempts] == list(range(len(attempts)))
    assert "IsADirectoryError" in attempts[0]["error"]
    assert "\n" not in attempts[0]["error"]
    assert_same(complete_weights(volume(tmp_path)/"d"), undisturbed["weights"])
    assert first_step(tmp_path, 3) > 150
    assert first_step(tmp_path, 4) > 200
    assert "d: submitted" in done.stdout
    assert not (tmp_path/"home"/"outputs").exists()

    before = contents(volume(tmp_path))
    summary, done = run_offline(tmp_path, PYTHON, *flags(run="d", **TINY))
    assert endings(summary) == ["success"]*2
    assert all(a["seconds"] < 8 for a in summary["attempts"])
    assert "steps/s" not in done.stdout
    assert before == contents(volume(tmp_path))
    assert_same(complete_weights(tmp_path/"home"/"outputs"/"d"), undisturbed["weights"])


def test_pictures_of_ones_own(tmp_path):
    """A folder is packed and uploaded once; a second run finds it there; both know its classes, and an
    evaluation in the cloud finds the pictures of its run."""
    write_pictures(tmp_path/"home/mine", 3, 6)
    words = flags(**TOY | dict(data="folder", data_root="mine", steps=4, sample_every=0))
    for run, state in (("one", "uploading"), ("two", "in the volume")):
        summary, done = run_offline(tmp_path, PYTHON, "--run", run, *words)
        assert summary["exit"] == 0, done.stdout + done.stderr
        assert "mine: 18 pictures: Sort 00 6, Sort 01 6, Sort 02 6; 6 held out" in done.stdout
        assert state in done.stdout
        config = json.loads((tmp_path/"home/outputs"/run/"config.json").read_text())
        assert config["classes"] == ["Sort 00", "Sort 01", "Sort 02"]
        assert config["data_root"] == "mine"
    (packed,) = volume(tmp_path, cloud.DATA_VOLUME).glob("folders/*")
    assert (volume(tmp_path)/"one/.pictures").read_text() == packed.stem
    if not LONG:
        return
    quick = flags(run="one", samples=1, num_steps=2, fid="false", precision="fp32")
    summary, done = run_offline(tmp_path, PYTHON, "--notebook", "evaluate", *quick)
    assert summary["exit"] == 0, done.stdout + done.stderr
    (scores,) = (tmp_path/"home/outputs/one").glob("evaluation/*/scores.json")
    assert set(json.loads(scores.read_text())["class_accuracy_by_class"]) == {"Sort 00", "Sort 01", "Sort 02"}


def test_python_detaches(tmp_path):
    "`python -m tinycats.cloud --detach` hands the run over, with GPUs, time limit and retries as given."
    words = flags(**TOY | dict(run="far", steps=2))
    summary, done = run_offline(
        tmp_path, PYTHON, "--detach", "--gpu", "h100!:2", "--timeout", "600", "--retries", "2", *words)
    assert summary["exit"] == 0, done.stdout + done.stderr
    assert endings(summary) == ["success"]
    assert "far: submitted" in done.stdout
    assert not (tmp_path/"home"/"outputs").exists()
    complete_weights(volume(tmp_path)/"far", steps=2)
    record, = [json.loads(line) for line in open(volume(tmp_path)/"far"/"metrics.jsonl")]
    assert record["processes"] == 2  # one for each GPU
    bound = re.search(r" bind \S+ train (.*)$", (tmp_path/"state"/"log").read_text(), re.M)[1]
    for option in ('gpu_type: "H100!"', "count: 2", "timeout_secs: 600", "retries: 2", "milli_cpu: 4000",
                   "memory_mb: 16384"):
        assert option in bound


def test_detach_of_modal_run_goes_before_the_module(tmp_path):
    summary, done = run_offline(tmp_path, MODAL_RUN, *"--detach --run far".split())
    assert summary["exit"] == 1
    assert summary["attempts"] == []
    assert "modal run --detach -m tinycats.cloud" in done.stderr.strip().splitlines()[-1]


def test_one_container_a_run(tmp_path, monkeypatch):
    "A lock whose heartbeats go on is another's: refused in one line, not tried again; the report stays."
    folder = tmp_path/"outputs"/"g"
    folder.mkdir(parents=True)
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    (folder/"train.ipynb").write_text("the owner's report")
    lock_file = folder/".lock"
    owner = dict(host="tabby", pid=41, machine="another call", token="x", since=time.time() - 100, time=0)
    lock_file.write_text(json.dumps(owner))
    volume = Mock()
    volume.reload = lambda: lock_file.write_text(json.dumps(owner | dict(time=time.time())))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cloud, "outputs_volume", volume)
    monkeypatch.setattr(cloud.modal, "is_local", lambda: False)
    for name in ("PYTHONPATH", "TINYCATS_VOLUME", "TINYCATS_OWNER"):
        monkeypatch.setenv(name, "")
    before = contents(folder)
    done = cloud.train.local(TOY | dict(run="g"), "this call")
    assert done["error"].startswith(f"CheckpointError: {folder} is in use by process 41 on tabby")
    now = contents(folder)
    assert json.loads(now.pop(lock_file))["token"] == "x"
    assert now.items() == {path: content for path, content in before.items() if path != lock_file}.items()


@pytest.mark.parametrize("command", [MODAL_RUN, PYTHON], ids=["modal", "python"])
def test_a_missing_run_is_refused_before_a_container_starts(tmp_path, command):
    summary, done = run_offline(tmp_path, command, *"--notebook evaluate --run nowhere".split())
    assert summary["exit"] == 1
    assert summary["attempts"] == []
    assert "run='nowhere'" in done.stderr.strip().splitlines()[-1]


@slow("half a minute")
def test_evaluate_in_a_container(tmp_path, pets, undisturbed):
    fill_data_volume(tmp_path, pets)
    shutil.copytree(undisturbed["folder"], volume(tmp_path)/"pets")
    words = flags(run="pets", samples=1, num_steps=2, data_root="data", fid="false")
    summary, done = run_offline(tmp_path, MODAL_RUN, "--notebook", "evaluate", *words)
    assert summary["exit"] == 0, done.stdout + done.stderr
    assert endings(summary) == ["success"], done.stdout + done.stderr
    home = tmp_path/"home"/"outputs"/"pets"/"evaluation"
    assert list(home.glob("*/scores.json"))
    assert (home/"evaluate.ipynb").exists()
    assert list(volume(tmp_path).glob("pets/evaluation/*/scores.json"))


# -- Without Modal -------------------------------------------------------------------------------------------

COMMIT_TO_FOLDER = """import os
if "COMMITTED" in os.environ:
    import modal, pathlib, shutil
    def commit(volume):  # what Volume.commit does, for a folder: file by file, each atomically
        live, home = pathlib.Path.cwd()/"outputs", pathlib.Path(os.environ["COMMITTED"])
        for p in live.rglob("*"):
            if p.is_dir() or p.suffix == ".part":
                continue
            there = home/p.relative_to(live)
            there.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copy2(p, home.parent/"incoming")
                os.replace(home.parent/"incoming", there)
            except FileNotFoundError:
                pass
    modal.Volume.commit = commit
"""


@pytest.fixture
def committed(tmp_path):
    "A folder that takes the place of the outputs volume in processes with `attempt_environment`."
    (tmp_path/"path").mkdir()
    (tmp_path/"path"/"sitecustomize.py").write_text(COMMIT_TO_FOLDER)
    (tmp_path/"committed").mkdir()
    return tmp_path/"committed"


def attempt(committed, number, until, stop, data_root):
    """Train in a fresh folder that holds what was committed; once there is a checkpoint of step `until`, send
    a signal. Returns the folder, and how the process ended: code, output, seconds after the signal."""
    there = committed.with_name(f"attempt{number}")
    there.mkdir()
    (there/"settings.ini").write_text("lib_name = tinycats\n")
    shutil.copytree(committed, there/"outputs")
    env = environment(
        COMMITTED=str(committed), TINYCATS_VOLUME=cloud.OUTPUTS_VOLUME, TINYCATS_OWNER="one call",
        PYTHONPATH=f"{committed.with_name('path')}:{ROOT}")
    process = subprocess.Popen(
        train_command(**TINY, run="s", data_root=data_root), cwd=there, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    while newest(committed/"s"/"checkpoints") < until and process.poll() is None:
        time.sleep(.02)
    start = time.monotonic()
    if stop == signal.SIGKILL:
        for victim in (*psutil.Process(process.pid).children(), psutil.Process(process.pid)):
            victim.kill()
    elif stop:
        process.send_signal(stop)
    output = process.communicate()[0]
    return there, dict(code=process.returncode, output=output, seconds=time.monotonic() - start)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals as on Linux and macOS")
def test_killed_and_interrupted_only_what_was_committed_survives(committed, pets, undisturbed):
    """The kernel commits into a folder, which is all that each next attempt, in a fresh place, begins with.
    Where containers can be had, the tests above do the same to them."""
    if HAS_CONTAINERS:
        pytest.skip("tried in containers")
    data_root = str(pets.parent)
    _, end = attempt(committed, 1, 40, signal.SIGKILL, data_root=data_root)
    assert end["code"] == -9
    before = newest(committed/"s"/"checkpoints")
    assert before >= 40

    there, end = attempt(committed, 2, 80, signal.SIGINT, data_root=data_root)
    assert end["code"] not in (0, -9)
    assert end["seconds"] < 20
    assert "KeyboardInterrupt: stopped by signal" in end["output"]
    saved = newest(there/"outputs"/"s"/"checkpoints")
    assert saved < 300
    assert newest(committed/"s"/"checkpoints") == saved  # saved on the way out, and committed

    there, end = attempt(committed, 3, 10**9, None, data_root=data_root)
    assert end["code"] == 0, end["output"]
    assert "'step': 300" in end["output"]
    assert int(re.search(r"step +(\d+)/", end["output"])[1]) > 80
    assert_same(complete_weights(there/"outputs"/"s"), undisturbed["weights"])


def run_without_account(where, *words):
    "`python -m tinycats.cloud` on a computer without an account."
    env = environment(MODAL_CONFIG_PATH=str(where/"none"))
    return subprocess.run([*PYTHON, *words], cwd=where, env=env, capture_output=True, text=True)


REFUSED = {
    "--steps 5": "modal token new", "--gpu RTX": "gpu='RTX'", "--stepz 5": "did you mean steps",
    "--params fulll": "full, ", "--timeout 90000": "86400", "--steps": "whole number",
    "--sweep full": "list of parameter sets", "pull": "required: run", "pull ../x": "run='../x'"}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_in_one_line_before_anything_starts(tmp_path, words):
    done = run_without_account(tmp_path, *words.split())
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert REFUSED[words] in done.stderr


def test_a_local_run_is_not_overwritten(tmp_path):
    (tmp_path/"outputs"/"demo").mkdir(parents=True)
    (tmp_path/"outputs"/"demo"/"config.json").write_text("{}")
    done = run_without_account(tmp_path, "--steps", "5")
    assert done.returncode == 1
    assert "holds a run of this computer" in done.stderr


def test_dry_run_and_help_need_no_account(tmp_path):
    done = run_without_account(tmp_path, *"--sweep sweep --params full --dry-run --gpu h100".split())
    assert done.returncode == 0
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
    for part in ("Debian slim with gcc, Python 3.11", "pip install torch", "/cats/nbs/train.ipynb", "H100",
                 "tinycats-outputs at /cats/outputs", "outputs/lr-high/train.ipynb", "3 runs together"):
        assert part in done.stdout
    done = run_without_account(tmp_path, "--help")
    assert done.returncode == 0
    assert "--gpu" in done.stdout
    assert "# highest learning rate" in done.stdout


def test_importing_reads_no_command_line(tmp_path):
    "Whatever stands in sys.argv, and without settings.ini: a copy of the package alone can be imported."
    shutil.copytree(ROOT/"tinycats", tmp_path/"tinycats", ignore=shutil.ignore_patterns("__pycache__"))
    code = ("import sys\nsys.argv = ['modal', 'run', '-m', 'tinycats.cloud', '--stepz', '5', '--help']\n"
            "import tinycats.cloud\nprint('torch' in sys.modules, tinycats.cloud.__file__)\n"
            "tinycats.cloud.run_cli(['--dry-run'])")
    env = environment(PYTHONPATH=str(tmp_path), MODAL_CONFIG_PATH=str(tmp_path/"none"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.startswith(f"False {tmp_path}"), done.stderr
    assert done.returncode == 1
    assert "install tinycats again" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
