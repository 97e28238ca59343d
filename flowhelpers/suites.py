"""Suites: one language model and the dictionaries trained on it.

Every suite, the embedded one included, is described in the same few words: a row of
`data/suites.yaml`, or the `suite.yaml` of a folder.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhelpers.features import MODULES, FeatureId, Site, parse_feature, parse_site, suggestion
from flowhelpers.machine import check_device, check_memory, free_memory

if TYPE_CHECKING:
    from flowhelpers.dictionaries import Dictionary
    from flowhelpers.model import Model

DATA = Path(__file__).parent / "data"
KEPT = 4  # dictionaries at a time where not all fit: a layer's three, and the stream before it
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_KINDS = {int: "a whole number", str: "text"}
OFFLINE_HINT = "the suite flowlet needs no network"


@dataclass(frozen=True)
class SuiteRow:
    """What has to be known to load a suite.

    Attributes:
        name: The suite's name.
        model: A Hugging Face model, by folder or by hub name.
        revision: The model's revision on the hub.
        dictionaries: For each site a sae-lens folder, or `{release, id}` of a release of sae-lens.
        parameters: Parameters of model and dictionaries together.
        about: One line on what it is.
        folder: Where the suite lies, if it is a folder.
        model_parameters: Those of the model alone, if known.
    """

    name: str
    model: str
    dictionaries: Mapping[Site, str | Mapping[str, str]]
    parameters: int
    revision: str | None = None
    about: str = ""
    folder: Path | None = None
    model_parameters: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether loading needs no network."""
        sources = self.dictionaries.values()
        return Path(self.model).exists() and all(isinstance(source, str) for source in sources)


class OnDemand(Mapping[Site, "Dictionary"]):
    """Dictionaries that are read when they are asked for; the last few are kept.

    So a suite serves whose dictionaries do not fit into memory together. Who goes through them
    should take one after the other, and keep none.
    """

    def __init__(self, sites: Iterable[Site], load: "Callable[[Site], Dictionary]", kept: int):
        self._sites = tuple(sites)
        self._load = lru_cache(maxsize=kept)(load)

    def __getitem__(self, site: Site) -> "Dictionary":
        if site not in self._sites:
            raise KeyError(site)
        return self._load(site)

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


@dataclass(frozen=True)
class Suite:
    """A model and its dictionaries, loaded.

    Attributes:
        row: What it was loaded from.
        model: The language model behind named sites.
        dictionaries: The dictionary at each site; where memory is short, each is read when asked
            for.
    """

    row: SuiteRow
    model: "Model" = field(repr=False)
    dictionaries: "Mapping[Site, Dictionary]" = field(repr=False)

    @property
    def name(self) -> str:
        """The suite's name."""
        return self.row.name

    @property
    def layers(self) -> int:
        """Number of layers of the model."""
        return self.model.layers

    def feature(self, text: str | FeatureId) -> FeatureId:
        """A feature of this suite, from its written form.

        Raises:
            ValueError: If there is no such layer, module or index; the message says what there is.
        """
        feature = parse_feature(text) if isinstance(text, str) else text
        width = self.dictionary(feature.site).width
        if not 0 <= feature.index < width:
            raise ValueError(
                f"no feature {feature} in {self.name}: {feature.site} has features 0 to {width - 1}"
            )
        return feature

    def dictionary(self, site: Site | str) -> "Dictionary":
        """The dictionary at a site.

        Raises:
            ValueError: If the suite has none there; the message names the nearest.
        """
        site = parse_site(site) if isinstance(site, str) else site
        if site in self.dictionaries:
            return self.dictionaries[site]
        if not 0 <= site.layer < self.layers:
            raise ValueError(
                f"no layer {site.layer} in suite {self.name}: it has layers 0 to {self.layers - 1}"
            )
        near = suggestion(str(site), [str(s) for s in self.dictionaries])
        raise ValueError(f"no dictionary at {site} in suite {self.name}{near}")


