"train.ipynb on its whole way through papermill: toy cats, real cats, the recipe, and what is refused."
import json, os, subprocess, sys
from pathlib import Path

import nbformat, pytest, torch, yaml
from helpers import shared
from PIL import Image
from tinycats.checkpoint import load, steps as checkpoint_steps
from tinycats.data import BREEDS
from tinycats.dit import load_model
from tinycats.flow import sample
from tinycats.params import check_params, notebook_params

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(toy_pictures=130, image_size=16, patch_size=8, dim=32, depth=1, num_heads=2, steps=20, batch_size=16, warmup_steps=5,
            log_every=5, sample_every=10, checkpoint_every=10, samples=2, num_steps=4)


def papermill(where, *args, **params):
    "Run train.ipynb from the folder `where`, which plays the project's root."
    (where/"settings.ini").touch()
    options = [x for k, v in params.items() for x in ("-p", k, str(v))]
    return subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "WARNING", "--stdout-file", "-",
                           ROOT/"nbs/train.ipynb", "out.ipynb", *args, *options], cwd=where, capture_output=True, text=True)


def lines(path): return [json.loads(line) for line in open(path)]


def test_a_run_leaves_what_it_promises(tmp_path):
    done = papermill(tmp_path, run="a", ema_decay="[0.5, 0.9]", **TINY)
    assert done.returncode == 0, done.stderr
    assert "20/20" in done.stdout and "ETA" in done.stdout and "outputs/a/samples/final.png" in done.stdout
    run = tmp_path/"outputs/a"
    config = json.loads((run/"config.json").read_text())
    assert config["steps"] == 20 and config["wall_seconds"] > config["train_seconds"] > 0 and config["ema_decay"] == [.5, .9]
    assert {"parameters", "device", "versions", "git_revision", "breed_accuracy", "breed_accuracy_real"} <= set(config)
    assert [r["step"] for r in lines(run/"metrics.jsonl")] == [5, 10, 15, 20]
    assert {"step", "loss", "lr", "grad_norm", "steps_per_s", "pictures_per_s", "eta_s", "loss_by_t"} == set(lines(run/"metrics.jsonl")[0])
    assert sorted(p.name for p in (run/"samples").glob("*.png")) == ["final.png", "step_0000010.png", "step_0000020.png"]
    for breed in BREEDS: assert [Image.open(p).size for p in sorted((run/"samples/final"/breed).glob("*.png"))] == [(16, 16)]*2
    raw, first, second = (load_model(run/f"{n}.safetensors") for n in ("model", "ema", "ema_0.9"))
    assert raw.facts["weights"] == "raw" and first.facts == dict(run="a", step=20, data="toy", weights="ema 0.5")
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (raw, first, second)]
    assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1]))
    kinds = {k for c in nbformat.read(tmp_path/"out.ipynb", 4).cells for o in c.get("outputs", []) for k in o.get("data", {})}
    assert "image/png" in kinds and not any("widget" in k for k in kinds) and (tmp_path/"out.ipynb").stat().st_size < 2e6

    again = papermill(tmp_path, run="a", ema_decay="[0.5, 0.9]", **TINY)      # complete: nothing is trained again
    assert again.returncode == 0 and "steps/s" not in again.stdout and config["computed_in"] in ("torch.bfloat16", "torch.float32") and len(lines(run/"metrics.jsonl")) == 4
    longer = papermill(tmp_path, run="a", ema_decay="[0.5, 0.9]", **TINY | {"steps": 30})
    assert longer.returncode != 0 and "steps is 30" in longer.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("params, words", [
    (dict(stepz=3), ("stepz=3", "did you mean steps")), (dict(steps=0), ("steps=0", "steps >= 1")), (dict(patch_size=7), ("patch_size", "divides")),
    (dict(data="dogs"), ("data='dogs'", "toy", "pets")), (dict(lr="fast"), ("lr='fast'", "number")), (dict(data="pets"), ("make data",)),
    (dict(device="mps" if torch.cuda.is_available() else "cuda"), ("device=", "choose auto or cpu")), (dict(resume="none.pt"), ("none.pt'", "no such file")),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_refused_before_the_first_step(tmp_path, params, words):
    done = papermill(tmp_path, **TINY | dict(run="b") | params)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and all(w in last for w in words), last
    assert not (tmp_path/"outputs/b/metrics.jsonl").exists()


def test_the_recipe_is_accepted():
    recipe = yaml.safe_load((ROOT/"nbs/params/full.yaml").read_text())
    p = check_params(recipe, notebook_params(ROOT/"nbs/train.ipynb"))
    assert {k: p[k] for k in recipe} == recipe
    wanted = dict(steps=200_000, batch_size=256, lr=1e-4, lr_min=5e-7, weight_decay=1e-4, warmup_steps=10_000, ema_decay=[.9999], grad_clip=1.,
                  label_drop=.1, log_every=100, sample_every=5_000, checkpoint_every=10_000, image_size=128, patch_size=16, dim=384, depth=12,
                  num_heads=6, num_steps=50, cfg_scale=1.5, solver="euler", prediction="clean", data="pets")
    assert {k: p[k] for k in wanted} == wanted


def test_real_cats_at_full_size(tmp_path):
    pets = shared("oxford-iiit-pet")
    done = papermill(tmp_path, "-f", str(ROOT/"nbs/params/pets.yaml"), data_root=pets.parent, steps=2)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path/"outputs/pets-try/config.json").read_text())
    assert abs(config["parameters"] - 23.03e6) < 1e4
    assert len(list((tmp_path/"outputs/pets-try/samples/final").glob("*/*.png"))) == 13
    assert Image.open(tmp_path/"outputs/pets-try/samples/final/Maine_Coon/0000.png").size == (128, 128)


