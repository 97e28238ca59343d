"""Which notebooks there are, what parameters each declares, and with what values they are to run.

A notebook's cell with the tag `parameters` is the declaration, one `name: type = default  # help` a
line. Values are held against these types by pydantic, strictly, before anything runs.
"""

import ast
import json
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowhelpers.core.features import check_choice, suggestion
from flowhelpers.core.files import DATA

BY_SUITE = "by_suite"  # in a preset
NOTEBOOKS = "FLOWHELPERS_NOTEBOOKS"  # a folder of notebooks to use in place of the package's own
TYPES = {kind.__name__: kind for kind in (int, float, str, bool, list, dict)}
TYPES |= {"Literal": typing.Literal}
WORDS = {"none": None, "null": None, "true": True, "false": False}


@dataclass(frozen=True)
class Parameter:
    """What a notebook says of one of its parameters; `type` is its text, `kind` the type itself."""

    name: str
    type: str
    kind: Any
    default: Any
    help: str

    def check(self, value: Any) -> Any:
        """The value, if it is of the type, else a ValueError; an int will do for a float."""
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(self.kind).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(
                f"parameter {self.name!r} is {self.type}, not {value!r};"
                f" for example {self.name}={self.default}"
            ) from error

    def parse(self, text: str) -> Any:
        """The value that a text of the command line stands for; a list may be `a,b`."""
        items = text.strip().removeprefix("[").removesuffix("]").split(",")
        for value in (_literal(text), [_literal(item.strip()) for item in items], text):
            with suppress(ValueError):
                return self.check(value)
        return self.check(text)


def inspect(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name; none if it has no cell tagged `parameters`."""
    import nbformat

    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise ValueError(f"{notebook} is not a notebook: {str(error)[:80]}") from error
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    source = tagged[0].source if tagged else ""
    try:
        parameters = [_parameter(line, source) for line in ast.parse(source).body]
    except (SyntaxError, ValueError, NameError, TypeError) as error:
        raise ValueError(f"{notebook.name}: its parameters cannot be read: {error}") from error
    return {parameter.name: parameter for parameter in parameters}


def notebooks_folder() -> Path:
    """The folder of the notebooks: FLOWHELPERS_NOTEBOOKS, the package's own, or the checkout's."""
    own = DATA / "notebooks"
    default = own if own.is_dir() else DATA.parents[1] / "notebooks"
    folder = Path(os.environ.get(NOTEBOOKS) or default)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of notebooks at {folder}")
    return folder.resolve()


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks of these names, numbers (`01`) or paths; the whole folder if none is given."""
    ours = {path.stem: path for path in sorted(notebooks_folder().glob("*.ipynb"))}
    notebooks = []
    for name in names or ours:
        path, stem = Path(name), name.removesuffix(".ipynb")
        named = [own for key, own in ours.items() if key == stem or key.startswith(f"{name}_")]
        if path.suffix == ".ipynb" and path.is_file():
            notebooks.append(path.resolve())
        elif len(named) == 1:
            notebooks += named
        else:
            raise ValueError(f"unknown notebook {name!r}{suggestion(stem, ours)}")
    return notebooks


def plan(
    names: Sequence[str] = (), given: Mapping[str, str] | None = None, preset: str | None = None
) -> dict[Path, dict[str, Any]]:
    """The notebooks to run, and the parameters to override in each, all checked.

    Args:
        names: The notebooks, all if none.
        given: Parameters as texts; each goes to every notebook that has it.
        preset: A preset of `presets.yaml` in the notebooks' folder, which `given` overrides. Where
            all notebooks are run, those without it run as they stand. Its key `by_suite` holds what
            else is set for the named suites and their variants.
    """
    declared = {notebook: inspect(notebook) for notebook in find_notebooks(names)}
    given = given or {}
    _check_names(given, {name for parameters in declared.values() for name in parameters})
    presets = _preset(preset) if preset else {}
    planned = {}
    for notebook, parameters in declared.items():
        stem = notebook.stem
        if preset and names and stem not in presets:
            raise ValueError(f"{notebook.name} has no preset {preset!r}: give parameters by -p")
        settings = presets.get(stem, {})
        suites = settings.pop(BY_SUITE, {})
        suite = given.get("suite") or getattr(parameters.get("suite"), "default", None)
        settings |= suites.get(str(suite).split("@")[0], {})
        try:
            _check_names(settings, parameters)
            values = {name: parameters[name].check(value) for name, value in settings.items()}
        except ValueError as error:
            raise ValueError(f"preset {preset} of {stem}: {error}") from error
        for name in given.keys() & parameters.keys():
            values[name] = parameters[name].parse(given[name])
        planned[notebook] = values
    return planned


def merged(usual: Mapping, given: Mapping, or_none: Iterable[str] = ()) -> dict[str, Any]:
    """Settings as usual but for those given; another name or type is a ValueError.

    The usual value has the type; the first of a list has that of all of it. Those named in
    `or_none` may be None.

    Example:
        >>> merged({"alpha": -0.05, "sites": ["res"]}, {"alpha": 0})
        {'alpha': 0.0, 'sites': ['res']}
    """
    _check_names(given, usual)
    settings = dict(usual)
    for name, value in given.items():
        kind: Any = type(usual[name])
        if kind is list:
            kind = list[type(usual[name][0])]
        text = str(kind).removeprefix("<class '").removesuffix("'>")
        if name in or_none:
            kind, text = kind | None, f"{text} | None"
        settings[name] = Parameter(name, text, kind, usual[name], "").check(value)
    return settings


def _check_names(given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        check_choice("parameter", name, sorted(known))


def _preset(preset: str) -> dict[str, dict[str, Any]]:
    """What a preset sets in each notebook that has it."""
    import yaml

    path = notebooks_folder() / "presets.yaml"
    presets = (yaml.safe_load(path.read_text("utf-8")) if path.exists() else None) or {}
    known = sorted({name for by_name in presets.values() for name in by_name})
    check_choice("preset", preset, known)
    return {stem: by_name[preset] or {} for stem, by_name in presets.items() if preset in by_name}


def _parameter(line: ast.stmt, source: str) -> Parameter:
    if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
        raise ValueError(f"line {line.lineno} is not `name: type = value`")
    text = ast.unparse(line.annotation)
    kind = eval(text, {"__builtins__": {}}, TYPES)
    last = source.splitlines()[(line.end_lineno or line.lineno) - 1].encode()
    words = last[line.end_col_offset or 0 :].decode().strip().lstrip("# ")
    parameter = Parameter(line.target.id, text, kind, ast.literal_eval(line.value), words)
    parameter.check(parameter.default)
    return parameter


def _literal(text: str) -> Any:
    """The number, word, list or dict that a text writes in Python or JSON; else the text itself."""
    try:
        value = WORDS[text.lower()] if text.lower() in WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        try:
            return json.loads(text) if text.strip().startswith("{") else text
        except ValueError:
            return text
    return text if isinstance(value, str) else value
