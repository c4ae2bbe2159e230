"evaluate.ipynb and compare_ema.ipynb: on runs, checkpoints and files, through papermill and cell by cell; and what is refused."
import json, shutil, subprocess, sys
from pathlib import Path

import nbformat, pytest, torch, yaml
from helpers import shared
from PIL import Image
from tinycats.data import BREEDS, Cats, to_float, toy_cats
from tinycats.dit import TinyDiT, save_model
from tinycats.params import check_params, notebook_params
from tinycats.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
FEW = dict(samples=2, num_steps=2, heldout=130, device="cpu", precision="fp32")


def papermill(where, notebook, **params):
    options = [x for k, v in params.items() for x in ("-p", k, str(v))]
    return subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING", "--stdout-file", "-",
                           ROOT/f"nbs/{notebook}.ipynb", "out.ipynb", *options], cwd=where, capture_output=True, text=True)


def cells(notebook="evaluate", **params):
    "The namespace after all cells of a notebook, run one by one in this process as papermill would have them."
    names = {"In": [], "display": lambda *_: None}
    for cell in nbformat.read(ROOT/f"nbs/{notebook}.ipynb", 4).cells:
        if cell.cell_type != "code": continue
        injected = ["# Parameters\n" + "".join(f"{k} = {v!r}\n" for k, v in params.items())] if "parameters" in cell.metadata.get("tags", []) else []
        for source in (cell.source, *injected):
            names["In"].append(source)
            exec(source, names)
    return names


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A project with one tiny run in it: two averages, two checkpoints, weights and facts as train.ipynb leaves them."
    root = tmp_path_factory.mktemp("project")
    (root/"settings.ini").touch()
    torch.manual_seed(0)
    model, folder = TinyDiT(16, 8, 32, 1, 2), root/"outputs/tiny"
    facts = dict(run="tiny", data="toy", toy_pictures=260, seed=0)
    trainer = Trainer(model, Cats(*toy_cats(260, 16, seed=1)), folder, 30, 16, lr=1e-2, warmup_steps=2, ema_decay=(.5, .75), checkpoint_every=15, config=facts | dict(ema_decay=[.5, .75]))
    for _ in trainer.fit(): pass
    for name, net, weights in (("model", model, "raw"), ("ema", trainer.ema[.5], "ema 0.5"), ("ema_0.75", trainer.ema[.75], "ema 0.75")):
        save_model(net, folder/f"{name}.safetensors", run="tiny", step=30, data="toy", weights=weights)
    return root


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path/"p")
    monkeypatch.chdir(tmp_path/"p")
    return tmp_path/"p"


@pytest.fixture
def eyes(project):
    "Eyes that need no training: the colours of a picture, coarsely."
    (project/"eyes.py").write_text("import torch.nn.functional as F\ndef load(side='4'): return lambda x: F.adaptive_avg_pool2d(x.float(), int(side)).flatten(1)/99\n")
    return dict(features="eyes.py:load")


def evaluations(project): return sorted(p.name for p in (project/"outputs/tiny/evaluation").iterdir())


def scores(project, name): return json.loads((project/"outputs/tiny/evaluation"/name/"scores.json").read_text())


def pixels(project, name, breed="Bengal"): return [Image.open(p).tobytes() for p in sorted((project/"outputs/tiny/evaluation"/name/breed).glob("*.png"))]


