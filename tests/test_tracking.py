"Following a run of the real trainer through a stop and a resume, in TensorBoard, trackio and a notebook."
import importlib
import json

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from tinycats.data import ImageDataset
from tinycats.dit import TinyDiT
from tinycats.params import TrainConfig
from tinycats.toy import toy_cats
from tinycats.tracking import log_run, track
from tinycats.trainer import Trainer
from tinycats.viz import class_sheet, generate


def fit(folder, log_to, stop_at=None):
    "Train to step 8, or to `stop_at`, with a sheet at step 4 and checkpoints at 3 and 6."
    torch.manual_seed(0)
    data = ImageDataset(*toy_cats(13, size=16))
    model = TinyDiT(16, patch_size=8, dim=16, depth=1, num_heads=2)
    config = TrainConfig(steps=8, batch_size=2, log_every=1, sample_every=4, checkpoint_every=3)
    (folder/"samples").mkdir(parents=True, exist_ok=True)

    def draw(trainer):
        images, labels = generate(trainer.ema[.9999], 1, [0], num_steps=1)
        sheet = class_sheet(images, labels, model.classes)
        sheet.save(folder/"samples"/f"step_{trainer.step:07d}.png")

    for record in track(Trainer(model, data, folder, config, on_sample=draw).fit(), folder, log_to):
        if record["step"] == stop_at:
            raise KeyboardInterrupt


def stop_and_resume(folder, log_to):
    "A run that is killed after step 5 and goes on from the checkpoint of step 3."
    with pytest.raises(KeyboardInterrupt):
        fit(folder, log_to, stop_at=5)
    for path in folder.glob("checkpoints/step_*.pt"):  # what was saved on the way out is lost
        if path.name != "step_0000003.pt":
            path.unlink()
    fit(folder, log_to)
    lines = (folder/"metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def test_tensorboard_shows_each_step_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    expected = stop_and_resume(tmp_path/"run", "tensorboard")
    assert [step for step, _ in expected] == list(range(1, 9))
    for again in (False, True):
        if again:
            assert log_run(tmp_path/"run", "tensorboard") == 8
        log = reader.EventAccumulator(str(tmp_path/"run"/"tensorboard"), purge_orphaned_data=False).Reload()
        found = [(event.step, event.value) for event in log.Scalars("loss")]
        assert [step for step, _ in found] == list(range(1, 9))
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected])
        assert [event.step for event in log.Images("samples")] == [4, 8]
        assert {"lr", "grad_norm", "images_per_s"} <= set(log.Tags()["scalars"])


def test_trackio_shows_each_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path/"trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    stop_and_resume(tmp_path/"run", "trackio")
    runs = list(trackio.Api().runs("tinycats"))
    assert [run.name for run in runs] == ["run"]
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    logs = storage.get_logs("tinycats", "run")
    assert sorted(row["step"] for row in logs if "loss" in row) == list(range(1, 9))
    assert sorted(row["step"] for row in logs if "samples" in row) == [4, 8]


def test_the_live_curve_leaves_one_picture(tmp_path):
    source = """
import json, time
from pathlib import Path
from tinycats.tracking import live_curve
def records():
    for step in range(1, 5):
        record = dict(step=step, loss=1/step, lr=.1, loss_by_t=[.5]*10)
        with open("metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\\n")
        yield record
drawn = []
def counted(figure, **options):
    handle = display(figure, **options)
    update = handle.update
    handle.update = lambda figure: (drawn.append(figure), update(figure))
    return handle
for record in live_curve(records(), Path.cwd(), counted, share=1e9):
    pass
print(len(drawn))
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, resources=dict(metadata=dict(path=tmp_path)), kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert int("".join(output.get("text", "") for output in outputs)) == 4  # 5 drawings, one picture
