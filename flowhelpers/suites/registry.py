"""What is known of a suite before anything is loaded: rows of one table.

Every suite is a row of `data/suites.yaml`, or the `suite.yaml` of a folder.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt, ValidationError

from flowhelpers.core.features import MODULES, Site, parse_site, suggestion
from flowhelpers.core.files import DATA, read_json

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GEMMA = "gemma-2-2b"  # the suite of the paper's tables of features
L0 = re.compile(r"l0=(\d+)")

Source = str | Mapping[str, str]


class _Row(BaseModel, extra="forbid", strict=True):
    """The keys of a row as they are written; `saes` and others may be patterns with `{layer}`."""

    model: str
    saes: dict[Any, Any] = Field(min_length=1)
    name: str | None = None
    about: str = ""
    revision: str | None = None
    layers: PositiveInt | None = None
    d_model: PositiveInt | None = None
    d_att: PositiveInt | None = None
    parameters: PositiveInt | None = None
    model_parameters: PositiveInt | None = None
    variants: dict[str, dict[str, Any]] = {}
    by_l0: dict[str, Any] = {}
    neuronpedia: dict[Any, str] = {}
    stored: dict[Literal["model", "saes"], Literal["float32", "float16", "bfloat16"]] = {}
    notes: list[str] = []
    features: int | None = None  # of the variant


@dataclass(frozen=True)
class SuiteRow:
    """What has to be known to load a suite.

    Attributes:
        saes: For each site a sae-lens folder, or `{release, id}` of a release of sae-lens.
        parameters: Of model and SAEs together; `model_parameters` of the model alone.
        d_att: Width at which attention SAEs read, where that is not the stream's.
        features: Number of features of each SAE, if the same for all.
        neuronpedia: What Neuronpedia calls the SAE of a site, `model/source`.
        stored: The types in which the `model` and the `saes` lie on the hub.
        variants: The kinds of SAEs; the first is taken unless one is asked for.
        notes: What to know of it, and what it cannot do.
    """

    name: str
    model: str
    saes: Mapping[Site, Source]
    parameters: int
    revision: str | None = None
    about: str = ""
    folder: Path | None = None
    model_parameters: int | None = None
    layers: int | None = None
    d_model: int | None = None
    d_att: int | None = None
    features: int | None = None
    neuronpedia: Mapping[Site, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether loading needs no network."""
        sources = self.saes.values()
        return Path(self.model).exists() and all(isinstance(source, str) for source in sources)


@cache
def registered() -> dict[str, SuiteRow]:
    """The suites that are known by name, each in its first variant."""
    return {
        name: read_suite_folder(DATA / row["folder"]) if "folder" in row else _row(name, row, None)
        for name, row in _table().items()
    }


@cache
def _table() -> dict[str, dict[str, Any]]:
    import yaml

    return yaml.safe_load((DATA / "suites.yaml").read_text(encoding="utf-8"))


def find_suite(name: str | Path) -> SuiteRow:
    """The row of a suite, by its registered name or by its folder.

    A name may ask for more after an `@`: a variant (`gemma-2-2b@65k`), the SAEs whose mean L0 is
    nearest to a number (`@l0=70`; SAEs of equal L0 match best), or some modules (`@res+mlp`).
    """
    rows, (bare, *asked) = registered(), str(name).split("@")
    if bare in rows:
        return _chosen(bare, asked) if asked else rows[bare]
    if (Path(name) / "suite.yaml").is_file():
        return read_suite_folder(Path(name))
    raise ValueError(f"unknown suite {bare!r}{suggestion(bare, rows)}; a folder needs a suite.yaml")


