"""The system's chromium, driven by playwright: pages that fail in it fail the test."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
LOCAL = ("127.0.0.1", "localhost", "")
expect.set_options(timeout=30_000)  # a busy machine takes its time


def eventually(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for what a page shows: it is drawn in the page's own time."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "not so in the page"
        time.sleep(0.05)


@contextmanager
def open_browser(shots: Path) -> Iterator["Pages"]:
    """A browser without a network beyond this machine; skips where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: install it to test pages in a browser")
    shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Pages(browser, shots)
        browser.close()


class Pages:
    """Pages of one browser; `problems` are errors in their consoles and requests to elsewhere."""

    def __init__(self, browser: Browser, shots: Path) -> None:
        self.browser, self.shots = browser, shots
        self.problems: list[str] = []

    def new(self, **options: Any) -> Page:
        """A page in a context of its own, watched."""
        page = self.browser.new_context(**options).new_page()
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._see(request.url))
        return page

    def shot(self, page: Page, name: str) -> Path:
        """A picture of the page, kept for whoever reads the run."""
        path = self.shots / f"{name}.png"
        page.screenshot(path=path)
        return path

    def _hear(self, said: ConsoleMessage) -> None:
        if said.type == "error":
            self.problems.append(said.text)

    def _see(self, url: str) -> None:
        place = urlsplit(url)
        if place.scheme not in ("data", "blob", "about") and place.hostname not in (*LOCAL, None):
            self.problems.append(f"a request to {url}")