def test_a_page_runs_without_jupyter(tmp_path):
    "On a machine with PyTorch alone, tests/page.py runs the page and keeps its pictures."
    (tmp_path/"settings.ini").touch()
    done = subprocess.run([sys.executable, ROOT/"tests/page.py", ROOT/"nbs/train.ipynb", "-f", ROOT/"nbs/params/toy.yaml", "run=plain", "steps=4", "warmup_steps=1", "image_size=16", "dim=32",
                           "depth=1", "num_heads=2", "toy_pictures=52", "samples=1", "num_steps=2", "ema_decay=[0.5]"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(TINYCATS_PAGE=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path/"outputs/plain/config.json").read_text())
    assert facts["step"] == facts["steps"] == 4 and facts["ema_decay"] == [.5] and len(list((tmp_path/"page_train").glob("*.png"))) >= 5


def test_the_revision_speaks_of_code(tmp_path, monkeypatch):
    "Changed code is noted; new results in outputs/ are not a change of code."
    import tinycats
    from tinycats.trainer import run_facts
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    for name in ("tinycats/__init__.py", "nbs/a.ipynb", "outputs/a/a.json"): (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).touch()
    git("init"); git("add", "."); git("commit", "-m", "a")
    monkeypatch.setattr(tinycats, "__file__", str(tmp_path/"tinycats/__init__.py"))
    revision = lambda: run_facts(torch.nn.Linear(1, 1))["git_revision"]
    assert revision() == git("rev-parse", "HEAD")
    (tmp_path/"outputs/a/a.json").write_text("{}"); (tmp_path/"b").touch()
    assert revision() == git("rev-parse", "HEAD")
    (tmp_path/"nbs/a.ipynb").write_text("{}")
    assert revision() == git("rev-parse", "HEAD") + "+changes"


def test_changed_pictures_and_other_times(tmp_path):
    "What shapes a run reaches the trainer, is part of its identity, and leaves a network that needs no telling."
    told = dict(augment=.5, balanced_from=5, time_mean=.5, time_std=1.2)
    done = papermill(tmp_path, run="a", **TINY, **told)
    assert done.returncode == 0, done.stderr
    _, state = load(checkpoint_steps(tmp_path/"outputs/a/checkpoints")[20])
    assert {k: state["identity"][k] for k in ("augment", "augment_dim", "balanced_from", "times")} == dict(augment=.5, augment_dim=5, balanced_from=5, times="logit_normal_times(mean=0.5, std=1.2)")
    net = load_model(tmp_path/"outputs/a")
    assert net.augment.weight.abs().max() > 0 and sample(net, torch.arange(2), num_steps=2).shape == (2, 3, 16, 16)
    for k, v in dict(augment=.4, balanced_from=4, time_mean=0.).items():
        done = papermill(tmp_path, run="a", **TINY | dict(steps=20), **told | {k: v})
        assert done.returncode and f"ValueError: {'times' if 'time' in k else k} is" in done.stderr, done.stderr
