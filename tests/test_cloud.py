"The training notebook in Modal's containers, played through with Modal's own client and entrypoint, and what can be said without either."
import json, os, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

import psutil, pytest, torch
from PIL import Image
from helpers import shared
from safetensors.torch import load_file
from tinycats import cloud
from tinycats.checkpoint import steps as checkpoints
from tinycats.data import BREEDS, toy_cats

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(data="pets", image_size=16, patch_size=8, dim=16, depth=1, num_heads=2, steps=300, batch_size=4, warmup_steps=5, ema_decay=[.5],
            log_every=2, sample_every=150, checkpoint_every=20, samples=1, num_steps=2, precision="fp32")


def words(**params): return [w for k, v in params.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def env(**more): return {k: v for k, v in os.environ.items() if not k.startswith(("MODAL_", "TINYCATS_"))} | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") | more


def modal_run(there, *told, faults=(), options=(), binds=()):
    "`modal run -m tinycats.cloud ...` against a stand-in for Modal's servers; its committed volumes outlive the call, in there/state."
    script = shared("modal/modal_offline.py")
    if not sys.platform.startswith("linux") or os.geteuid(): pytest.skip("modal_offline.py needs Linux and root")
    (there/"home").mkdir(exist_ok=True); (there/"home/settings.ini").touch()
    done = subprocess.run([sys.executable, script, "--state", there/"state", "--faults", json.dumps(list(faults)), *(x for b in binds for x in ("--bind", b)), "--",
                           "modal", "run", *options, "-m", "tinycats.cloud", *told], cwd=there/"home", env=env(), capture_output=True, text=True)
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert not summary["unimplemented"] and not summary["faults_unused"], (summary, done.stderr)
    return summary, done


def volume(there, name=cloud.OUTPUTS): return there/"state/volumes"/name


def ends(summary): return [a["end"] for a in sorted(summary["attempts"], key=lambda a: a["attempt"])]


def first_step(there, number):
    "The first step that the n-th container of the last run reported."
    log = max((there/"state/tasks").glob(f"*-{number}/log"), key=lambda p: int(p.parent.name.split("-")[0]))
    return int(re.search(r"step +(\d+)/", log.read_text())[1])


def complete(folder, steps=300):
    "A run's weights, once it is seen to be whole: all records once, the last checkpoint good, report and pictures there."
    assert [json.loads(line)["step"] for line in open(folder/"metrics.jsonl")] == list(range(2, steps + 1, 2))
    config = json.loads((folder/"config.json").read_text())
    assert config["step"] == steps and "wall_seconds" in config
    assert (folder/"samples/final.png").exists() and "What to look at" in (folder/"train.ipynb").read_text()
    return load_file(folder/"model.safetensors") | {f"ema {k}": v for k, v in load_file(folder/"ema.safetensors").items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    "Oxford-IIIT Pet in its own layout, with 26 toy cats in it: the folder, and the two archives as they are downloaded."
    base = tmp_path_factory.mktemp("pets")/"oxford-iiit-pet"
    (base/"images").mkdir(parents=True); (base/"annotations").mkdir()
    pictures, labels = toy_cats(26, 24, seed=3)
    lines = {"trainval": [], "test": []}
    for i, (p, b) in enumerate(zip(pictures, labels.tolist())):
        name = f"{'beagle' if BREEDS[b] == 'Other' else BREEDS[b]}_{i}"
        Image.fromarray(p.permute(1, 2, 0).numpy()).save(base/f"images/{name}.jpg")
        lines["trainval" if i < 20 else "test"].append(f"{name} {b + 1} {2 if BREEDS[b] == 'Other' else 1} 1\n")
    for name, rows in (lines | {"list": lines["trainval"] + lines["test"]}).items(): (base/f"annotations/{name}.txt").write_text("".join(rows))
    for part in ("images", "annotations"): shutil.make_archive(base/part, "gztar", base, part)
    return base


def fill(there, pets):
    "The data volume as it is once the archives have been downloaded."
    volume(there, cloud.DATA).mkdir(parents=True)
    for archive in pets.glob("*.tar.gz"): shutil.copy(archive, volume(there, cloud.DATA))


@pytest.fixture(scope="module")
def whole(pets, tmp_path_factory):
    "The weights of a run that nobody disturbed, on this computer, and how long it took."
    there = tmp_path_factory.mktemp("whole")
    (there/"settings.ini").touch()
    start = time.time()
    done = subprocess.run([sys.executable, "-c", f"from tinycats.cloud import train; print(train.local({TINY | dict(run='whole', data_root=str(pets.parent))!r}))"], cwd=there, env=env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(weights=complete(there/"outputs/whole"), folder=there/"outputs/whole", seconds=time.time() - start)


def test_a_sweep_of_three_struck_three_times(tmp_path, pets, whole):
    "The data are prepared once. Three containers side by side. SIGINT to the first one's main process, SIGINT to all processes of the second, kill -9 for the third."
    fill(tmp_path, pets)
    (tmp_path/"sweep.yaml").write_text("- {run: a, keep: 2}\n- {run: b, keep: 3}\n- {run: c, keep: 4}\n")
    faults = [dict(function="train", input=i, kind=kind, to=to, when=f"{run}/checkpoints/step_00000{at}.pt", **{"in": "committed"})
              for i, (run, kind, to, at) in enumerate([("a", "sigint", "main", 40), ("b", "sigint", "all", 60), ("c", "kill", "", 40)])]
    summary, done = modal_run(tmp_path, "--sweep", str(tmp_path/"sweep.yaml"), *words(**TINY), faults=faults)
    assert summary["exit"] == 0, done.stdout + done.stderr
    assert sorted(ends(summary)) == ["kill", "sigint", "sigint"] + ["success"]*4 and all(a["retry"] == 0 for a in summary["attempts"])
    log = (tmp_path/"state/log").read_text()
    assert "killed after grace" not in log                                                    # left by itself, and well in time
    for i in range(2):
        task = re.search(rf"^.* fault (ta-\d+) .*\"input\": {i},", log, re.M)[1]
        struck, left = (float(re.search(rf"^(\S+) run 1 {what} {task} ", log, re.M)[1]) for what in ("fault", "end"))
        assert left - struck < 20
    for i, run in enumerate("abc"):
        assert same(complete(volume(tmp_path)/run), whole["weights"]) and same(complete(tmp_path/"home/outputs"/run), whole["weights"])   # there, and brought home
        again = [a["attempt"] for a in summary["attempts"] if (a["function"], a["input"], a["end"]) == ("train", i, "success")][0]
        assert first_step(tmp_path, again) > (20, 40, 40)[i]                                   # went on from what was committed
        assert f"{run}: step 300" in done.stdout
    assert not list((tmp_path/"home/outputs").glob("*/checkpoints")) and not list((tmp_path/"home").rglob("*.part"))
    definitions(json.loads((tmp_path/"state/definitions.json").read_text()))
    side_by_side(tmp_path/"home")


def definitions(d):
    "What Modal was told: image, files, volumes, GPU, time limit, retries."
    f = d["functions"]["train"]
    commands = "\n".join(f["image_commands"])
    assert "FROM python:3.11" in commands and "slim" in commands and "-c /constraints.txt" in commands and "torch" in commands and "OMP_NUM_THREADS=1" in commands
    assert "/constraints.txt" in f["files"] or any("constraints.txt" in x for x in f["files"])
    assert {x.split("/")[-1] for x in f["files"]} >= {"train.ipynb", "cloud.py", "settings.ini", "constraints.txt"} and not any("test" in x or "outputs" in x for x in f["files"])
    assert f["resources"]["gpu_config"] == dict(gpu_type="L40S", count=1) and f["timeout_secs"] <= 86_400 and f["retry_policy"]["retries"] == 4
    assert [v["mount_path"] for v in f["volume_mounts"]] == ["/cats/outputs", "/cats/store"]
    assert "gpu_type" not in d["functions"]["prepare"]["resources"].get("gpu_config", {}) and {"train", "evaluate", "prepare"} == set(d["functions"])


def side_by_side(home):
    "sweep.ipynb lays the three runs beside each other."
    done = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING", ROOT/"nbs/sweep.ipynb", "sweep.ipynb", "-p", "runs", "a,b,c", "-p", "num_steps", "2"],
                          cwd=home, env=env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = json.loads((home/"sweep.ipynb").read_text())
    shown = [o["data"] for c in page["cells"] for o in c.get("outputs", []) if "data" in o]
    assert len([d for d in shown if "image/png" in d]) >= 2
    table = "".join("".join(d.get("text/markdown", [])) for d in shown)
    assert "| keep | 2 | 3 | 4 |" in table and "| step | 300 | 300 | 300 |" in table and "| steps |" not in table


def hang(there, run, until, state="state"):
    "Once a run's newest published checkpoint is so far, its kernel hangs. A thread's work."
    while max(checkpoints(there/state/"volumes"/cloud.OUTPUTS/run/"checkpoints"), default=0) < until: time.sleep(.05)
    mine = [p for p in psutil.Process().children(recursive=True) if "ipykernel_launcher" in p.cmdline()]
    for p in mine: p.suspend()


def test_a_crashed_cell_a_time_limit_and_then_nothing_to_do(tmp_path, pets, whole):
    "Detached, so the servers try again: after a cell that crashes, and after a kernel that hangs until its time is up. Complete, the run returns at once."
    fill(tmp_path, pets)
    (volume(tmp_path)/"d/samples/step_0000150.png").mkdir(parents=True)      # the sheet cannot be saved; the trainer saves its state, and the cell fails
    threading.Thread(target=hang, args=(tmp_path, "d", 200), daemon=True).start()
    limit = max(10, int(1.4*whole["seconds"]))
    summary, done = modal_run(tmp_path, *words(run="d", **TINY), "--retries", "8", "--timeout", str(limit), options=["--detach"])
    attempts = sorted((a for a in summary["attempts"] if a["function"] == "train"), key=lambda a: a["attempt"])
    assert [a["end"] for a in attempts][:2] == ["failure", "timeout"] and attempts[-1]["end"] == "success", done.stdout + done.stderr
    assert [a["retry"] for a in attempts] == list(range(len(attempts))) and "IsADirectoryError" in attempts[0]["error"] and "\n" not in attempts[0]["error"]
    assert same(complete(volume(tmp_path)/"d"), whole["weights"]) and first_step(tmp_path, 3) > 150 and first_step(tmp_path, 4) > 200
    assert "d: on the way" in done.stdout and not (tmp_path/"home/outputs").exists()
    before = {p: p.read_bytes() for p in volume(tmp_path).rglob("*") if p.is_file()}
    summary, done = modal_run(tmp_path, *words(run="d", **TINY))
    assert ends(summary) == ["success"]*2 and all(a["seconds"] < 8 for a in summary["attempts"]) and "steps/s" not in done.stdout
    assert before == {p: p.read_bytes() for p in volume(tmp_path).rglob("*") if p.is_file()} and same(complete(tmp_path/"home/outputs/d"), whole["weights"])


def test_one_container_a_run(tmp_path):
    "A claim that is still warm belongs to somebody: refused in one line, once, and his report is left alone."
    folder = volume(tmp_path)/"g"
    folder.mkdir(parents=True)
    (folder/"train.ipynb").write_text("somebody's report")
    claim = dict(host="tabby", pid=41, machine="another call", token="x", since=time.time() - 100, time=time.time() - 5)
    (folder/".claim").write_text(json.dumps(claim))
    summary, done = modal_run(tmp_path, *words(run="g", **TINY | dict(data="toy", toy_pictures=13)))
    assert summary["exit"] == 1 and ends(summary) == ["success"]      # it returned, and so is not tried again
    assert "is in use by process 41 on tabby" in done.stderr.strip().splitlines()[-1]
    assert (folder/"train.ipynb").read_text() == "somebody's report" and json.loads((folder/".claim").read_text()) == claim and not (folder/"metrics.jsonl").exists()


def test_a_missing_run_is_refused_before_a_container_starts(tmp_path):
    summary, done = modal_run(tmp_path, "--notebook", "evaluate", "--run", "nowhere")
    assert summary["exit"] == 1 and summary["attempts"] == [] and "run='nowhere'" in done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif("TINYCATS_LONG" not in os.environ, reason="half a minute; make soak")
def test_evaluated_in_a_container(tmp_path, pets, whole):
    fill(tmp_path, pets)
    shutil.copytree(whole["folder"], volume(tmp_path)/"whole")
    summary, done = modal_run(tmp_path, "--notebook", "evaluate", *words(run="whole", samples=1, num_steps=2, data_root="data"), "--fid", "false")
    assert summary["exit"] == 0 and ends(summary) == ["success"], done.stdout + done.stderr
    home = tmp_path/"home/outputs/whole/evaluation"
    assert list(home.glob("*/scores.json")) and (home/"evaluate.ipynb").exists() and list(volume(tmp_path).glob("whole/evaluation/*/scores.json"))


STAND_IN = """import os
if "STAND_IN" in os.environ:
    import modal, pathlib, shutil
    def commit(volume):   # what Volume.commit does, for a folder: file by file, each whole
        live, home = pathlib.Path.cwd()/"outputs", pathlib.Path(os.environ["STAND_IN"])
        for p in live.rglob("*"):
            if p.is_dir() or p.suffix == ".part": continue
            there = home/p.relative_to(live)
            there.parent.mkdir(parents=True, exist_ok=True)
            try: shutil.copy2(p, home.parent/"incoming"); os.replace(home.parent/"incoming", there)
            except FileNotFoundError: pass
    modal.Volume.commit = commit
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals as on Linux and macOS")
def test_papermill_is_killed_and_interrupted_and_only_what_was_committed_survives(tmp_path, pets, whole):
    "Without Modal: the kernel publishes into a folder, which is all that each next attempt, in a fresh place, begins with."
    committed = tmp_path/"committed"
    (tmp_path/"path").mkdir(); (tmp_path/"path/sitecustomize.py").write_text(STAND_IN); committed.mkdir()
    more = dict(STAND_IN=str(committed), TINYCATS_VOLUME=cloud.OUTPUTS, TINYCATS_OWNER="one call", PYTHONPATH=f"{tmp_path/'path'}:{ROOT}")
    newest = lambda: max(checkpoints(committed/"s/checkpoints"), default=0)

    def attempt(n, until, sig):
        there = tmp_path/f"attempt{n}"
        there.mkdir(); (there/"settings.ini").touch()
        shutil.copytree(committed, there/"outputs")
        code = f"from tinycats.cloud import train; print(train.local({TINY | dict(run='s', data_root=str(pets.parent))!r}))"
        mill = subprocess.Popen([sys.executable, "-c", code], cwd=there, env=env(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while newest() < until and mill.poll() is None: time.sleep(.02)
        at = time.time()
        if sig == signal.SIGKILL: [p.kill() for p in (*psutil.Process(mill.pid).children(), psutil.Process(mill.pid))]
        elif sig: mill.send_signal(sig)
        said = mill.communicate()[0]
        return there, mill.returncode, said, time.time() - at

    assert attempt(1, 40, signal.SIGKILL)[1] == -9
    before = newest()
    there, code, said, seconds = attempt(2, 80, signal.SIGINT)
    assert code not in (0, -9) and seconds < 20 and "KeyboardInterrupt: stopped by signal" in said and before >= 40
    assert newest() == max(checkpoints(there/"outputs/s/checkpoints")) < 300        # saved on the way out, and published
    there, code, said, _ = attempt(3, 10**9, None)
    assert code == 0 and "'step': 300" in said and int(re.search(r"step +(\d+)/", said)[1]) > 80, said
    assert same(complete(there/"outputs/s"), whole["weights"])


def asked_of_modal(where, *told, **more):
    "`modal run` on a computer without an account."
    return subprocess.run([sys.executable, "-m", "modal", "run", "-m", "tinycats.cloud", *told], cwd=where, env=env(MODAL_CONFIG_PATH=str(where/"none"), **more), capture_output=True, text=True)


@pytest.mark.parametrize("told, said", [
    (["--steps", "5"], "modal token new"), (["--gpu", "RTX"], "gpu='RTX'"), (["--stepz", "5"], "did you mean steps"), (["--params", "fulll"], "full, pets"),
    (["--timeout", "90000"], "86400"), (["--steps"], "whole number"), (["--sweep", "full"], "list of parameter sets"),
], ids=lambda x: "".join(x) if isinstance(x, list) else "")
def test_refused_in_one_line_before_anything_starts(tmp_path, told, said):
    done = asked_of_modal(tmp_path, *told)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


def test_dry_run_and_help_need_no_account(tmp_path):
    done = asked_of_modal(tmp_path, "--sweep", "sweep", "--params", "full", "--dry-run", "--gpu", "h100")
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
    for said in ("Debian slim with gcc, Python 3.11", "pip install torch", "/cats/nbs/train.ipynb", "tinycats-outputs at /cats/outputs", "H100", "outputs/lr-high/train.ipynb", "3 runs together"): assert said in done.stdout
    done = asked_of_modal(tmp_path, "--help")
    assert done.returncode == 0 and "--gpu" in done.stdout and "# highest learning rate" in done.stdout


def test_the_definitions_hold():
    "What the module's own objects say, read without Modal's help."
    c = cloud.container
    assert c["image"] is cloud.image and c["gpu"] in cloud.GPUS and 0 < c["timeout"] <= 86_400 and c["retries"].max_retries >= 1
    assert set(c["volumes"]) == {f"{cloud.WORK}/outputs", f"{cloud.WORK}/store"} and "nonpreemptible" not in c
    hours, _ = cloud.estimate(cloud.asked(["--params", "full"]).values[0], c["gpu"])
    assert hours * 3600 < c["timeout"] * (1 + c["retries"].max_retries)
