"""The Hub as a program sees it: push, list, load, private repositories, revisions and the cache, over HTTP
with a stand-in on this machine. Each step is a process of its own: the environment is read only once."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import slow

from hub_server import TOKEN, hub_server
from tinycats.dit import TinyDiT, load_model, save_model

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hub():
    with hub_server() as hub:
        yield hub


@pytest.fixture
def project(tmp_path):
    "A project with a run `mine` of a tiny network."
    (tmp_path/"settings.ini").write_text("lib_name = tinycats\n")
    run = tmp_path/"outputs"/"mine"
    run.mkdir(parents=True)
    torch.manual_seed(0)
    model = TinyDiT(16, patch_size=8, dim=16, depth=1, num_heads=2, num_classes=2)
    torch.nn.init.normal_(model.final_layer.weight)
    model.classes = ["tabby", "black"]
    save_model(model, run/"ema.safetensors", run="mine", step=7, weights="ema 0.9", data="toy")
    (run/"config.json").write_text('{"steps": 7, "data": "toy", "data_root": "/a/secret/place"}')
    (run/"samples").mkdir()
    (run/"samples"/"final.png").write_bytes(b"a picture")
    return tmp_path


def run(project, hub, code, token=TOKEN, **env):
    "A Python process in the project that knows the hub; what it printed, or its last line of error."
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("HF_", "TINYCATS_"))}
    env = dict(PYTHONPATH=str(ROOT), HF_ENDPOINT=hub.address, HF_HOME=str(project/"cache"),
               HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1") | env
    if token:
        env["HF_TOKEN"] = token
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=project, env=kept | env, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


PUSH = "from tinycats import push_to_hub\nprint(push_to_hub('mine', 'user/mine'{}))"
LOAD = """
import torch
from tinycats import load_model
model = load_model({})
torch.save(model.state_dict(), "loaded.pt")
print(model.classes, model.metadata["step"])
"""


def test_push_list_load_equal_weights(hub, project):
    code, printed, error = run(project, hub, PUSH.format(""))
    assert code == 0, error
    assert printed == f"{hub.address}/user/mine"
    code, printed, error = run(project, hub, """
from huggingface_hub import HfApi
print(sorted(HfApi().list_repo_files("user/mine")))""")
    assert printed == "['README.md', 'config.json', 'ema.safetensors', 'samples.png']", error
    for name in ("'user/mine'", "'hf://user/mine'"):
        code, printed, error = run(project, hub, LOAD.format(name), token=None)
        assert code == 0, error
        assert printed == "['tabby', 'black'] 7"
        loaded = torch.load(project/"loaded.pt")
        for key, value in load_model(project/"outputs"/"mine").state_dict().items():
            assert torch.equal(loaded[key], value)
    _, files = hub.find("user/mine", "main")
    assert files["ema.safetensors"] == (project/"outputs/mine/ema.safetensors").read_bytes()
    assert b"secret" not in b"".join(files.values())
    assert b'load_model("user/mine")' in files["README.md"]


@slow("half a minute")
def test_a_second_push_replaces_and_revisions_stay(hub, project):
    assert run(project, hub, PUSH.format(""))[0] == 0
    first = hub.repos["user/mine"]["refs"]["main"]
    save_model(load_model(project/"outputs/mine"), project/"outputs/mine/ema.safetensors", step=8)
    code, _, error = run(project, hub, PUSH.format(", revision='later'"))
    assert code == 0, error
    assert run(project, hub, LOAD.format("'user/mine'"))[1].endswith(" 7")
    assert run(project, hub, LOAD.format("'user/mine', revision='later'"))[1].endswith(" 8")
    assert run(project, hub, LOAD.format("'hf://user/mine@later'"))[1].endswith(" 8")
    assert run(project, hub, LOAD.format(f"'user/mine', revision='{first}'"))[1].endswith(" 7")


def test_a_private_repository_needs_its_token(hub, project):
    assert run(project, hub, PUSH.format(", private=True"))[0] == 0
    assert hub.repos["user/mine"]["private"]
    assert run(project, hub, LOAD.format("'user/mine'"))[0] == 0
    code, _, error = run(project, hub, LOAD.format("'user/mine'"), token=None, HF_HOME=str(project/"empty"))
    assert code != 0
    assert error.startswith("PermissionError: user/mine: the Hub knows no such repository, or wants a token")


@slow("half a minute")
def test_what_is_in_the_cache_needs_no_network(hub, project):
    assert run(project, hub, PUSH.format(""))[0] == 0
    assert run(project, hub, LOAD.format("'user/mine'"))[0] == 0
    before = len(hub.requests)
    code, printed, error = run(project, hub, LOAD.format("'user/mine'"), HF_HUB_OFFLINE="1")
    assert (code, printed) == (0, "['tabby', 'black'] 7"), error
    assert len(hub.requests) == before
    gone = dict(HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    code, printed, error = run(project, hub, LOAD.format("'user/mine'"), **gone)
    assert (code, printed) == (0, "['tabby', 'black'] 7"), error
    code, _, error = run(project, hub, LOAD.format("'user/other'"), **gone)
    assert error.startswith("ConnectionError: user/other: no answer from the Hub, and none in the cache")


def test_errors_are_one_line(hub, project):
    def last_line(code, **kwargs):
        status, _, error = run(project, hub, code, **kwargs)
        assert status != 0
        return error

    assert "user/none: the Hub knows no such repository; check" in last_line(LOAD.format("'user/none'"))
    assert last_line(PUSH.format(""), token=None).startswith("PermissionError: user/mine: ")
    assert not hub.repos
    nobody = last_line(PUSH.format(""), HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    assert nobody.startswith("ConnectionError: user/mine: no answer from the Hub")
    other = PUSH.format("").replace("user/mine", "somebody/mine")
    assert "this token may not do that" in last_line(other)
    commits = {"1"*40: {"README.md": b""}}
    hub.repos["user/empty"] = dict(private=False, refs=dict(main="1"*40), commits=commits)
    assert "holds no TinyDiT: it has no ema.safetensors" in last_line(LOAD.format("'user/empty'"))
    commits["1"*40]["ema.safetensors"] = b"something else"
    assert "holds no TinyDiT" in last_line(LOAD.format("'user/empty'"))
    assert "knows no such revision" in last_line(LOAD.format("'user/empty', revision='v9'"))


def test_the_command_pushes_and_draws(hub, project):
    command = "import sys\nfrom tinycats.__main__ import main\nmain({!r})"
    code, printed, error = run(project, hub, command.format(["push", "mine", "user/mine", "--private"]))
    assert (code, printed) == (0, f"{hub.address}/user/mine"), error
    code, printed, error = run(project, hub, command.format(["sample", "user/mine", "--samples", "1"]))
    assert (code, printed) == (0, "2 images, in cats.png"), error
    code, _, error = run(project, hub, command.format(["sample", "user/none"]))
    assert (code, error) == (1, "user/none: the Hub knows no such repository; check the name")
