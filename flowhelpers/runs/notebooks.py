"""Which notebooks there are, and with what parameters they are to be run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowhelpers.core.files import DATA
from flowhelpers.runs.parameters import check, from_text, inspect, unknown

NOTEBOOKS = "FLOWHELPERS_NOTEBOOKS"  # a folder of notebooks to use in place of the package's own


def notebooks_folder() -> Path:
    """The folder of the notebooks: FLOWHELPERS_NOTEBOOKS, the package's own, or the checkout's.

    Raises:
        FileNotFoundError: If there is none.
    """
    named = os.environ.get(NOTEBOOKS)
    places = [Path(named)] if named else [DATA / "notebooks", DATA.parents[1] / "notebooks"]
    for place in places:
        if place.is_dir():
            return place.resolve()
    raise FileNotFoundError(f"no folder of notebooks at {places[-1]}")


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks of these names, numbers (`01`) or paths; the whole folder if none is given.

    Raises:
        ValueError: If there is none of that name; it names the nearest.
    """
    if names and all(_is_path(name) for name in names):
        return [Path(name).resolve() for name in names]
    folder = notebooks_folder()
    ours = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    if not ours:
        raise ValueError(f"no notebooks in {folder}")
    found = []
    for name in names or ours:
        stem = name.removesuffix(".ipynb")
        numbered = [each for each in ours if each.startswith(name + "_")]
        if _is_path(name):
            found.append(Path(name).resolve())
        elif stem in ours:
            found.append(ours[stem])
        elif len(numbered) == 1:
            found.append(ours[numbered[0]])
        elif Path(name).parent != Path():
            raise ValueError(f"there is no notebook {name}")
        else:
            raise ValueError(unknown("notebook", name, ours))
    return found


def plan(
    names: Sequence[str] = (), given: Mapping[str, str] | None = None, preset: str | None = None
) -> dict[Path, dict[str, Any]]:
    """The notebooks to run, and the parameters to override in each, all checked.

    Args:
        names: The notebooks, all if none.
        given: Parameters as texts; each goes to every notebook that has it.
        preset: A preset of `presets.yaml` in the notebooks' folder, which `given` overrides. Where
            all notebooks are run, those without it run as they stand.

    Raises:
        ValueError: For an unknown notebook, preset or parameter, a value of the wrong type, or a
            preset that a notebook of `names` does not have.
    """
    declared = {notebook: inspect(notebook) for notebook in find_notebooks(names)}
    every = {name for parameters in declared.values() for name in parameters}
    given = given or {}
    for name in given:
        if name not in every:
            raise ValueError(unknown("parameter", name, every))
    presets = _presets(preset) if preset else {}
    planned = {}
    for notebook, parameters in declared.items():
        stem = notebook.stem
        if preset and names and stem not in presets:
            raise ValueError(f"{notebook.name} has no preset {preset!r}: give parameters by -p")
        values = check(f"preset {preset} of {stem}", parameters, presets.get(stem, {}))
        for name in given.keys() & parameters.keys():
            values[name] = from_text(stem, parameters[name], given[name])
        planned[notebook] = values
    return planned


def _presets(preset: str) -> dict[str, dict[str, Any]]:
    """What a preset sets in each notebook that knows it."""
    import yaml

    path = notebooks_folder() / "presets.yaml"
    presets = (yaml.safe_load(path.read_text("utf-8")) if path.exists() else None) or {}
    known = {name for by_name in presets.values() for name in by_name}
    if preset not in known:
        raise ValueError(unknown("preset", preset, known))
    return {stem: by_name[preset] or {} for stem, by_name in presets.items() if preset in by_name}


def _is_path(name: str) -> bool:
    return name.endswith(".ipynb") and Path(name).is_file()
