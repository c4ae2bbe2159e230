"What several tests need: material that a user of tinycats does not have, and the browser."
import shutil
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
SHARED = Path(__file__).resolve().parents[2]/"shared"


def has_shared(name):
    return (SHARED/name).exists()


def shared(name):
    """The path of `name` in the folder `shared` beside the checkout; where it is absent the test is skipped
    by name."""
    if not has_shared(name):
        pytest.skip(f"shared/{name} is not beside this checkout")
    return SHARED/name
