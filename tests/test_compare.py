"The pages ablation and settings, on toy cats and on real ones; and what they refuse."
import json
import re

import pytest
import torch
from helpers import shared
from PIL import Image
from test_evaluate import cells, extractor, project, trained
from tinycats import metrics, runs
from tinycats.checkpoint import load_latest
from tinycats.dit import load_model

ARM = dict(
    image_size=16, patch_size=4, dim=32, depth=1, num_heads=2, steps=20, batch_size=8, evaluations=2,
    samples=1, num_steps=2, precision="fp32", device="cpu", warmup_steps=2, ema=.5)
SETTINGS = dict(
    run="tiny", samples=2, num_steps=2, nfe=[2, 4], scales=[1., 3.], device="cpu", precision="fp32")
CHANGES = {
    "recipe": {},
    "other seed": dict(seed=1),
    "velocity": dict(prediction="velocity"),
    "patch 2": dict(patch_size=2),
    "patch 8": dict(patch_size=8),
    "uniform times": dict(time_sampling="uniform"),
    "less noise": dict(time_mean=0.),
    "more noise": dict(time_mean=-1.6),
    "dropout": dict(dropout=.1),
    "augmented": dict(augment_prob=.2, augment_dim=5),
    "lr x 3": dict(lr=6e-3),
    "lr / 3": dict(lr=2e-3/3),
    "no weight decay": dict(weight_decay=0.),
    "batch x 2": dict(batch_size=16, steps=10),
    "classes x 10": {},
    "convolution": {}}


@pytest.fixture(autouse=True)
def few_toy_cats(monkeypatch):
    "The pages compare with 3,640 toy cats; 520 are enough here."
    load = runs.eval_data
    few = dict(toy_images=390, heldout=130)
    monkeypatch.setattr(runs, "eval_data", lambda *args, **settings: load(*args, **settings | few))


def fail(message):
    def raise_failure(*_, **__):
        pytest.fail(message)

    return raise_failure


def test_ablation(project, extractor, monkeypatch):
    "Each arm is trained once; the first changes nothing, and the others what their names say."
    page = cells("ablation", **ARM, **extractor)
    folder = project/"outputs/ablation/demo"
    kept = json.loads((folder/"ablation.json").read_text())["arms"]
    assert list(kept) == list(CHANGES)
    losses = [arm["curve"]["20"]["heldout"] for arm in kept.values()]
    assert len(set(losses)) == len(losses)
    fingerprints = {}
    for name, arm in kept.items():
        assert set(arm["curve"]) == {"10", "20"}
        _, state = load_latest(folder/re.sub(r"\W+", "_", name)/"checkpoints")
        fingerprints[name] = state["fingerprint"]
    for name, fingerprint in fingerprints.items():
        changed = {key: value for key, value in fingerprint.items() if value != fingerprints["recipe"][key]}
        assert changed == CHANGES[name]
    assert Image.open(folder/"cats.png").height > 10*64

    monkeypatch.setattr(page["Trainer"], "train_step", fail("a complete arm is trained again"))
    again = cells("ablation", **ARM, **extractor, arms=["velocity"])
    assert list(again["shown"]) == ["recipe", "velocity"]
    assert json.loads((folder/"ablation.json").read_text())["arms"] == kept
    assert torch.equal(again["generated"]["velocity"], page["generated"]["velocity"])


def test_arms_that_begin_with_trained_weights(project, extractor):
    "None needs another architecture; the changed networks begin with what the trained one computes."
    term = "lambda x_hat, x1, t: (x_hat - x1).abs().mean((1, 2, 3))"
    (project/"term.py").write_text(f"def load():\n    return {term}\n")
    arms = ["classes x 10", "convolution", "extra loss"]
    weights = project/"outputs/tiny/ema.safetensors"
    further = ARM | dict(patch_size=8, lr=1e-3, init_from=str(weights), extra_loss="term.py:load", arms=arms)
    page = cells("ablation", **further, **extractor)
    assert list(page["found"]) == ["recipe", *arms]
    losses = [arm["curve"]["20"]["heldout"] for arm in page["found"].values()]
    assert len(set(losses)) == len(losses)
    with pytest.raises(ValueError, match="arms='velocity'.*choose among recipe, other seed, uniform times"):
        cells("ablation", **further | dict(arms=["velocity"]), **extractor)

    trained, x = load_model(weights), torch.randn(2, 3, 16, 16)
    before = trained(x, torch.tensor([.3, .6]), torch.tensor([0, 5]))
    for change in page["network_changes"].values():
        model = load_model(weights)
        change(model)
        after = model(x, torch.tensor([.3, .6]), torch.tensor([0, 5]))
        assert torch.allclose(after, before, atol=1e-5)
        after.square().mean().backward()
        new = [w for name, w in model.named_parameters() if "conv" in name or "y_embedder" in name]
        assert all(w.grad.abs().sum() > 0 for w in new)


