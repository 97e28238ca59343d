"""What is known of a suite before it is loaded: a row of `data/suites.yaml`, or `suite.yaml`."""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from flowhelpers.core.features import MODULES, Site, check_choice, parse_site, suggestion
from flowhelpers.core.files import DATA, load_yaml, read_json

if TYPE_CHECKING:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FUNCTIONS = (None, "relu", "topk")  # any other sae-lens takes for ReLU
GEMMA = "gemma-2-2b"  # the suite of the paper's tables of features

# A sae-lens folder, or an SAE of sae-lens's list.
Release = Annotated[Mapping[Literal["release", "id"], str], Field(min_length=2)]
Source = str | Release


@dataclass(frozen=True, config=ConfigDict(strict=True))
class SuiteRow:
    """What has to be known to load a suite.

    `saes` are sae-lens folders, or `{release, id}` of sae-lens's list, and so are `transcoders`, of
    MLPs. In a file they and `neuronpedia` may be one pattern for every layer of a module.
    `parameters` counts model and SAEs together; `data/suites.yaml` says what the other keys are.
    """

    name: str
    model: str
    saes: Annotated[Mapping[Site, Source], Field(min_length=1)]
    parameters: int = 0
    revision: str | None = None
    about: str = ""
    folder: Path | None = None
    model_parameters: PositiveInt | None = None
    layers: PositiveInt | None = None
    d_model: PositiveInt | None = None
    d_att: PositiveInt | None = None
    features: int | None = None
    neuronpedia: Mapping[Site, Annotated[str, Field(pattern="^[^/]+/[^/]+$")]] = Field(default={})
    stored: Mapping[Literal["model", "saes"], Literal["float32", "float16", "bfloat16"]] = Field(
        default={}
    )
    variants: Mapping[str, Mapping[str, Any]] = Field(default={})
    by_l0: Mapping[str, Mapping[str, str]] = Field(default={})
    transcoders: Mapping[Site, Source] = Field(default={})
    notes: list[str] = Field(default=[])

    @property
    def is_local(self) -> bool:
        """Whether loading needs no network."""
        sources = self.saes.values()
        return Path(self.model).exists() and all(isinstance(source, str) for source in sources)


