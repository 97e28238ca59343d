"""JupyterLab as `flowhelpers lab` starts it, in a folder of its own, and what one does in it."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Locator, Page

NOTEBOOK = ".jp-NotebookPanel:not(.lm-mod-hidden)"
# Whether all cells have run, or one has failed; those that hide their code show no number.
DONE = """notebook => {
  const all = [...document.querySelectorAll(`${notebook} .jp-CodeCell`)];
  const cells = all.filter(cell => !cell.querySelector('.jp-InputPlaceholder'));
  const prompts = cells.map(cell => cell.querySelector('.jp-InputPrompt').textContent);
  const failed = document.querySelector(`${notebook} [data-mime-type$="jupyter.error"]`);
  return failed || prompts.every(each => /[0-9]/.test(each));
}"""


@contextmanager
def open_lab(folder: Path) -> Iterator[str]:
    """JupyterLab in a folder; the address of its first page, which asks for no token."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "JUPYTER_CONFIG_DIR": str(folder / ".jupyter")}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / ".lab"), "PYTHONUNBUFFERED": "1"}
    settings = folder / ".lab/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # all cells are drawn, out of view as well
    command = [sys.executable, "-m", "flowhelpers", "lab", "--no-browser", "--port", "0"]
    command += ["--allow-root", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    with (folder / "lab.log").open("w+") as log:
        lab = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            yield _address(folder / "lab.log", lab)
        finally:
            lab.terminate()
            lab.wait(20)


def _address(log: Path, lab: subprocess.Popen) -> str:
    for _ in range(300):
        if found := re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab\S*", log.read_text()):
            with suppress(OSError):  # said before it listens
                urllib.request.urlopen(found[0], timeout=30).close()
                return found[0]
        if lab.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def run_all(page: Page, seconds: float) -> None:
    """Runs all cells and waits until all have run or one has failed."""
    idle = page.locator("#jp-main-statusbar").get_by_text(re.compile(r"Python 3.* \| Idle"))
    idle.wait_for(timeout=60_000)
    page.locator(f"{NOTEBOOK} .jp-Cell").first.wait_for()
    page.get_by_text("Run", exact=True).first.click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(DONE, arg=NOTEBOOK, timeout=1000 * seconds)


def cell_of(page: Page, name: str) -> Locator:
    """The cell with this name, scrolled into view, where JupyterLab draws it."""
    cell = page.locator(f"{NOTEBOOK} .jp-CodeCell", has_text=f"papermill_description={name}")
    cell.first.scroll_into_view_if_needed()
    return cell.first


def save(page: Page) -> None:
    """Saves the notebook and waits until it is on disk."""
    with page.expect_response(lambda r: r.request.method == "PUT" and "contents" in r.url):
        page.keyboard.press("Control+s")