def test_a_run_is_judged(project):
    done = papermill(project, "evaluate", run="tiny", **FEW)
    assert done.returncode == 0, done.stderr
    assert "drawing" in done.stdout and "26/26" in done.stdout and "overview.png" in done.stdout
    place = project/"outputs/tiny/evaluation/step_0000030-samples_2-num_steps_2-precision_fp32-heldout_130"
    assert {p.name for p in place.iterdir()} == {*BREEDS, *(f"{b}.png" for b in BREEDS), "overview.png", "closest.png", "scores.json", "generation_metadata.json"}
    for breed in BREEDS: assert [Image.open(p).size for p in sorted((place/breed).glob("*.png"))] == [(16, 16)]*2 and Image.open(place/f"{breed}.png").size == (34, 16)
    made = json.loads((place/"generation_metadata.json").read_text())
    assert made["weights"] == "ema 0.5" and made["step"] == 30 and made["settings"]["cfg_scale"] == 1.5 and made["pictures"]["Bengal"] == 2 and {"versions", "device", "sha256"} <= set(made)
    told = json.loads((place/"scores.json").read_text())
    assert {"n", "fd", "fd_floor", "kid", "kid_floor", "breed_accuracy", "breed_accuracy_real", "precision", "recall", "copy_rate", "high_frequency_ratio",
            "fd_train", "fd_train_floor", "fd_gap", "kid_train", "copy_rate_real", "high_frequency_ratio_real", "precision_real", "recall_real", "loss_heldout", "loss_train", "n_loss"} <= set(told)
    assert told["n"] == told["n_real"] == 26 and told["n_heldout"] == 130 and told["n_training"] == 260 and set(told["breed_accuracy_by_breed"]) == set(BREEDS)
    assert told["fd"] > 2*told["fd_floor"] > 0 and told["breed_accuracy_real"] > .7 > told["breed_accuracy"] and "fid" not in told      # two steps of a net that has hardly learnt
    assert len(told["loss_by_time"]["heldout"]) == 10 and min(told["loss_by_time"]["train"]) > 0
    kinds = {k for c in nbformat.read(project/"out.ipynb", 4).cells for o in c.get("outputs", []) for k in o.get("data", {})}
    assert {"text/markdown", "image/jpeg", "image/png"} <= kinds and (project/"out.ipynb").stat().st_size < 2e6

    before = pixels(project, place.name)                                                        # the same again, in another process: the same, in the same place
    cells(run="tiny", **FEW)
    again = json.loads((place/"scores.json").read_text())
    assert evaluations(project) == [place.name] and pixels(project, place.name) == before
    assert all(again[k] == pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in told.items() if isinstance(v, float) and k != "seconds")


def test_each_setting_has_its_place(project, eyes):
    "Another setting, another folder; a named folder that holds other settings is refused, and keeps what it has."
    cells(run="tiny", **FEW, **eyes)
    cells(run="tiny", **FEW, **eyes, cfg_scale=3)
    plain, guided = sorted(evaluations(project), key=len)
    assert "cfg_scale_3" in guided and "cfg_scale" not in plain and "features_eyes" in plain and pixels(project, plain) != pixels(project, guided)
    cells(run="tiny", **FEW, **eyes, name="mine")
    held = scores(project, "mine")
    with pytest.raises(ValueError, match="name='mine': this folder holds an evaluation with cfg_scale 1.5, not 3.0; choose another name"):
        cells(run="tiny", **FEW, **eyes, name="mine", cfg_scale=3)
    assert scores(project, "mine") == held and pixels(project, "mine") == pixels(project, plain)


def test_which_weights(project, eyes, capsys):
    "Raw, first and second average draw differently; a checkpoint's last step draws as the run's files do; a file may lie anywhere."
    told = dict(run="tiny", **FEW, **eyes)
    cells(**told, name="first")
    for name, more in dict(raw=dict(raw=True), second=dict(ema=.75), checkpoint=dict(weights="checkpoints/step_0000030.pt"), earlier=dict(weights="outputs/tiny/checkpoints/step_0000015.pt", raw=True)).items():
        cells(**told, name=name, **more)
    seen = {name: pixels(project, name) for name in evaluations(project)}
    assert seen["first"] == seen["checkpoint"] and len({str(p) for p in seen.values()}) == 4
    assert [scores(project, n)["weights"] for n in ("first", "raw", "second", "checkpoint", "earlier")] == ["ema 0.5", "raw", "ema 0.75", "ema 0.5", "raw"] and scores(project, "earlier")["step"] == 15
    shutil.copy(project/"outputs/tiny/ema.safetensors", project/"elsewhere.safetensors")
    cells(**told | dict(run="other"), weights="elsewhere.safetensors")
    assert [p.name for p in (project/"outputs/other/evaluation").iterdir()] == ["step_0000030-weights_elsewhere-samples_2-num_steps_2-precision_fp32-heldout_130-features_eyes"]
    for path in (project/"outputs/tiny").glob("*.safetensors"): path.unlink()                        # a run that is still going on: its newest checkpoint
    capsys.readouterr(); cells(**told)
    assert "tiny, step 30, ema 0.5" in capsys.readouterr().out


