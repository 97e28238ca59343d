"""Suites: one language model and the SAEs trained on it, loaded as far as is asked for.

Decoders come first; the model and the encoders once an experiment asks for them.
"""

import re
import warnings
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowhelpers.core.features import FeatureId, Site, parse_feature, parse_site, suggestion
from flowhelpers.core.machine import check_device, check_memory, free_memory
from flowhelpers.core.versions import warn_of_untried
from flowhelpers.suites.registry import BYTES, SuiteRow, find_suite, listed_release

if TYPE_CHECKING:
    from flowhelpers.suites.attention import AttentionOutput
    from flowhelpers.suites.model import Model
    from flowhelpers.suites.sae_files import SaeFiles
    from flowhelpers.suites.saes import SAE
    from flowhelpers.suites.transcoders import Transcoder

KEPT = 4  # SAEs at a time where not all fit: a layer's three, and the stream before it
LARGE = 1e8  # parameters of a model from which on it runs on a GPU where there is one
VERY_LARGE = 1e9  # and in half precision there
# Names of what a model is loaded with in training that is looked at, or changes nothing read here.
USUAL = re.compile("revision|[^=]*(token|fold|cent|devic|type|default|trust|mem|=None|=False)")


class OnDemand(UserDict[Site, Any]):
    """SAEs that are read when they are asked for, the last few kept: all need not fit in memory."""

    def __init__(self, sites: Iterable[Site], load: "Callable[[Site], SAE]", kept: int):
        super().__init__(dict.fromkeys(sites, lru_cache(maxsize=kept)(load)))
        self.all_fit = kept >= len(self.data)
        self.about = cache(lambda site, name: getattr(self[site], name))

    def __getitem__(self, site: Site) -> "SAE":
        return self.data[site](site)


@dataclass(frozen=True)
class Suite:
    """A model and its SAEs.

    `source` is the model or what loads it; `dtype` that of the weights of model and encoders,
    while decoders keep their stored type; `checked_sites` are those that had their preflight.
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
        """A feature of this suite, from its written form; a ValueError says what there is."""
        feature = parse_feature(text) if isinstance(text, str) else text
        width = self.sae(feature.site).width
        if not 0 <= feature.index < width:
            raise ValueError(
                f"no feature {feature} in {self.name}: {feature.site} has features 0 to {width - 1}"
            )
        return feature

    def features(self, names: str | FeatureId | Iterable[str | FeatureId]) -> list[FeatureId]:
        """One or several features of this suite, from their written forms, each once."""
        several = [names] if isinstance(names, str | FeatureId) else names
        return list(dict.fromkeys(map(self.feature, several)))

    def sae(self, site: Site | str) -> "SAE":
        """The SAE at a site; a ValueError names the nearest if there is none."""
        site = parse_site(site) if isinstance(site, str) else site
        if site in self.saes:
            return self.saes[site]
        if not 0 <= site.layer < self.layers:
            raise ValueError(
                f"no layer {site.layer} in suite {self.name}: it has layers 0 to {self.layers - 1}"
            )
        near = suggestion(str(site), [str(s) for s in self.saes])
        raise ValueError(f"no SAE at {site} in suite {self.name}{near}")

    def about(self, site: Site, name: Literal["width", "input_site", "fingerprint"]) -> Any:
        """What an SAE's attribute of this name says; its files are read for it once at most."""
        if isinstance(self.saes, OnDemand) and site in self.saes:
            return self.saes.about(site, name)
        return getattr(self.sae(site), name)

    def transcoder(self, layer: int) -> "Transcoder":
        """The trained transcoder of a layer's MLP; which there are the row's `transcoders` say."""
        from flowhelpers.suites.transcoders import load_transcoder

        return load_transcoder(self.row, layer, self.d_model, self.device, self.dtype)


def memory_needed(row: SuiteRow, dtype: str = "float32", kept: int | None = None) -> int:
    """Bytes of the model, and of so many SAEs (all by default) with decoders as they are stored."""
    in_saes = (row.parameters - (row.model_parameters or 0)) / len(row.saes)
    count = len(row.saes)
    if row.model_parameters is not None:
        count = min(kept or count, count)
    each = BYTES[dtype] + BYTES[row.stored.get("saes", "float32")] / 2
    return int((row.model_parameters or 0) * BYTES[dtype] + count * in_saes * each)


