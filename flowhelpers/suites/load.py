"""Suites: one language model and the SAEs trained on it, loaded as far as is asked for.

Decoders come first: matching, flow graphs and labels need nothing else. Of a suite of the hub the
model and the encoders are fetched and read once an experiment asks for them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from flowhelpers.core.features import FeatureId, Site, parse_feature, parse_site, suggestion
from flowhelpers.core.machine import check_device, check_memory, free_memory
from flowhelpers.core.versions import warn_of_untried
from flowhelpers.suites.hub import OFFLINE_HINT
from flowhelpers.suites.registry import BYTES, SuiteRow, find_suite

if TYPE_CHECKING:
    from flowhelpers.suites.attention import AttentionOutput
    from flowhelpers.suites.model import Model
    from flowhelpers.suites.saes import SAE

KEPT = 4  # SAEs at a time where not all fit: a layer's three, and the stream before it
LARGE = 1e8  # parameters of a model from which on it runs on a GPU where there is one
VERY_LARGE = 1e9  # and in half precision there


class OnDemand(Mapping[Site, "SAE"]):
    """SAEs that are read when they are asked for; the last few are kept.

    So a suite serves whose SAEs do not fit into memory together. Who goes through them
    should take one after the other, and keep none.
    """

    def __init__(self, sites: Iterable[Site], load: "Callable[[Site], SAE]", kept: int):
        self._sites = tuple(sites)
        self._load = lru_cache(maxsize=kept)(load)

    def __getitem__(self, site: Site) -> "SAE":
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
    """A model and its SAEs.

    Attributes:
        row: What it was loaded from.
        source: The language model behind named sites, or what loads it when it is asked for.
        saes: The SAE at each site; of a suite that is large or lies on the hub, each
            is read when it is asked for.
        device: Where SAEs and model are.
        dtype: Type of the weights of model and encoders; decoders that are matched are kept in the
            type they are stored in.
        looked_at: The sites that had their preflight.
    """

    row: SuiteRow
    source: "Model | Callable[[], Model]" = field(repr=False)
    saes: "Mapping[Site, SAE]" = field(repr=False)
    device: str = "cpu"
    dtype: str = "float32"
    checked_sites: set[Site] = field(default_factory=set, init=False, repr=False, compare=False)

    @cached_property
    def model(self) -> "Model":
        """The language model, loaded the first time that it is asked for."""
        return self.source() if callable(self.source) else self.source

    @property
    def name(self) -> str:
        """The suite's name."""
        return self.row.name

    @property
    def place(self) -> str:
        """Where it runs and in what type, in words."""
        return f"on {self.device} in {self.dtype}"

    @property
    def layers(self) -> int:
        """Number of layers of the model."""
        return self.row.layers or self.model.layers

    @property
    def d_model(self) -> int:
        """Width of the model's stream."""
        return self.row.d_model or self.model.d_model

    def feature(self, text: str | FeatureId) -> FeatureId:
        """A feature of this suite, from its written form.

        Raises:
            ValueError: If there is no such layer, module or index; the message says what there is.
        """
        feature = parse_feature(text) if isinstance(text, str) else text
        width = self.sae(feature.site).width
        if not 0 <= feature.index < width:
            raise ValueError(
                f"no feature {feature} in {self.name}: {feature.site} has features 0 to {width - 1}"
            )
        return feature

    def sae(self, site: Site | str) -> "SAE":
        """The SAE at a site.

        Raises:
            ValueError: If the suite has none there; the message names the nearest.
        """
        site = parse_site(site) if isinstance(site, str) else site
        if site in self.saes:
            return self.saes[site]
        if not 0 <= site.layer < self.layers:
            raise ValueError(
                f"no layer {site.layer} in suite {self.name}: it has layers 0 to {self.layers - 1}"
            )
        near = suggestion(str(site), [str(s) for s in self.saes])
        raise ValueError(f"no SAE at {site} in suite {self.name}{near}")


def memory_needed(row: SuiteRow, dtype: str = "float32") -> int:
    """Bytes that a suite takes with all in memory: its weights, and decoders as they are stored."""
    decoders = (row.parameters - (row.model_parameters or 0)) // 2
    return row.parameters * BYTES[dtype] + decoders * _stored_bytes(row)