@cache
def registered() -> dict[str, SuiteRow]:
    """The suites that are known by name."""
    import yaml

    rows = yaml.safe_load((DATA / "suites.yaml").read_text())
    return {
        name: read_suite_folder(DATA / row["folder"]) if "folder" in row else _row(name, row, None)
        for name, row in rows.items()
    }


def read_suite_folder(folder: Path) -> SuiteRow:
    """The suite of a folder: its `suite.yaml`.

    Raises:
        FileNotFoundError: If there is no `suite.yaml`.
        ValueError: If it lacks something or is not YAML.
    """
    import yaml

    path = folder / "suite.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no suite.yaml in {folder}")
    try:
        row = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} holds no mapping: expected the keys model and dictionaries")
    return _row(row.get("name", folder.name), row, folder)


def _row(name: str, row: Mapping[str, Any], folder: Path | None) -> SuiteRow:
    where = f"suite {name}" + (f" ({folder / 'suite.yaml'})" if folder else "")
    known = {"name", "model", "revision", "layers", "dictionaries", "about"}
    known |= {"parameters", "model_parameters"}
    for key in row.keys() - known:
        raise ValueError(f"{where}: unknown key {key!r}{suggestion(key, sorted(known))}")
    for key in {"model", "dictionaries"} - row.keys():
        raise ValueError(f"{where}: the key {key!r} is missing")
    kinds = {"layers": int, "parameters": int, "model_parameters": int}
    for key, kind in (kinds | {"model": str, "revision": str}).items():
        if key in row and not isinstance(row[key], kind):
            raise ValueError(f"{where}: {key} is {row[key]!r}, expected {_KINDS[kind]}")
    if not isinstance(row["dictionaries"], dict):
        raise ValueError(f"{where}: the key 'dictionaries' holds no mapping from sites to sources")
    local = folder / str(row["model"]) if folder else None
    is_here = local is not None and local.exists()
    model = str(local if is_here else row["model"])
    layers = row.get("layers") or (_config(Path(model)).get("num_hidden_layers") if is_here else 0)
    dictionaries: dict[Site, str | Mapping[str, str]] = {}
    for key, source in row["dictionaries"].items():
        if key in MODULES:  # one pattern for every layer
            if not layers:
                raise ValueError(
                    f"{where}: no folder {model} says how many layers there are: a pattern for"
                    " every layer needs the key 'layers'"
                )
            for layer in range(layers):
                dictionaries[Site(layer, key)] = _filled(source, layer, folder)
        else:
            site = parse_site(str(key))
            dictionaries[site] = _filled(source, site.layer, folder)
    if not dictionaries:
        raise ValueError(f"{where}: no dictionary is named")
    return SuiteRow(
        name=name,
        model=model,
        dictionaries=dictionaries,
        parameters=row.get("parameters") or _count_parameters(Path(model), dictionaries),
        revision=row.get("revision"),
        about=row.get("about", ""),
        folder=folder,
        model_parameters=row.get("model_parameters") or _count_parameters(Path(model), {}) or None,
    )


def _config(model: Path) -> dict[str, Any]:
    path = model / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {model}: expected a Hugging Face model folder")
    return json.loads(path.read_text())


def _filled(source: Any, layer: int, folder: Path | None) -> str | Mapping[str, str]:
    if isinstance(source, str):
        path = source.replace("{layer}", str(layer))
        return str(folder / path) if folder else path
    if not isinstance(source, dict) or set(source) != {"release", "id"}:
        raise ValueError(
            f"a dictionary is a sae-lens folder or has the keys release and id: got {source}"
        )
    return {key: str(value).replace("{layer}", str(layer)) for key, value in source.items()}


