"""Whoever starts the tests in the background may have told them to ignore signals. The tests send some, so
here the usual handlers return.

A process whose autograd has started its threads cannot be forked. So files that fork come first, and then
those that take longest."""
import os
import signal

import pytest
from helpers import CHROMIUM

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
         signal.SIGHUP: signal.SIG_DFL}
FIRST = """test_runs test_checkpoint test_parallel test_cloud test_pages test_browser test_train""".split()

for number, usual in USUAL.items():
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


def pytest_collection_modifyitems(items):
    def place(item):
        return FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)

    items.sort(key=place)


@pytest.fixture(scope="module")
def browser():
    "Chromium without a window, driven by playwright."
    from playwright.sync_api import sync_playwright
    flags = ["--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()