REFUSED_ABLATIONS = [
    (dict(arms=["speed"]), ("arms='speed'", "velocity")),
    (dict(evaluations=3), ("evaluations=3", "steps 20 is no multiple of 6")),
    (dict(patch_size=1, image_size=15), ("patch_size=1", "even")),
    (dict(data="heads", data_root="nowhere"), ("nowhere", "make data")),
    (dict(init_from="outputs/never", arms=["less noise"]), ("init_from='outputs/never'", "no weights")),
    (dict(init_from="outputs/tiny", arms=["less noise"]), ("init_from='outputs/tiny'", "-p patch_size 8")),
    (dict(arms=["extra loss"]), ("arms='extra loss'", "choose among")),
    (dict(extra_loss="nothing.py:load", arms=["extra loss"]), ("extra_loss='nothing.py:load'",)),
    (dict(steps=40), ("with steps 20, not 40", "another name"))]


@pytest.mark.parametrize("change, words", REFUSED_ABLATIONS)
def test_refused_ablations(project, extractor, change, words):
    if "steps" in change:
        cells("ablation", **ARM, **extractor, arms=["velocity"])
    with pytest.raises(ValueError) as e:
        cells("ablation", **ARM | dict(arms=["velocity"]) | extractor | change)
    for word in words:
        assert word in str(e.value)
    assert "\n" not in str(e.value)
    if "steps" not in change:
        assert not (project/"outputs/ablation").exists() # nothing was trained before


def test_ablation_of_real_cats(project, extractor, monkeypatch):
    "Trained with dogs, compared on the twelve breeds; with real cats there is one more arm."
    pets = shared("oxford-iiit-pet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(project/"cache"))
    heads = dict(data="heads", data_root=str(pets.parent))
    page = cells("ablation", **ARM, **extractor, **heads, arms=["all pets first"])
    assert list(page["found"]) == ["recipe", "all pets first"]
    assert page["present"] == list(range(12))
    images, labels = page["trained_on"]
    assert (labels == 12).any()
    assert images.shape[-1] == 18
    data = page["ImageDataset"](images, labels, size=16, balance_from_step=10)
    for step in (0, 9):
        assert (data.batch(step, 130)[1] == 12).sum() > 60
    for step in (10, 11):
        assert (data.batch(step, 130)[1] == 12).sum() == 10


def test_settings(project, extractor, monkeypatch):
    "Every setting is measured once, and the scores are those of the setting they stand beside."
    page = cells("settings", **SETTINGS, **extractor)
    kept = json.loads((project/"outputs/tiny/settings/settings.json").read_text())["found"]
    assert list(page["networks"]) == ["ema 0.5", "ema 0.75", "raw"]
    assert page["main"] == "ema 0.5"
    assert list(kept) == [
        "ema 0.5, 2, 1.5, euler", "ema 0.5, 4, 1.5, euler", "ema 0.5, 1, 1.5, heun", "ema 0.5, 2, 1.5, heun",
        "ema 0.5, 2, 1.5, dpm++2m", "ema 0.5, 4, 1.5, dpm++2m",
        "ema 0.5, 2, 1.5, ab2", "ema 0.5, 4, 1.5, ab2",
        "ema 0.5, 2, 1.0, ab2", "ema 0.5, 2, 3.0, ab2", "ema 0.5, 2, 1.5, ab2, [0.0, 0.6]",
        "ema 0.5, 2, 1.5, ab2, [0.1, 1.0]", "ema 0.75, 2, 1.5, ab2", "raw, 2, 1.5, ab2"]
    for solver in ("dpm++2m", "ab2"):  # of two steps, both are Euler's
        assert kept[f"ema 0.5, 2, 1.5, {solver}"]["fd"] == pytest.approx(
            kept["ema 0.5, 2, 1.5, euler"]["fd"], rel=1e-3)
    distances = {round(found["fd"], 6) for found in kept.values()}
    assert len(distances) >= 11

    generated, requested = page["generate"](
        page["networks"]["raw"], 2, classes=page["present"], seed=0, num_steps=2, cfg_scale=1.5)
    found, _ = metrics.scores(
        generated, requested, heldout=page["real"].heldout, training=page["reference"], net=page["net"],
        num_classes=13, seed=0)
    raw = kept["raw, 2, 1.5, ab2"]
    assert raw["fd"] == pytest.approx(found["fd"], abs=1e-5)
    assert sum(map(sum, raw["confusion"])) == 26

    monkeypatch.setattr(metrics, "scores", fail("measured again"))
    assert cells("settings", **SETTINGS, **extractor)["results"]["found"] == kept
    with pytest.raises(ValueError, match="run='tiny': .* was made with samples 2, not 1"):
        cells("settings", **SETTINGS | dict(samples=1), **extractor)


REFUSED_SETTINGS = [
    (dict(run="absent"), ("run='absent'", "no weights at")),
    (dict(nfe=[3]), ("nfe=3", "even")),
    (dict(data="pets", data_root="nowhere"), ("nowhere", "make data")),
    (dict(features="net"), ("features='net'", "colon"))]


@pytest.mark.parametrize("change, words", REFUSED_SETTINGS)
def test_refused_settings(project, extractor, change, words):
    with pytest.raises(ValueError) as e:
        cells("settings", **SETTINGS | extractor | change)
    for word in words:
        assert word in str(e.value)
    assert "\n" not in str(e.value)


def test_settings_need_a_complete_run(project, extractor):
    (project/"outputs/tiny/ema.safetensors").unlink()
    with pytest.raises(ValueError, match="run='tiny': .* holds no ema.safetensors; name a complete run"):
        cells("settings", **SETTINGS, **extractor)