def least_memory(row: SuiteRow, dtype: str = "float32") -> int:
    """Bytes that a suite takes with its model and a few SAEs in memory at a time.

    That of a suite which does not say how large its model alone is, is what it takes as a whole.
    """
    whole, count = memory_needed(row, dtype), max(len(row.saes), 1)
    if row.model_parameters is None:
        return whole
    model = row.model_parameters * BYTES[dtype]
    return model + (whole - model) * min(KEPT, count) // count


def decoders_memory(row: SuiteRow) -> int:
    """Bytes that matching takes: the decoders of a few SAEs, and one being read."""
    count = max(len(row.saes), 1)
    numbers = (row.parameters - (row.model_parameters or 0)) // (2 * count)
    return (min(KEPT, count) + 2) * numbers * _stored_bytes(row)


def _stored_bytes(row: SuiteRow) -> int:
    return BYTES[row.stored.get("saes", "float32")]


def chosen_device(row: SuiteRow, device: str = "auto") -> str:
    """A GPU for a large model if there is one, unless a device is named.

    Raises:
        ValueError: If torch does not find the device that is named.
    """
    import torch

    if device != "auto":
        check_device(device)
        return device
    is_large = (row.model_parameters or 0) >= LARGE
    return "cuda" if is_large and torch.cuda.is_available() else "cpu"


def chosen_dtype(row: SuiteRow, device: str, dtype: str = "auto") -> str:
    """bfloat16 for a very large model on a GPU, or where float32 does not fit; float32 else.

    Raises:
        ValueError: If the type that is named is unknown.
    """
    if dtype != "auto":
        if dtype not in BYTES:
            raise ValueError(f"unknown dtype {dtype!r}{suggestion(dtype, ['auto', *BYTES])}")
        return dtype
    is_large = (row.model_parameters or 0) >= VERY_LARGE
    fits = least_memory(row) <= free_memory(device)
    return "bfloat16" if is_large and (device != "cpu" or not fits) else "float32"


def load_suite(name: str | Path, device: str = "auto", dtype: str = "auto") -> Suite:
    """Load a language model and its SAEs.

    A suite of a folder whose memory is there is loaded at once. Of others the first decoder is, so
    that what is wrong with the first is wrong at once, and the rest when it is asked for. Packages
    of versions that were not tried are warned of, once.

    Args:
        name: A registered suite, as `registry.find_suite` takes it, or a folder with a
            `suite.yaml`.
        device: Torch device; `auto` as `chosen_device` says.
        dtype: Type of the weights: float32, bfloat16 or float16; `auto` as `chosen_dtype` says.

    Raises:
        ValueError: If the suite is unknown or broken.
        MemoryError: If the machine has less memory than a few decoders need; once it is asked for,
            than the model and a few SAEs.
        ConnectionError: If something has to be fetched and there is no network.
        PermissionError, FileNotFoundError, OSError: As `hub.fetch` says.
    """
    warn_of_untried()
    row = find_suite(name)
    device = chosen_device(row, device)
    dtype = chosen_dtype(row, device, dtype)
    size_is_known = row.is_local or row.parameters > 0
    all_fit = size_is_known and memory_needed(row, dtype) <= free_memory(device)
    if not all_fit:
        check_memory(decoders_memory(row), f"matching in suite {row.name}", device)
    if row.layers:
        _check_layers(row, row.layers)
    check_sources(row)
    load_model = cache(partial(_load_model, row, device, dtype, not all_fit))
    sites = sorted(row.saes)
    load = partial(_load_sae, row, load_model, device, dtype)
    saes: Mapping[Site, SAE] = OnDemand(sites, load, len(sites) if all_fit else KEPT)
    if not (row.is_local and all_fit):
        saes[sites[0]]
        return Suite(row, load_model, saes, device, dtype)
    model = load_model()
    for sae in saes.values():
        sae.lens_sae  # noqa: B018  what is wrong with it is wrong at once
    return Suite(row, model, dict(saes), device, dtype)