def decoders_memory(row: SuiteRow) -> int:
    """Bytes that matching takes: the decoders of a few SAEs, and one being read."""
    numbers = (row.parameters - (row.model_parameters or 0)) // (2 * len(row.saes))
    kept = min(KEPT, len(row.saes)) + 2
    return kept * numbers * BYTES[row.stored.get("saes", "float32")]


def device_and_dtype(row: SuiteRow, device: str, dtype: str) -> tuple[str, str]:
    """`auto`: a GPU for a large model; bfloat16 for a very large one there, or to make it fit."""
    import torch

    device, dtype = str(device), str(dtype).removeprefix("torch.")  # torch's own will do
    size = row.model_parameters or 0
    if device == "auto":
        device = "cuda" if size >= LARGE and torch.cuda.is_available() else "cpu"
    check_device(device)
    if dtype == "auto":
        fits = memory_needed(row, kept=KEPT) <= free_memory(device)
        dtype = "bfloat16" if size >= VERY_LARGE and (device != "cpu" or not fits) else "float32"
    if dtype not in BYTES:
        raise ValueError(f"unknown dtype {dtype!r}{suggestion(dtype, ['auto', *BYTES])}")
    return device, dtype


def load_suite(name: str | Path | SuiteRow, device: str = "auto", dtype: str = "auto") -> Suite:
    """Load a language model and its SAEs: the first decoder now, the rest when it is asked for.

    A MemoryError if the decoders of a few SAEs do not fit; later, if the model does not.

    Args:
        name: A registered suite, as `find_suite` takes it, a folder with a `suite.yaml`, or a row.
        device: Torch device; `auto` takes a GPU for a large model where there is one.
        dtype: float32, bfloat16 or float16; `auto` takes bfloat16 for a very large model on a GPU.

    Example:
        >>> from flowhelpers import load_suite
        >>> suite = load_suite("flowlet")
        >>> suite.layers, suite.d_model, suite.sae("4/res").width
        (8, 192, 1024)
    """
    from flowhelpers.suites.sae_files import find_files

    warn_of_untried()
    row = name if isinstance(name, SuiteRow) else find_suite(name)
    device, dtype = device_and_dtype(row, device, dtype)
    size_is_known = row.is_local or row.parameters > 0
    all_fit = size_is_known and memory_needed(row, dtype) <= free_memory(device)
    if not all_fit:
        check_memory(decoders_memory(row), f"matching in suite {row.name}", device)
    _check_layers(row, row.layers)
    check_sources(row)
    sites = sorted(row.saes)
    files_of = cache(lambda site: find_files(row.saes[site]))  # their content is read for a digest
    load_model = cache(partial(_load_model, row, device, dtype, not all_fit, files_of))
    load = partial(_load_sae, row, load_model, files_of, device, dtype)
    saes = OnDemand(sites, load, len(sites) if all_fit else KEPT)
    saes[sites[0]]
    return Suite(row, load_model, saes, device, dtype)


def _load_model(row: SuiteRow, device: str, dtype: str, check: bool, files_of: Any) -> "Model":
    import torch

    from flowhelpers.suites.bridge import load_model

    if check:
        what = f"the model of suite {row.name}"
        check_memory(memory_needed(row, dtype, KEPT), what, device, dtype)
    model = load_model(row.model, device, getattr(torch, dtype), row.revision)
    if row.layers not in (None, model.layers):
        raise ValueError(f"suite {row.name}: its model has {model.layers} layers, not {row.layers}")
    _check_layers(row, model.layers)
    return replace(model, prepend_bos=_begin_with_bos(row, files_of))


def _begin_with_bos(row: SuiteRow, files_of: Any) -> bool:
    """Whether texts begin with BOS, as the first of the SAEs says."""
    return getattr(files_of(min(row.saes)), "prepend_bos", True)


def _check_layers(row: SuiteRow, layers: int | None) -> None:
    for site in row.saes:
        if layers and not site.layer < layers:
            raise ValueError(
                f"suite {row.name} names an SAE at {site}: its model has layers 0 to {layers - 1}"
            )


