"The first thing a user meets: make with a Python or a make that is too old, or newer than what was tried."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


@pytest.fixture
def clone(tmp_path):
    "A clone without an environment."
    for name in ("settings.ini", "setup.py", "constraints.txt", "Makefile"):
        shutil.copy(ROOT/name, tmp_path)
    return tmp_path


def make(clone, version, *words):
    """`make demo` with a Python that says it has this version and can make no environment; the lines of
    errors that are not make's own."""
    shim = clone/"python-shim"
    shim.write_text(f"""#!/bin/sh
test "$1" = -c || {{ echo "the set-up goes on" >&2; exit 1; }}
code="import sys; sys.version_info = ({version}, 0, 'final', 0); $2"
shift 2
exec {sys.executable} -c "$code" "$@"
""")
    shim.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "demo", f"PYTHON={shim}", *words]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    return [line for line in done.stderr.splitlines() if not line.startswith("make")]


def test_an_old_python_is_one_line(clone):
    assert make(clone, "3, 9") == ["This is Python 3.9, and tinycats needs 3.11 or newer. "
                                   "Name one: make PYTHON=python3.13 ..."]
    assert not (clone/".venv").exists()


def test_a_newer_python_is_a_warning(clone):
    lines = make(clone, "3, 15")
    assert re.match(r"This is Python 3.15, and tinycats was tried with 3.11 3.12 3.13 3.14. Should", lines[0])
    assert lines[1] == "the set-up goes on"


@pytest.mark.parametrize("minor", [11, 14])
def test_a_known_python_is_no_line(clone, minor):
    assert make(clone, f"3, {minor}") == ["the set-up goes on"]


def test_an_absent_python_is_one_line(clone):
    lines = make(clone, "3, 12", "PYTHON=no-such-python")
    assert lines == ["There is no no-such-python here. Name a Python of 3.11 3.12 3.13 3.14: make PYTHON=..."]


def test_an_old_make_is_one_line(clone):
    "As far as a newer make can play it: it says which features it has."
    makefile = (clone/"Makefile").read_text()
    (clone/"Makefile").write_text(makefile.replace("$(.FEATURES)", "target-specific"))
    done = subprocess.run(["make", "help"], cwd=clone, capture_output=True, text=True)
    assert done.returncode != 0
    assert "tinycats needs GNU make 3.81 or newer" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
