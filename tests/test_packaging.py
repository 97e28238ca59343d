"""What is handed out: what it says it needs, what is tracked, and what the README promises."""

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DEV = PROJECT["optional-dependencies"]["dev"]
CLUSTER = PROJECT["optional-dependencies"]["cluster"]  # imported where it is used
LARGEST = 1_000_000  # bytes
LARGE = {f"flowhelpers/data/{name}/model/model.safetensors" for name in ("flowlet", "flowlet-mini")}
OURS = {"flowhelpers", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OF_ONE_MACHINE = re.compile(rb"(?<![\w.])/(root|work|home)/\w")


@cache
def tracked() -> tuple[str, ...]:
    """The files under version control; where there is no git, those that .gitignore lets be."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        names = listed.stdout.rstrip("\0").split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
        ignored = [".git", *(ROOT / ".gitignore").read_text("utf-8").replace("/", "").split()]
        names = [
            name
            for name in names
            if not any(fnmatch(part, each) for part in name.split("/") for each in ignored)
        ]
    return tuple(sorted(name for name in names if (ROOT / name).is_file()))


def test_what_is_tracked_is_found():
    assert {"README.md", "LICENSE", "flowhelpers/__init__.py", ".ci/run"} <= set(tracked())


def notebooks() -> list[str]:
    return [name for name in tracked() if name.endswith(".ipynb")]


def imported(sources: list[str]) -> set[str]:
    """The top-level modules, neither ours nor the standard library's, that the sources import."""
    found = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - OURS


def normal(name: str) -> str:
    found = re.match(r"[\w.-]+", name)
    assert found, name
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def undeclared(sources: list[str], requirements: list[str]) -> dict[str, list[str]]:
    """The modules imported whose distributions the requirements do not name."""
    declared = {normal(requirement) for requirement in requirements}
    installed = packages_distributions()
    origins = {name: installed.get(name, [name]) for name in imported(sources)}
    return {
        name: names
        for name, names in origins.items()
        if not declared.intersection(normal(each) for each in names)
    }


def test_an_import_that_is_not_declared_is_found():
    source = "import yaml, os\ndef f():\n    from scipy.stats import norm\n    from . import g"
    assert imported([source]) == {"yaml", "scipy"}
    assert undeclared([source], ["PyYAML>=6"]) == {"scipy": ["scipy"]}


@pytest.mark.parametrize(
    ("folder", "requirements"),
    [("flowhelpers", PROJECT["dependencies"] + CLUSTER), ("tests", PROJECT["dependencies"] + DEV)],
)
def test_whatever_the_code_imports_is_declared(folder: str, requirements: list[str]):
    names = [name for name in tracked() if name.startswith(f"{folder}/") and name.endswith(".py")]
    assert names
    assert undeclared([(ROOT / name).read_text("utf-8") for name in names], requirements) == {}


def test_whatever_the_notebooks_import_is_declared():
    books = [nbformat.read(ROOT / name, as_version=4) for name in notebooks()]
    code = [c.source for book in books for c in book.cells if c.cell_type == "code"]
    sources = [re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE) for source in code]
    assert undeclared(sources, PROJECT["dependencies"]) == {}


def test_the_readme_has_one_command_for_the_main_job_and_one_for_the_tests():
    blocks = [block for block in FENCED.findall(README) if "python3 -m venv" in block]
    commands = [block.removesuffix("\n") for block in blocks]
    assert not any("\n" in command for command in commands), "each is one line, alone in its block"
    # What is built on the way is built by the lock as well, by older and newer releases of pip.
    lock = "PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt"
    make = f"python3 -m venv .venv && {lock} .venv/bin/python -m pip install -e"
    assert commands == [
        f"{make} . && .venv/bin/flowhelpers run",
        f"{make} '.[dev]' && .venv/bin/python -m pytest",
    ]
    # .ci/run takes the same two, as the only lines that begin and end so
    assert [line for line in README.splitlines() if line.startswith("python3")] == commands


def test_the_readme_names_every_notebook_and_links_to_nothing_that_is_not_there():
    assert [name for name in notebooks() if Path(name).name not in README] == []
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README)]
    local = [link for link in links if link and "://" not in link]
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_no_large_file_is_tracked_by_accident():
    sizes = {name: (ROOT / name).stat().st_size for name in tracked()}
    assert {name for name, size in sizes.items() if size > LARGEST} <= LARGE


def test_no_tracked_file_names_a_place_of_one_machine():
    found = {name: OF_ONE_MACHINE.search((ROOT / name).read_bytes()) for name in tracked()}
    assert {name: match[0] for name, match in found.items() if match} == {}