def _load_sae(
    row: SuiteRow,
    load_model: "Callable[[], Model]",
    files_of: "Callable[[Site], SaeFiles | None]",
    device: str,
    dtype: str,
    site: Site,
) -> "SAE":
    from flowhelpers.suites.attention import attention_output, stored_attention_output
    from flowhelpers.suites.lens_saes import MATCH, processing_of, take_means_off
    from flowhelpers.suites.sae_files import find_files, load_whole
    from flowhelpers.suites.saes import make_sae, read_sae

    def output() -> "AttentionOutput":
        stored = stored_attention_output(row.model, site.layer, row.revision)
        return stored or attention_output(load_model(), site.layer)

    source = row.saes[site]
    what = f"suite {row.name}: the SAE for {site} ({source})"
    try:
        files = files_of(site)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} lacks a file: {error}") from error
    d_model = row.d_model or load_model().d_model

    def load() -> Any:
        lens_sae = load_whole(what, source, files is not None, device, dtype)
        if files and (now := find_files(source)) and now.content != files.content:
            raise ValueError(f"{what} was written anew since its suite was loaded: load it again")
        centred, folded = processing_of(lens_sae)
        if folded and load_model().bridge.blocks[site.layer].attn.b_V is not None:
            told = "was trained on z without the biases of values (fold_value_biases: true), and"
            raise ValueError(f"{what} {told} here it holds them; {MATCH}")
        if centred and load_model().bridge.cfg.normalization_type == "LN":
            take_means_off(lens_sae)  # as LayerNorm does: other models are never centred
        return lens_sae

    if files is None:
        return make_sae(site, load(), d_model, str(source), output)
    if files.prepend_bos != _begin_with_bos(row, files_of):
        told = f"{what} has `prepend_bos: {str(files.prepend_bos).lower()}`"
        raise ValueError(f"{told}, that for {min(row.saes)} has not: expected one of both for all")
    at_issue = row.revision is not None or not Path(row.model).exists()  # a folder is as it is
    if (revision := files.model_kwargs.get("revision")) not in (None, row.revision) and at_issue:
        told = f"suite {row.name} has the model at revision {row.revision or 'main'}, and the SAE"
        raise ValueError(f"{told} for {site} ({source}) was trained on revision {revision}")
    if odd := {k: v for k, v in files.model_kwargs.items() if not USUAL.match(f"{k}={v}")}:
        told = f"suite {row.name}: its SAEs were trained on a model loaded with {odd}: is it this?"
        warnings.warn(told, stacklevel=2)
    files = replace(files, source=f"{files.source}, suite {row.name}")
    return read_sae(site, files, load, d_model, device, dtype, output)


def check_sources(row: SuiteRow) -> None:
    """The SAEs of a suite are of one model, as far as they say: a ValueError names two of them.

    It names a transcoder, too. Warns if the model is not the suite's, but such as the base of an
    instruction-tuned one.
    """
    from flowhelpers.suites.registry import check_is_sae
    from flowhelpers.suites.sae_files import sae_config

    trained_on: dict[str, Site] = {}
    for site, source in sorted(row.saes.items()):
        about: dict[str, Any] = {}
        if not isinstance(source, str):
            listed = listed_release(source["release"], source["id"])
            names = f"{source['release']}/{listed.saes_map[source['id']]}"
            about = {"model_name": listed.model, "architecture": names}
        elif (path := Path(source) / "cfg.json").is_file():
            about = sae_config(path)
        check_is_sae(f"suite {row.name}: the SAE for {site} ({source})", about)
        if about and len(twins := [str(at) for at in row.saes if row.saes[at] == source]) > 1:
            told = f"suite {row.name} has one SAE for {' and '.join(twins)} ({source})"
            raise ValueError(f"{told}: expected one for each, as by {{layer}} in a pattern")
        if model := about.get("model_name"):
            trained_on.setdefault(_short_name(model), site)
    if len(trained_on) > 1:
        (one, at), (other, there), *_ = trained_on.items()
        raise ValueError(
            f"suite {row.name}: its SAEs are of different models: {at} of {one}, {there} of {other}"
        )
    for name in trained_on:
        if not Path(row.model).exists() and _short_name(row.model) != name:
            warnings.warn(
                f"suite {row.name} has the model {row.model}, and its SAEs were trained on {name}",
                stacklevel=3,
            )


def _short_name(model: str) -> str:
    name = model.rsplit("/", 1)[-1].lower()
    return {"gpt2": "gpt2-small"}.get(name, name)  # as TransformerLens calls it
