"ablation.ipynb and settings.ipynb, cell by cell, on toy cats and on real ones; and what is refused."
import json, re

import pytest, torch, yaml
from helpers import shared
from PIL import Image
from test_evaluate import ROOT, cells, eyes, project, trained
from tinycats.checkpoint import steps as checkpoint_steps
from tinycats.params import check_params, notebook_params

ARM = dict(image_size=16, patch_size=4, dim=32, depth=1, num_heads=2, steps=20, batch_size=8, looks=2, samples=1, num_steps=2, precision="fp32", device="cpu", warmup_steps=2, ema=.5)
HOW = dict(run="tiny", samples=2, num_steps=2, looks=[2, 4], scales=[1., 3.], device="cpu", precision="fp32")


def test_ablation(project, eyes, monkeypatch):
    "Each arm is trained once; the first changes nothing, and the others what their names say."
    names = cells("ablation", **ARM, **eyes)
    folder = project/"outputs/ablation/demo"
    kept = json.loads((folder/"ablation.json").read_text())
    assert list(kept["arms"]) == ["recipe", "other seed", "velocity", "patch 2", "patch 8", "uniform times", "less noise", "more noise", "dropout", "augmented", "lr x 3", "lr / 3"]
    losses = [a["curve"]["20"]["heldout"] for a in kept["arms"].values()]
    assert len(set(losses)) == len(losses) and all(set(a["curve"]) == {"10", "20"} for a in kept["arms"].values())
    identity = {a: torch.load(next(iter(checkpoint_steps(folder/re.sub(r"\W+", "_", a)/"checkpoints").values())), weights_only=True)["state"]["identity"] for a in kept["arms"]}
    differ = {a: {k: v for k, v in i.items() if v != identity["recipe"][k]} for a, i in identity.items()}
    assert differ == {"recipe": {}, "other seed": dict(seed=1), "velocity": dict(prediction="velocity"), "patch 2": dict(patch_size=2), "patch 8": dict(patch_size=8), "uniform times": dict(times="uniform_times"),
                      "less noise": dict(times="logit_normal_times(mean=0.0, std=0.8)"), "more noise": dict(times="logit_normal_times(mean=-1.6, std=0.8)"),
                      "dropout": dict(dropout=.1), "augmented": dict(augment=.2, augment_dim=5), "lr x 3": dict(lr=6e-3), "lr / 3": dict(lr=2e-3/3)}
    assert Image.open(folder/"cats.png").height > 10*64 and "real cats" in names["rows"][-1][0]

    monkeypatch.setattr(names["Trainer"], "take_step", lambda self: pytest.fail("a complete arm is trained again"))
    again = cells("ablation", **ARM, **eyes, arms=["velocity"])
    assert list(again["shown"]) == ["recipe", "velocity"] and json.loads((folder/"ablation.json").read_text())["arms"] == kept["arms"]
    assert torch.equal(again["pictures"]["velocity"][0], names["pictures"]["velocity"][0])


@pytest.mark.parametrize("change, words", [(dict(arms=["speed"]), ("arms='speed'", "velocity")), (dict(looks=3), ("looks=3", "steps 20")), (dict(patch_size=1, image_size=15), ("patch_size=1", "even")),
                                           (dict(data="heads", data_root="nowhere"), ("nowhere", "make data")), (dict(steps=40), ("steps 20, not 40", "another run name"))])
def test_refused_ablations(project, eyes, change, words):
    if "steps" in change: cells("ablation", **ARM, **eyes, arms=["velocity"])
    with pytest.raises(ValueError) as e: cells("ablation", **ARM | dict(arms=["velocity"]) | eyes | change)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_ablation_of_real_cats(project, eyes, monkeypatch):
    "Trained with dogs, judged by cats of the twelve breeds; with real cats there is one arm more."
    pets = shared("oxford-iiit-pet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(project/"cache"))
    names = cells("ablation", **ARM, **eyes, data="heads", data_root=str(pets.parent), arms=["all pets first"])
    assert list(names["found"]) == ["recipe", "all pets first"] and names["breeds"] == list(range(12)) and (names["whole"][1] == 12).any() and names["whole"][0].shape[-1] == 18
    early, late = ([names["Cats"](*names["whole"], size=16, balanced_from=10).batch(step, 130)[1] for step in some] for some in ((0, 9), (10, 11)))
    assert all((y == 12).sum() > 60 for y in early) and all((y == 12).sum() == 10 for y in late)


def test_settings(project, eyes, monkeypatch):
    "Every way of drawing is judged once, and the figures are those of the setting they stand beside."
    names = cells("settings", **HOW, **eyes)
    kept = json.loads((project/"outputs/tiny/settings/settings.json").read_text())
    assert list(names["networks"]) == ["ema 0.5", "ema 0.75", "raw"] and names["main"] == "ema 0.5"
    assert list(kept["found"]) == ["ema 0.5, 2, 1.5, euler", "ema 0.5, 4, 1.5, euler", "ema 0.5, 1, 1.5, heun", "ema 0.5, 2, 1.5, heun", "ema 0.5, 2, 1.0, euler", "ema 0.5, 2, 3.0, euler", "ema 0.75, 2, 1.5, euler", "raw, 2, 1.5, euler"]
    assert len({f["fd"] for f in kept["found"].values()}) == 8
    drawn, asked = names["draw"](names["networks"]["raw"], 2, names["breeds"], seed=0, num_steps=2, cfg_scale=1.5, solver="euler")
    found, _ = names["metrics"].scores(drawn, asked, names["unseen"], names["fresh"], names["eyes"], seed=0)
    assert kept["found"]["raw, 2, 1.5, euler"]["fd"] == pytest.approx(found["fd"], abs=1e-5) and sum(map(sum, kept["found"]["raw, 2, 1.5, euler"]["confusion"])) == 26
    monkeypatch.setattr(names["metrics"], "scores", lambda *_, **__: pytest.fail("measured again"))
    assert cells("settings", **HOW, **eyes)["known"]["found"] == kept["found"]
    with pytest.raises(ValueError, match="other weights or settings.*samples"): cells("settings", **HOW | dict(samples=1), **eyes)


@pytest.mark.parametrize("change, words", [(dict(run="nobody"), ("run='nobody'", "no ema.safetensors")), (dict(looks=[3]), ("looks=3", "even")), (dict(data="pets", data_root="nowhere"), ("nowhere", "make data")),
                                           (dict(features="eyes"), ("features='eyes'", "colon"))])
def test_refused_settings(project, eyes, change, words):
    with pytest.raises(ValueError) as e: cells("settings", **HOW | eyes | change)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_the_parameter_files_are_accepted():
    for page, files in dict(ablation=("ablation64", "ablation128"), train=("pets64", "pets128")).items():
        for name in files:
            few = yaml.safe_load((ROOT/f"nbs/params/{name}.yaml").read_text())
            taken = check_params(few, notebook_params(ROOT/f"nbs/{page}.ipynb"))
            assert {k: taken[k] for k in few} == few
