"""The lock: what is installed is what it says, and what pyproject.toml asks for agrees with it."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import yaml
from later import write_wheel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
ASKED = [
    Requirement(line)
    for lines in (
        PROJECT["dependencies"],
        *PROJECT["optional-dependencies"].values(),
        PYPROJECT["dependency-groups"]["build"],
    )
    for line in lines
]
# Their inner workings are leaned on: tried up to the version in the lock, and no further.
LEANED_ON = {
    "transformers", "transformer-lens", "sae-lens", "huggingface-hub",
    "papermill", "plotly", "nbconvert", "ipykernel",
}  # fmt: skip


def pins() -> dict[str, list[Requirement]]:
    """The lines of the lock by package; of some there is one for some Pythons or platforms."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    found: dict[str, list[Requirement]] = {}
    for line in lines:
        if line and not line.lstrip().startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def version_of(pin: Requirement) -> str:
    (exact,) = pin.specifier
    assert exact.operator == "=="
    return exact.version


PINS = pins()


def test_every_line_is_an_exact_version_and_what_is_needed_is_in_it():
    assert all(version_of(pin) for each in PINS.values() for pin in each)
    assert {canonicalize_name(each.name) for each in ASKED} <= set(PINS)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_what_is_asked_for_admits_what_is_locked(asked: Requirement):
    for pin in PINS[canonicalize_name(asked.name)]:
        assert version_of(pin) in asked.specifier


def test_what_is_leaned_on_is_asked_for_up_to_what_was_tried():
    bounds = {
        asked.name: [bound.version for bound in asked.specifier if bound.operator == "<="]
        for asked in ASKED
        if asked.name in LEANED_ON
    }
    assert bounds == {name: [version_of(pin) for pin in PINS[name]] for name in LEANED_ON}
    assert [version_of(pin) for pin in PINS["torch"]] == ["2.13.0"]


def test_what_is_installed_is_what_the_lock_says():
    off = {}
    for name, lines in PINS.items():
        here = [pin for pin in lines if pin.marker is None or pin.marker.evaluate()]
        assert len(here) <= 1, f"two lines of the lock hold here for {name}"
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not asked for, or built with alone
        if here and installed not in here[0].specifier:
            off[name] = (installed, version_of(here[0]))
    assert off == {}, "installed, and in the lock: give the README's command again"


def test_whatever_is_installed_with_the_package_is_in_the_lock():
    """All that flowhelpers and its extra `dev` draw in here, however far down."""
    todo, seen = [Requirement("flowhelpers[dev]")], set()
    while todo:
        each = todo.pop()
        key = canonicalize_name(each.name), frozenset(each.extras)
        if key in seen:
            continue
        seen.add(key)
        for line in metadata.requires(each.name) or []:
            child = Requirement(line)
            extras = each.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    assert {name for name, _ in seen} - {"flowhelpers"} <= set(PINS)


def test_the_metadata_of_the_package_is_that_of_pyproject():
    stated = {str(Requirement(line)) for line in metadata.requires("flowhelpers") or []}
    asked = {str(Requirement(line)) for line in PROJECT["dependencies"]}
    assert asked == {line for line in stated if "extra ==" not in line}
    python = metadata.metadata("flowhelpers")["Requires-Python"]
    assert set(python.split(",")) == set(PROJECT["requires-python"].split(","))


def test_conda_gets_the_locked_versions_of_the_package():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    assert conda == [
        f"python{PROJECT['requires-python']}",
        "pip",
        {"pip": ["--constraint constraints.txt", "--editable ."]},
    ]


def test_the_lock_says_by_what_command_it_was_made():
    head = (ROOT / "constraints.txt").read_text("utf-8").splitlines()[1]
    made = head.lstrip("# ").split()
    readme = (ROOT / "README.md").read_text("utf-8")
    (command,) = re.findall(r"^\$ \.venv/bin/(uv pip compile .*)$", readme, re.MULTILINE)
    assert [word for word in command.split() if word != "--upgrade"] == made


# The trial of the newest releases.


def test_a_broken_release_is_named_and_the_rest_is_tried_without_it(tmp_path: Path):
    write_wheel(tmp_path, "apple", "999", "")
    write_wheel(tmp_path, "berry", "999", "raise ImportError('planted in berry')")
    write_wheel(tmp_path, "cherry", "999", "from apple import *")
    write_wheel(tmp_path, "elder", "999", "raise ImportError('planted in elder')")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # of this folder alone

    def newest(**checks: str) -> list[str]:
        for name, fruits in checks.items():
            (tmp_path / f"{name}.py").write_text(
                "import importlib.util\n\n\ndef test_all_can_be_eaten():\n"
                f"    for name in {fruits.split()}:\n"
                "        if name == 'mould' or importlib.util.find_spec(name):\n"
                "            __import__(name)\n"
            )
        done = subprocess.run(
            [sys.executable, str(ROOT / ".ci/newest"), "--wheels", str(tmp_path)]
            + [f"{name}==999" for name in ("apple", "berry", "cherry", "elder")]
            + ["--checks", *(f"pytest -q {tmp_path / name}.py" for name in checks)],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        said = done.stdout.splitlines()
        assert said[2] == "newest: cherry 999, in the lock not at all", done.stderr
        assert done.returncode == (0 if "nothing broken" in said[-1] else 1)
        return [re.sub("FAILED .* - ", "", line) for line in said[4:]]

    assert newest(one="apple berry cherry elder", two="elder apple") == [
        "newest: pytest is broken by berry 999: ImportError: planted in berry",
        "newest: pytest is broken by elder 999: ImportError: planted in elder",
        "newest: 4 not as in the lock, 2 broken",
    ]
    assert newest(three="apple cherry") == ["newest: 4 not as in the lock, nothing broken"]
    assert newest(four="mould")[0].startswith(
        "newest: pytest is broken by nothing new: it fails on the lock as well: ModuleNotFoundErr"
    )


def test_the_tests_that_the_newest_are_tried_by_are_there():
    script = (ROOT / ".ci/newest").read_text("utf-8")
    named = re.findall(r"\"tests/([\w/]+\.py)::(\w+)\"", script, re.MULTILINE)
    assert len(named) == 12
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text("utf-8")


def test_upper_bounds_are_put_aside_for_the_newest_and_lower_ones_kept():
    loader = SourceFileLoader("newest", str(ROOT / ".ci/newest"))
    spec = spec_from_loader("newest", loader)
    assert spec
    newest = module_from_spec(spec)
    loader.exec_module(newest)
    asked = ["a>=5.23,<=5.24.0", "b<3,>=2; os_name == 'nt'", "c==1.2", "d[x]>=1"]
    lower = ["a>=5.23", 'b>=2; os_name == "nt"', "c==1.2", "d[x]>=1"]
    assert [newest.uncapped(each) for each in asked] == lower
    lines = (
        "# x\na-b==1.2 ; python_version < '3'\na-b==1.3 ; python_version > '3'\n    # by c\nd==2"
    )
    assert newest.pins(lines) == {"a-b": "1.3", "d": "2"}