def test_one_breed(project, eyes, capsys):
    cells(run="tiny", **FEW, **eyes, breeds=["Siamese"])
    assert "1 of 13 breeds" in capsys.readouterr().out
    (name,) = evaluations(project)
    told = scores(project, name)
    assert "breeds_Siamese" in name and told["n"] == 2 and told["fd"] is told["kid"] is told["precision"] is None and 0 <= told["breed_accuracy"] <= 1 and told["copy_rate"] is not None
    assert [p.name for p in (project/"outputs/tiny/evaluation"/name).iterdir() if p.is_dir()] == ["Siamese"]


def test_better_networks_score_better(project, eyes):
    "A network that draws real held-out cats, and one that repeats its training pictures: the scores say which is which."
    def told(pictures, labels, name):
        rows = {b: (labels == b).nonzero()[:, 0] for b in range(13)}
        def forward(self, xt, t, y): return torch.stack([pictures[rows[b][i % len(rows[b])]] for i, b in enumerate(y.tolist())])
        with pytest.MonkeyPatch.context() as m:
            m.setattr(TinyDiT, "forward", forward)
            cells(run="tiny", **FEW | dict(samples=8, num_steps=1), **eyes, cfg_scale=1, name=name)
        return scores(project, name)
    (fresh, of), (known, which) = toy_cats(1300, 16, seed=77), toy_cats(260, 16, seed=1)
    honest, thief = told(to_float(fresh), of, "honest"), told(to_float(known), which, "thief")
    bad = told(-torch.ones(13, 3, 16, 16), torch.arange(13), "bad")
    assert honest["copy_rate"] < .1 and thief["copy_rate"] == 1 and bad["copy_rate"] == 0
    assert honest["fd"] < 2.5*honest["fd_floor"] and bad["fd"] > 10*bad["fd_floor"] and honest["breed_accuracy"] > bad["breed_accuracy"] + .3
    assert .8 < honest["high_frequency_ratio"] < 1.25 and bad["high_frequency_ratio"] < .01 and honest["precision"] > .5 > bad["precision"]


