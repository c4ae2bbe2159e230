"What only tests may know: where material lies that a user of tinycats does not have."
from pathlib import Path

import pytest


def shared(name):
    """The path of `name` in the folder `shared` beside the checkout; where it is absent the test is skipped
    by name."""
    path = Path(__file__).resolve().parents[2]/"shared"/name
    if not path.exists():
        pytest.skip(f"shared/{name} is not beside this checkout")
    return path