def _chosen(name: str, asked: Iterable[str]) -> SuiteRow:
    raw, row = _table()[name], registered()[name]
    chosen: dict[str, Any] = {}
    for choice in asked:
        if choice in row.variants:
            kind, value = "variant", choice
        elif match := L0.fullmatch(choice):
            kind, value = "l0", int(match[1])
        elif set(choice.split("+")) <= set(MODULES):
            kind, value = "modules", choice.split("+")
        else:
            there = [*row.variants, *(["l0=70"] if "by_l0" in raw else []), "res+mlp"]
            raise ValueError(f"suite {name} has no variant {choice!r}{suggestion(choice, there)}")
        if kind in chosen:
            raise ValueError(
                f"suite {name}: {choice!r} is the second of its kind that is asked for"
            )
        chosen[kind] = value
    variant, l0, modules = (chosen.get(kind) for kind in ("variant", "l0", "modules"))
    if l0 is not None and "by_l0" not in raw:
        raise ValueError(f"suite {name} has no choice of SAEs by their mean L0")
    if "folder" not in raw:
        row = _row(name, raw, None, variant)
    if l0 is not None:
        row = _of_mean_l0(row, _fill(raw, variant)["by_l0"], l0)
    if modules is not None:
        row = _of_modules(row, modules)
    return replace(row, name="@".join([name, *asked]))


def _of_modules(row: SuiteRow, modules: Iterable[str]) -> SuiteRow:
    modules = set(modules)
    kept = {site: source for site, source in row.saes.items() if site.module in modules}
    of_model = row.model_parameters or 0
    share = (row.parameters - of_model) * len(kept) // len(row.saes)
    return replace(row, saes=kept, parameters=of_model + share)


def _of_mean_l0(row: SuiteRow, patterns: Mapping[str, Any], l0: int) -> SuiteRow:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    saes: dict[Site, Source] = {}
    neuronpedia: dict[Site, str] = {}
    for site, canonical in row.saes.items():
        pattern = _filled(patterns[site.module], site.layer, None)
        assert isinstance(pattern, dict)
        assert isinstance(canonical, dict)
        release = releases[pattern["release"]]
        expression = re.escape(pattern["id"]).replace(re.escape("{l0}"), r"(\d+)")
        found = [(int(m[1]), i) for i in release.saes_map if (m := re.fullmatch(expression, i))]
        _, nearest = min(found, key=lambda each: (abs(each[0] - l0), each[0]))
        saes[site] = {"release": pattern["release"], "id": nearest}
        first = releases[canonical["release"]].saes_map[canonical["id"]]
        called = release.neuronpedia_id.get(nearest)
        if release.saes_map[nearest] == first:
            called = row.neuronpedia.get(site)
        if called:
            neuronpedia[site] = called
    return replace(row, saes=saes, neuronpedia=neuronpedia)


def declared_l0(source: Source) -> float | None:
    """The mean L0 that a release gives for an SAE: of its path, or sae-lens's list."""
    release, sae_id = _listing(source)
    if release is None:
        return None
    if match := re.search(r"average_l0_(\d+)", release.saes_map[sae_id]):
        return float(match[1])
    return release.expected_l0.get(sae_id) or None


def declared_variance(source: Source) -> float | None:
    """The explained variance that sae-lens's list gives for an SAE, if it does."""
    release, sae_id = _listing(source)
    found = release.expected_var_explained.get(sae_id) if release else None
    return None if found == 1.0 else found  # the list's word for what it lacks


def _listing(source: Source) -> tuple[Any, str]:
    # What sae-lens lists of the release, None unless it lists the SAE; and its id.
    if isinstance(source, str):
        return None, source
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = get_pretrained_saes_directory().get(source["release"])
    return release if release and source["id"] in release.saes_map else None, source["id"]


def read_suite_folder(folder: Path) -> SuiteRow:
    """The suite of a folder, from its `suite.yaml`."""
    import yaml

    path = folder / "suite.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no suite.yaml in {folder}")
    try:
        row = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} holds no mapping: expected the keys model and saes")
    if "dictionaries" in row:  # the key's name in folders of earlier versions
        row["saes"] = row.pop("dictionaries")
    name = row.get("name")
    return _row(name if isinstance(name, str) else folder.name, row, folder)