def _count_parameters(model: Path, dictionaries: Mapping[Site, Any]) -> int:
    # From the files' headers; what lies on a hub counts for nothing unless the row declares it.
    from safetensors import SafetensorError, safe_open

    folders = [
        model,
        *(Path(source) for source in dictionaries.values() if isinstance(source, str)),
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


def find_suite(name: str | Path) -> SuiteRow:
    """The row of a suite, by its registered name or by its folder.

    Raises:
        ValueError: If there is neither; the message names the nearest suite.
    """
    rows = registered()
    if str(name) in rows:
        return rows[str(name)]
    if (Path(name) / "suite.yaml").is_file():
        return read_suite_folder(Path(name))
    raise ValueError(
        f"unknown suite {str(name)!r}{suggestion(str(name), rows)}; a folder needs a suite.yaml"
    )


def memory_needed(row: SuiteRow, dtype: str = "float32") -> int:
    """Bytes that a suite takes once loaded: its weights, and unit directions in float32."""
    return row.parameters * BYTES[dtype] + row.parameters * 2


def least_memory(row: SuiteRow, dtype: str = "float32") -> int:
    """Bytes that a suite takes with no more than a few dictionaries in memory at a time.

    That of a suite which does not say how large its model alone is, is what it takes as a whole.
    """
    whole, count = memory_needed(row, dtype), max(len(row.dictionaries), 1)
    if row.model_parameters is None:
        return whole
    model = row.model_parameters * BYTES[dtype]
    return model + (whole - model) * min(KEPT, count) // count


def load_suite(name: str | Path, device: str = "cpu", dtype: str = "float32") -> Suite:
    """Load a language model and its dictionaries.

    Where there is not enough memory for all dictionaries together, each is read when it is needed.

    Args:
        name: A registered suite, or a folder with a `suite.yaml`.
        device: Torch device.
        dtype: Type of the weights: float32, bfloat16 or float16.

    Raises:
        ValueError: If the suite is unknown or broken.
        MemoryError: If the machine has less memory than the model and a few dictionaries need.
        ConnectionError: If something has to be fetched and there is no network.
    """
    import torch

    row = find_suite(name)
    if dtype not in BYTES:
        raise ValueError(f"unknown dtype {dtype!r}{suggestion(dtype, BYTES)}")
    check_device(device)
    all_fit = memory_needed(row, dtype) <= free_memory(device)
    if not all_fit:
        check_memory(least_memory(row, dtype), f"suite {row.name}", device, dtype)

    from flowhelpers.dictionaries import load_folder, load_release
    from flowhelpers.model import attention_output, load_model

    try:
        model = load_model(row.model, device, getattr(torch, dtype), row.revision)
        sites = sorted(row.dictionaries)
        for site in sites:
            if not 0 <= site.layer < model.layers:
                raise ValueError(
                    f"suite {row.name} names a dictionary at {site}:"
                    f" its model has layers 0 to {model.layers - 1}"
                )

        def load(site: Site) -> "Dictionary":
            source = row.dictionaries[site]
            output = attention_output(model, site.layer) if site.module == "att" else None
            of = (
                partial(load_folder, Path(source))
                if isinstance(source, str)
                else partial(load_release, source["release"], source["id"])
            )
            return of(site=site, d_model=model.d_model, device=device, dtype=dtype, output=output)

        kept = len(sites) if all_fit else KEPT
        dictionaries: Mapping[Site, Dictionary] = OnDemand(sites, load, kept)
        if all_fit:
            dictionaries = dict(dictionaries)
        else:
            dictionaries[sites[0]]  # what is wrong with the first is wrong at once
    except (OSError, RuntimeError) as error:
        links = list(_links(error))
        if row.is_local or not any(map(_is_network_failure, links)):
            raise
        cause = str(links[-1]).partition("\n")[0]
        raise ConnectionError(
            f"suite {row.name} is not cached and could not be fetched: it needs the model"
            f" {row.model} and {len(row.dictionaries)} dictionaries; {OFFLINE_HINT}"
            f" ({type(links[-1]).__name__}: {cause})"
        ) from error
    return Suite(row, model, dictionaries)


def _links(error: BaseException | None) -> Iterator[BaseException]:
    # An error and what led to it; the last is nearest to the cause.
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_network_failure(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError, ConnectionError)
    return isinstance(error, kinds) or "couldn't connect" in str(error)