def _load_model(row: SuiteRow, device: str, dtype: str, check: bool) -> "Model":
    import torch

    from flowhelpers.suites.model import load_model

    if check:
        held = torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0
        needed = max(least_memory(row, dtype) - held, 0)  # of which decoders may be there already
        check_memory(needed, f"the model of suite {row.name}", device, dtype)
    with _told(row):
        model = load_model(row.model, device, getattr(torch, dtype), row.revision)
    _check_layers(row, model.layers)
    if row.d_model not in (None, model.d_model):
        raise ValueError(
            f"the model {row.model} of suite {row.name} has width {model.d_model}:"
            f" expected {row.d_model}"
        )
    return model


def _check_layers(row: SuiteRow, layers: int) -> None:
    for site in row.saes:
        if not 0 <= site.layer < layers:
            raise ValueError(
                f"suite {row.name} names an SAE at {site}: its model has layers 0 to {layers - 1}"
            )


def _load_sae(
    row: SuiteRow, load_model: "Callable[[], Model]", device: str, dtype: str, site: Site
) -> "SAE":
    from flowhelpers.suites.attention import attention_output, stored_attention_output
    from flowhelpers.suites.saes import load_folder, load_release

    def output() -> "AttentionOutput":
        stored = stored_attention_output(row.model, site.layer, row.revision)
        return stored or attention_output(load_model(), site.layer)

    source = row.saes[site]
    d_model = row.d_model or _stored_width(row) or load_model().d_model
    of = (
        partial(load_folder, Path(source))
        if isinstance(source, str)
        else partial(load_release, source["release"], source["id"])
    )
    with _told(row):
        found = of(site=site, d_model=d_model, device=device, dtype=dtype, output=output)
    trained_on = found.files.revision if found.files else None
    at_issue = row.revision is not None or not Path(row.model).exists()  # a folder is as it is
    if trained_on is not None and at_issue and trained_on != row.revision:
        raise ValueError(
            f"suite {row.name} has the model at revision {row.revision or 'main'}, and the"
            f" SAE for {site} ({found.source}) was trained on revision {trained_on}"
        )
    return found


def _stored_width(row: SuiteRow) -> int | None:
    # The width of a model of the hub, from its configuration alone.
    from flowhelpers.suites.hub import fetch, read_hub_json

    if Path(row.model).is_dir():
        return None
    with _told(row):
        config = read_hub_json(fetch(row.model, "config.json", row.revision))
    config = {**config, **config.get("text_config", {})}
    return config.get("hidden_size") or config.get("n_embd")


def check_sources(row: SuiteRow) -> None:
    """The SAEs of a suite are of one model, as far as they say, and that is the suite's.

    Raises:
        ValueError: If two of them are of different models, naming both.

    Warns:
        UserWarning: If they were trained on another model than the suite's, such as the base of an
            instruction-tuned one.
    """
    import warnings

    trained_on: dict[str, Site] = {}
    for site, source in sorted(row.saes.items()):
        if name := _model_of(source):
            trained_on.setdefault(name, site)
    if len(trained_on) > 1:
        (one, at), (other, there), *_ = trained_on.items()
        raise ValueError(
            f"suite {row.name}: its SAEs are of different models: {at} of {one}, {there} of {other}"
        )
    for name in trained_on:
        if not Path(row.model).exists() and _plain(row.model) != name:
            warnings.warn(
                f"suite {row.name} has the model {row.model}, and its SAEs were trained on {name}",
                stacklevel=3,
            )


def _model_of(source: "str | Mapping[str, str]") -> str | None:
    from flowhelpers.suites.sae_files import listed_release, trained_on

    if isinstance(source, str):
        name = trained_on(Path(source))
    else:
        name = listed_release(source["release"], source["id"]).model
    return _plain(name) if name else None


def _plain(model: str) -> str:
    # As libraries call it: TransformerLens has other names for some.
    name = model.rsplit("/", 1)[-1].lower()
    return {"gpt2": "gpt2-small"}.get(name, name)


@contextmanager
def _told(row: SuiteRow) -> Iterator[None]:
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError(
            f"suite {row.name} is not cached and could not be fetched: it needs the model"
            f" {row.model} and {len(row.saes)} SAEs; {OFFLINE_HINT}"
            f" ({str(error).replace(f'; {OFFLINE_HINT}', '')})"
        ) from error