@pytest.mark.parametrize("params, words", [
    (dict(run="nobody"), ("run='nobody'", "holds no weights", "tiny")), (dict(weights="no.safetensors"), ("weights='no.safetensors'", "no such file", "ema.safetensors")),
    (dict(breeds=["Siamesse"]), ("breeds='Siamesse'", "did you mean Siamese")), (dict(samples=0), ("samples=0", "samples >= 1")), (dict(ema=.9), ("ema=0.9", "0.5, 0.75")),
    (dict(raw=True, ema=.5), ("raw=True", "either raw weights or an average")), (dict(weights="checkpoints/step_0000015.pt", ema=.9), ("ema=0.9", "0.5, 0.75")),
    (dict(weights="eyes.py"), ("weights=", "eyes.py")), (dict(weights="torn.pt"), ("weights=", "damaged or no checkpoint")), (dict(data="dogs"), ("data='dogs'", "toy, pets or heads")),
    (dict(data="pets"), ("data_root='data'", "make data")), (dict(features="nothing.here:load"), ("features='nothing.here:load'", "file.py:function")), (dict(features="magic"), ("features='magic'", "no colon")),
    (dict(solver="rk4"), ("solver='rk4'",)), (dict(sample=3), ("sample=3", "did you mean samples")), (dict(name="a/b"), ("name='a/b'", "plain name")),
], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_refused_before_anything_is_drawn(project, eyes, params, words):
    (project/"torn.pt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError) as e: cells(**dict(run="tiny", **FEW, **eyes) | params)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), str(e.value)
    assert e.type.__name__ == "ParameterError" and not list(project.glob("outputs/*/evaluation"))


def test_without_inception(project, eyes, capsys, monkeypatch):
    "No network, or no torchmetrics: one line, and all the rest is there."
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(project/"hub"))
    cells(run="tiny", **FEW, **eyes, fid=True, name="a")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    cells(run="tiny", **FEW, **eyes, fid=True, name="a")
    lines = [l for l in capsys.readouterr().out.splitlines() if l.startswith("no FID: ")]
    assert len(lines) == 2 and "pip install 'tinycats[fid]'" in lines[1] and "fid" not in scores(project, "a") and scores(project, "a")["fd"] > 0


def test_fid_where_it_can_be_had(project, eyes, monkeypatch):
    "With somebody in Inception's place: FID and KID get their own names, floors and a gap."
    from tinycats import metrics
    monkeypatch.setattr(metrics, "inception", lambda device: lambda x: x.float().mean((2, 3))/50)
    told = cells(run="tiny", **FEW, **eyes, fid=True, name="a")["found"]
    assert {"fid", "fid_floor", "fid_train", "fid_train_floor", "fid_gap", "kid_inception", "kid_inception_floor", "fd", "kid"} <= set(told) and told["fid"] != told["fd"] and told["fid"] > told["fid_floor"]


def test_the_published_run_stays_clean(tmp_path, monkeypatch):
    "What a fresh clone has of outputs/toy is enough, and nothing that is left there is git's business, unless it is named published."
    if not (ROOT/"outputs/toy/ema.safetensors").exists(): pytest.skip("outputs/toy is not here")
    (tmp_path/"outputs/toy").mkdir(parents=True); (tmp_path/"settings.ini").touch(); monkeypatch.chdir(tmp_path)
    for name in ("ema.safetensors", "config.json"): shutil.copy(ROOT/"outputs/toy"/name, tmp_path/"outputs/toy")
    (tmp_path/"eyes.py").write_text("load = lambda: lambda x: x.float().mean((2, 3))")
    cells(**FEW | dict(num_steps=8, samples=1), features="eyes.py:load", name="published")
    assert scores_at(tmp_path/"outputs/toy/evaluation/published")["step"] > 0
    shutil.copy(ROOT/".gitignore", tmp_path)
    git = lambda *args: subprocess.run(["git", *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    git("init", "-q"); shutil.copytree(tmp_path/"outputs/toy/evaluation/published", tmp_path/"outputs/toy/evaluation/step_0012000"); (tmp_path/"outputs/toy/evaluation/evaluate.ipynb").touch()
    kept = git("ls-files", "-o", "--exclude-standard", "outputs/toy/evaluation").split()
    assert {Path(p).parts[3] for p in kept} == {"published"} and {Path(p).name for p in kept} >= {"scores.json", "overview.png"} and not [p for p in kept if len(Path(p).parts) > 5]


def scores_at(folder): return json.loads((folder/"scores.json").read_text())


def test_real_cats(project, eyes, monkeypatch):
    "The twelve breeds, the official splits, no dogs unless they are asked for."
    pets = shared("oxford-iiit-pet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(project/"cache"))
    told = cells(run="tiny", **FEW, **eyes, data="pets", data_root=str(pets.parent), fid=False)
    found = told["found"]
    assert (found["n"], found["n_heldout"], found["n_training"]) == (24, 1183, 1182) and found["fd"] > found["fd_floor"] > 0 and "Other" not in told["rounded"]
    from tinycats import metrics
    monkeypatch.setattr(metrics, "inception", lambda device: lambda x: x.float().mean((2, 3))/50)
    seen, taught, pet_scores = [], metrics.train_judge, metrics.scores
    monkeypatch.setattr(metrics, "train_judge", lambda x, y, steps: seen.append(len(y)) or taught(x, y, steps=20))
    monkeypatch.setattr(metrics, "scores", lambda d, a, unseen, training, *args, **kw: seen.append((len(training[1]), kw["originals"].shape[-1])) or pet_scores(d, a, unseen, training, *args, **kw))
    told = cells(run="tiny", **FEW, data="heads", data_root=str(pets.parent), name="heads")
    heads, count = told["found"], len(told["training"][1])
    assert 200 < heads["n_heldout"] < 300 < heads["n_training"] < 1182 and heads["n"] == 24 and heads["fd"] != found["fd"]
    assert seen == [(count + 1)//2, (count//2, 18)] and count == heads["n_training"]            # one half teaches, the other is judged; copies are looked for in all, uncut
    (x, y), (large, of) = told["training"], told["originals"]
    assert torch.equal(x, large[..., 1:17, 1:17]) and torch.equal(y, of) and large.shape[-1] == 18
    assert set(told["fresh"][1].tolist()) == set(told["training"][1][::2].tolist()) == set(range(12))
    same = metrics.distances(told["points"], dict(drawn=told["asked"], heldout=told["unseen"][1], training=told["training"][1]), seed=0)
    assert heads["fid"] == same["fd"] and heads["fid_train_floor"] == same["fd_train_floor"]
    assert 1/12 < found["breed_accuracy_real"] and found["high_frequency_ratio_real"] == pytest.approx(1, abs=.15)


def test_the_parameter_file_is_accepted():
    few = yaml.safe_load((ROOT/"nbs/params/evaluate_pets.yaml").read_text())
    taken = check_params(few, notebook_params(ROOT/"nbs/evaluate.ipynb"))
    assert {k: taken[k] for k in few} == few and taken["samples"]*12 == 1200


def test_compare_ema(tmp_path):
    "The interactive page, small: it trains its run, compares, and on the second start trains no more."
    (tmp_path/"settings.ini").touch()
    few = dict(steps=60, compared=2, samples=1, num_steps=3, image_size=16, batch_size=8, ema_decay="[0.5, 0.8]", breeds="Siamese,Bengal")
    done = papermill(tmp_path, "compare_ema", **few)
    assert done.returncode == 0, done.stderr
    run = tmp_path/"outputs/compare_ema"
    assert sorted(p.name for p in (run/"checkpoints").glob("*.pt")) == ["step_0000030.pt", "step_0000060.pt"]
    assert sum("image/png" in o.get("data", {}) for c in nbformat.read(tmp_path/"out.ipynb", 4).cells for o in c.get("outputs", [])) >= 3
    stamp = (run/"checkpoints/step_0000060.pt").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path)
        names = cells("compare_ema", **few | dict(ema_decay=[.5, .8], breeds=["Siamese"]))
        assert (run/"checkpoints/step_0000060.pt").stat().st_mtime_ns == stamp
        assert set(names["drawn"]) == {(n, s) for n in ("raw", "EMA 0.5", "EMA 0.8") for s in (30, 60)} and set(names["scores"]["Fréchet distance"]) == {"raw", "EMA 0.5", "EMA 0.8"}
        with pytest.raises(ValueError, match="no such breed"): cells("compare_ema", **few | dict(breeds=["Cat"]))
        (run/"short").unlink(); shutil.rmtree(run/"checkpoints")
        with pytest.raises(ValueError, match="has no checkpoints; train it with keep_every"): cells("compare_ema", **few)


def test_sweep(tmp_path, monkeypatch):
    "What was swept is named, a seed too; runs are compared under one and the same settings, and the newest of them."
    monkeypatch.chdir(tmp_path); (tmp_path/"settings.ini").touch()
    def run(name, seed, **evaluations):
        (tmp_path/"outputs"/name).mkdir(parents=True)
        (tmp_path/"outputs"/name/"config.json").write_text(json.dumps(dict(run=name, seed=seed, lr=1e-3, num_steps=50, step=4500, breed_accuracy=.5)))
        for place, fd in evaluations.items():
            place = tmp_path/"outputs"/name/"evaluation"/place.replace("__", "-")
            place.mkdir(parents=True)
            (place/"scores.json").write_text(json.dumps(dict(fd=fd, seed=0, num_steps=25, cfg_scale=3.0, step=9, seconds=1.5, breed_accuracy=.75)))
    run("a", 1, step_0000300=3., step_0004500=1., step_0004500__cfg_scale_3=9.); run("b", 2, step_0004500=2., step_0009000__cfg_scale_3=8.); run("c", 3)
    names = cells("sweep", per_breed=0)
    assert names["differ"] == ["seed"] and names["newest"] == dict(a="step_0004500", b="step_0004500", c=None)
    assert [names["scores"][r].get("fd") for r in "abc"] == [1, 2, None] and names["scores"]["a"]["evaluation"] == "step_0004500"
    assert all(s["step"] == 4500 and not {"seed", "num_steps", "cfg_scale", "seconds"} & set(s) for s in names["scores"].values())
    assert names["scores"]["a"]["breed_accuracy"] == .75 and names["scores"]["c"]["breed_accuracy after training"] == .5 and "breed_accuracy" not in names["scores"]["c"]
    shutil.rmtree(tmp_path/"outputs/b/evaluation/step_0004500")                                # now only one kind is there for both
    names = cells("sweep", per_breed=0)
    assert [names["scores"][r].get("fd") for r in "abc"] == [9, 8, None] and names["newest"]["a"] == "step_0004500-cfg_scale_3"


def test_decays_that_do_not_bite_are_named(tmp_path, monkeypatch):
    "0.999 and 0.9999 are one and the same in a short run: the page says so instead of comparing them."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="choose smaller ones, or train longer"):
        cells("compare_ema", steps=20, compared=2, samples=1, num_steps=1, image_size=16, batch_size=4, ema_decay=[.999, .9999], breeds=["Siamese"])