def _row(
    name: str, row: Mapping[str, Any], folder: Path | None, variant: str | None = None
) -> SuiteRow:
    where = f"suite {name}" + (f" ({folder / 'suite.yaml'})" if folder else "")
    for key in row.keys() - _Row.model_fields.keys():
        raise ValueError(
            f"{where}: unknown key {key!r}{suggestion(key, sorted(_Row.model_fields))}"
        )
    try:
        _Row.model_validate(row)
    except ValidationError as error:
        raise ValueError(f"{where}: {error}") from error
    row = _fill(row, variant)
    local = folder / row["model"] if folder else None
    is_here = local is not None and local.exists()
    model = str(local if is_here else row["model"])
    if is_here and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {model}: expected a Hugging Face model folder")
    config = read_json(Path(model) / "config.json") if is_here else {}
    layers = row.get("layers") or config.get("num_hidden_layers", 0)
    saes: dict[Site, Source] = {}
    neuronpedia: dict[Site, str] = {}
    for key, source in row["saes"].items():
        for site in _sites(str(key), layers, where, model):
            saes[site] = _filled(source, site.layer, folder, f"{where}: ")
    for key, source in row.get("neuronpedia", {}).items():
        for site in _sites(str(key), layers, where, model):
            neuronpedia[site] = _called(source, site, where)
    found = SuiteRow(
        name=name,
        model=model,
        saes=saes,
        parameters=row.get("parameters") or 0,
        revision=row.get("revision"),
        about=row.get("about", ""),
        folder=folder,
        model_parameters=row.get("model_parameters") or _count_parameters(Path(model), {}) or None,
        layers=config.get("num_hidden_layers") or layers or None,
        d_model=row.get("d_model") or config.get("hidden_size"),
        d_att=row.get("d_att"),
        features=row.get("features"),
        neuronpedia=neuronpedia,
        stored=row.get("stored", {}),
        variants=tuple(row.get("variants", {})),
        notes=tuple(row.get("notes", [])),
    )
    return found if found.parameters else replace(found, parameters=_parameters(found))


def _fill(row: Mapping[str, Any], variant: str | None) -> dict[str, Any]:
    # The words of a variant in their places; those of the layer and of L0 stay.
    if not row.get("variants"):
        return dict(row)
    variant = variant or next(iter(row["variants"]))
    words = {"variant": variant, **row["variants"][variant]}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        for word, meaning in words.items():
            value = value.replace(f"{{{word}}}", str(meaning))
        return value

    patterns = {key: filled(row[key]) for key in ("saes", "neuronpedia") if key in row}
    lists = {key: filled(row[key]) for key in ("by_l0",) if key in row}
    return {**row, **patterns, **lists, "features": words.get("features")}


def _sites(key: str, layers: int, where: str, model: str) -> list[Site]:
    if key not in MODULES:
        try:
            return [parse_site(key)]
        except ValueError as error:
            raise ValueError(f"{where}: {error}{suggestion(key, MODULES)}") from error
    if not layers:  # of a pattern for every layer
        raise ValueError(
            f"{where}: no folder {model} says how many layers there are: a pattern for"
            " every layer needs the key 'layers'"
        )
    return [Site(layer, key) for layer in range(layers)]


def _called(source: Any, site: Site, where: str) -> str:
    name = str(source).replace("{layer}", str(site.layer))
    if name.count("/") != 1:
        raise ValueError(f"{where}: {site} on Neuronpedia: {source!r} is not model/source")
    return name


def _filled(source: Any, layer: int, folder: Path | None, where: str = "") -> Source:
    if isinstance(source, str):
        path = source.replace("{layer}", str(layer))
        return str(folder / path) if folder else path
    if not isinstance(source, dict) or set(source) != {"release", "id"}:
        raise ValueError(
            f"{where}an SAE is a sae-lens folder or has the keys release and id: got {source}"
        )
    return {key: str(value).replace("{layer}", str(layer)) for key, value in source.items()}


def _parameters(row: SuiteRow) -> int:
    if not (row.features and row.d_model and row.model_parameters):
        return _count_parameters(Path(row.model), row.saes)
    widths = [row.d_att or row.d_model if s.module == "att" else row.d_model for s in row.saes]
    return row.model_parameters + sum(row.features * (2 * d + 2) + d for d in widths)


def _count_parameters(model: Path, saes: Mapping[Site, Any]) -> int:
    # From the files' headers; what lies on a hub counts for nothing unless the row declares it.
    from safetensors import SafetensorError, safe_open

    folders = [
        model,
        *(Path(source) for source in saes.values() if isinstance(source, str)),
    ]
    total = 0
    for path in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(path, "np") as tensors:
                names = tensors.keys()
                total += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or corrupt: {error}") from error
    return total
