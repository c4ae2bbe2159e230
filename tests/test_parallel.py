"What the chapter on processes cannot show about itself: several processes that train, are stopped and are killed."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from test_runs import flatten, make_trainer, read_records
from tinycats import parallel
from tinycats.checkpoint import CheckpointError, RunLock, list_checkpoints, load_latest

ROOT = Path(__file__).resolve().parents[1]


def train(folder, processes, **settings):
    "The records of a run of so many processes; no dropout, which depends on their number."
    return list(make_trainer(folder, processes=processes, dropout=0., **settings).fit())


def test_a(tmp_path):
    t = time.time()
    one = train(tmp_path/"one", 1)
    print(time.time() - t)
    two = train(tmp_path/"two", 2)
    print(time.time() - t)
    three = train(tmp_path/"three", 3)
    print(time.time() - t)
    for a, b, c in zip(one, two, three, strict=True):
        print(a["step"], a["loss"], b["loss"]-a["loss"], c["loss"]-a["loss"])
    print(one[-1], two[-1])
