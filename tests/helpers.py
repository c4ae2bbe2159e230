"What several tests need: material that a user of tinycats does not have, the browser, and time."
import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
LONG = "TINYCATS_LONG" in os.environ
SHARED = Path(__file__).resolve().parents[2]/"shared"


def slow(time):
    "A mark for a test that takes so long; it runs where TINYCATS_LONG is set."
    return pytest.mark.skipif(not LONG, reason=f"{time}; TINYCATS_LONG=1")


def has_shared(name):
    return (SHARED/name).exists()


def shared(name):
    """The path of `name` in the folder `shared` beside the checkout; where it is absent the test is skipped
    by name."""
    if not has_shared(name):
        pytest.skip(f"shared/{name} is not beside this checkout")
    return SHARED/name