@cache
def registered() -> dict[str, SuiteRow]:
    """The suites that are known by name, each in its first variant."""
    return {
        name: read_suite_folder(DATA / row["folder"]) if "folder" in row else _row(name, row)
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
        return _chosen(rows[bare], asked) if asked else rows[bare]
    if (Path(name) / "suite.yaml").is_file():
        return read_suite_folder(Path(name))
    raise ValueError(f"unknown suite {bare!r}{suggestion(bare, rows)}; a folder needs a suite.yaml")


def _chosen(row: SuiteRow, asked: Iterable[str]) -> SuiteRow:
    name, chosen = row.name, {}
    for choice in asked:
        if choice in row.variants:
            kind = "variant"
        elif row.by_l0 and re.fullmatch(r"l0=\d+", choice):
            kind = "l0"
        elif set(choice.split("+")) <= set(MODULES):
            kind = "modules"
        else:
            valid = [*row.variants, *(["l0=70"] if row.by_l0 else []), "res+mlp"]
            raise ValueError(f"suite {name} has no variant {choice!r}{suggestion(choice, valid)}")
        if kind in chosen:
            raise ValueError(f"suite {name}: {choice!r} is the second of its kind")
        chosen[kind] = choice
    if "variant" in chosen:
        row = _row(name, _table()[name], None, chosen["variant"])
    if "l0" in chosen:
        row = _of_mean_l0(row, int(chosen["l0"].removeprefix("l0=")))
    if "modules" in chosen:
        kept = {s: row.saes[s] for s in row.saes if s.module in chosen["modules"].split("+")}
        of_model = row.model_parameters or 0
        share = (row.parameters - of_model) * len(kept) // len(row.saes)
        row = replace(row, saes=kept, parameters=of_model + share)
    return replace(row, name="@".join([name, *asked]))


def _of_mean_l0(row: SuiteRow, l0: int) -> SuiteRow:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases, saes = get_pretrained_saes_directory(), {}
    neuronpedia: dict[Site, str] = {}
    for site, canonical in row.saes.items():
        assert isinstance(canonical, Mapping)
        pattern = _filled(row.by_l0[site.module], {"layer": site.layer})
        release, found = releases[pattern["release"]], ids_by_l0(**pattern)
        _, nearest = min(found, key=lambda each: (abs(each[0] - l0), each[0]))
        saes[site] = {"release": pattern["release"], "id": nearest}
        first = releases[canonical["release"]].saes_map[canonical["id"]]
        is_canonical = release.saes_map[nearest] == first
        names = row.neuronpedia.get(site) if is_canonical else release.neuronpedia_id.get(nearest)
        if names:
            neuronpedia[site] = names
    return replace(row, saes=saes, neuronpedia=neuronpedia)


def ids_by_l0(release: str, id: str) -> list[tuple[int, str]]:
    """The ids of a release of sae-lens's list that fit a pattern, each after its {l0}."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    expression = re.escape(id).replace(re.escape("{l0}"), r"(\d+)")
    ids = get_pretrained_saes_directory()[release].saes_map
    return [(int(match[1]), i) for i in ids if (match := re.fullmatch(expression, i))]


def listed_release(release: str, sae_id: str) -> "PretrainedSAELookup":
    """What sae-lens's list says of a release; a ValueError names the nearest."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if release not in known:
        raise ValueError(f"sae-lens knows no release {release!r}{suggestion(release, known)}")
    if sae_id not in known[release].saes_map:
        near = suggestion(sae_id, known[release].saes_map)
        raise ValueError(f"release {release} has no SAE {sae_id!r}{near}")
    return known[release]


def declared(source: Source) -> tuple[float | None, float | None]:
    """Mean L0 and explained variance of an SAE, as its path or sae-lens's list gives them."""
    if isinstance(source, str):
        return None, None
    listed = listed_release(source["release"], source["id"])
    in_path = re.search(r"average_l0_(\d+)", listed.saes_map[source["id"]])
    l0 = float(in_path[1]) if in_path else listed.expected_l0.get(source["id"]) or None
    variance = listed.expected_var_explained.get(source["id"])
    return l0, None if variance == 1.0 else variance  # the list's word for what it lacks


def check_is_sae(sae: str, about: Mapping[str, Any]) -> None:
    """A ValueError if an SAE is said to be a transcoder, of another basis, or no ReLU or top-k."""
    kind, norm = str(about.get("architecture")), about.get("normalize_activations")
    ends = (("d_in", "d_out"), ("hook_name", "hook_name_out"), ("hook_point", "hook_point_out"))
    said = [f"{o}: {about[o]}" for i, o in ends if about.get(o) not in (None, "", about.get(i))]
    said += [kind] if re.search("transcoder|crosscoder|(^|[-_/])clt([-_/]|$)", kind) else []
    if said:
        told = f"is a transcoder, which reads one place and predicts another ({said[0]})"
        raise ValueError(f"{sae} {told}: expected an SAE (a suite's key `transcoders` is for them)")
    if norm == "covariance_whitening":
        told = f"is of whitened activations (normalize_activations: {norm})"
        raise ValueError(f"{sae} {told}: fold it by sae-lens's fold_activation_whitening")
    if (name := about.get("activation_fn_str", about.get("activation_fn"))) not in FUNCTIONS:
        raise ValueError(f"{sae} has the activation function {name}: expected relu or topk")


def read_suite_folder(folder: Path) -> SuiteRow:
    """The suite of a folder, from its `suite.yaml`."""
    from yaml import YAMLError

    path = folder / "suite.yaml"
    try:
        row = load_yaml(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return _row(folder.name, row, folder)


def _row(name: str, row: Any, folder: Path | None = None, variant: str | None = None) -> SuiteRow:
    from huggingface_hub.errors import SafetensorsParsingError as Cut

    try:
        return _checked_row(name, row, folder, variant)
    except (ValueError, TypeError, AttributeError, Cut) as error:  # pydantic's too; of other shapes
        where = f" ({folder / 'suite.yaml'})" if folder else ""
        raise ValueError(f"suite {name}{where}: {error}") from error


def _checked_row(name: str, row: Any, folder: Path | None, variant: str | None) -> SuiteRow:
    """The row with its patterns filled in, and with what the model's folder says of it."""
    if not isinstance(row, dict) or not isinstance(row.get("saes"), dict) or "model" not in row:
        raise ValueError("expected the key model, and saes with an SAE for each site or module")
    valid = [field.name for field in fields(SuiteRow) if field.name != "folder"]
    for key in row:
        check_choice("key", str(key), valid)
    model, config = str(row["model"]), {}
    if folder and (model.startswith((".", "/")) or (folder / model).exists()):
        model = str(folder / model)
        config = read_json(Path(model) / "config.json")
    variants = row.get("variants") or {}
    variant = variant or next(iter(variants), None)
    words = {"variant": variant, **variants[variant]} if variant else {}
    layers = row.get("layers") or config.get("num_hidden_layers") or config.get("n_layer")
    saes, transcoders = (
        {
            site: str(folder / source) if folder and isinstance(source, str) else source
            for site, source in _by_site(row.get(key) or {}, words, layers).items()
        }
        for key in ("saes", "transcoders")
    )
    found = SuiteRow(
        **{
            "name": name,
            "d_model": config.get("hidden_size"),
            "features": words.get("features"),
            "model_parameters": _count_parameters([Path(model)]) or None,
            **row,
            "model": model,
            "folder": folder,
            "layers": config.get("num_hidden_layers") or config.get("n_layer") or layers,
            "saes": saes,
            "transcoders": transcoders,
            "neuronpedia": _by_site(row.get("neuronpedia", {}), words, layers),
            "by_l0": _filled(row.get("by_l0", {}), words),
        }
    )
    return found if found.parameters else replace(found, parameters=_parameters(found))


def _filled(pattern: Any, words: Mapping[str, Any]) -> Any:
    """A pattern's strings with the words in their places; other words, such as {l0}, stay."""
    if isinstance(pattern, dict):
        return {key: _filled(value, words) for key, value in pattern.items()}
    for word, meaning in words.items():
        pattern = str(pattern).replace(f"{{{word}}}", str(meaning))
    return pattern


def _by_site(patterns: Mapping[str, Any], words: Mapping[str, Any], layers: Any) -> dict[Site, Any]:
    """Each entry at its site, and that of a module at every layer."""
    found: dict[Site, Any] = {}
    for key, pattern in patterns.items():
        if key in MODULES and not isinstance(layers, int):
            raise ValueError(f"a pattern for every layer, as of {key}, needs the key 'layers'")
        sites = [Site(i, key) for i in range(layers)] if key in MODULES else [parse_site(str(key))]
        if twice := found.keys() & sites:
            raise ValueError(f"{min(twice)} is named a second time, by {key}: expected each once")
        found |= {site: _filled(pattern, {**words, "layer": site.layer}) for site in sites}
    return found


def _parameters(row: SuiteRow) -> int:
    if not (row.features and row.d_model and row.model_parameters):
        folders = (Path(source) for source in row.saes.values() if isinstance(source, str))
        paths = (folder / "sae_weights.safetensors" for folder in folders)
        return (row.model_parameters or 0) + _count_parameters(paths)
    widths = [row.d_att or row.d_model if s.module == "att" else row.d_model for s in row.saes]
    return row.model_parameters + sum(row.features * (2 * d + 2) + d for d in widths)


def _count_parameters(paths: Iterable[Path]) -> int:
    # From the headers of the files that transformers loads of a folder: copies of the weights under
    # other names, adapters and states of optimizers are none. What is not here counts for nothing.
    from huggingface_hub import get_local_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    count = 0
    for path in filter(Path.exists, paths):
        with suppress(NotASafetensorsRepoError):  # pickled weights, whose sizes are not told
            count += sum(get_local_safetensors_metadata(path).parameter_count.values())
    return count
