"""The lock: what is installed is what it says, and what pyproject.toml asks for agrees with it."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
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
        each.name: [each.version for each in asked.specifier if each.operator == "<="]
        for asked in ASKED
        if (each := asked).name in LEANED_ON
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
    needed = [line for line in metadata.requires("flowhelpers") or [] if "extra ==" not in line]
    assert needed


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


def wheel(folder: Path, name: str, version: str, code: str) -> None:
    """A wheel of one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def newest(tmp_path: Path):
    """Tries releases planted as wheels, by one check that imports them all."""
    for name in ("apple", "berry", "cherry", "date_palm"):
        wheel(tmp_path, name, "999", "")
    wheel(tmp_path, "berry", "1000", "raise ImportError('planted in berry')")
    wheel(tmp_path, "cherry", "1000", "import berry\nraise ImportError('planted in cherry')")

    def run(*releases: str) -> "subprocess.CompletedProcess[str]":
        names = ", ".join(re.sub("[=-].*", "", each) for each in releases)
        (tmp_path / "fruits.py").write_text(
            "try:\n    import apple, date_palm\nexcept ModuleNotFoundError:\n    pass\n"
            "for name in ('berry', 'cherry'):\n    try:\n        __import__(name)\n"
            "    except ModuleNotFoundError:\n        pass\n"
        )
        assert names
        command = [sys.executable, ROOT / ".ci/newest", "--wheels", tmp_path, *releases]
        return subprocess.run(
            [*map(str, command), "--checks", f"runpy {tmp_path / 'fruits.py'}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run
