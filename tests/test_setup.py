"The first thing a user meets: make with a Python or a make that is too old, or newer than what was tried."
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

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


# -- Pins --------------------------------------------------------------------------------------------------

PINS = dict(re.findall(r"^([\w.-]+)==(.*)$", (ROOT/"constraints.txt").read_text(encoding="utf-8"), re.M))
VERSIONS = re.search(r"^python_versions *= *(.*)$", (ROOT/"settings.ini").read_text(), re.M)[1].split()


def required_python(name, version):
    "The Pythons that a release takes, where that release is the one installed here; any, otherwise."
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return SpecifierSet()
    return SpecifierSet(found.metadata["Requires-Python"] or "" if found.version == version else "")


@pytest.mark.parametrize("python", [f"{version}.0" for version in VERSIONS])
def test_pins_take_every_python(python):
    "The first release of each Python, too: Debian 12 has 3.11.2."
    refused = [f"{name}=={version}" for name, version in PINS.items()
               if not required_python(name, version).contains(python)]
    assert not refused, f"Python {python} cannot have {refused}: run tests/pin_versions.sh"


def test_a_package_has_one_pin():
    lines = re.findall(r"^[\w.-]+==", (ROOT/"constraints.txt").read_text(encoding="utf-8"), re.M)
    names = [re.sub(r"[-_.]+", "-", line.lower()) for line in lines]
    assert not {name for name in names if names.count(name) > 1}
