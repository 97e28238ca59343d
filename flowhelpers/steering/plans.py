"""Steering by features over many layers: plans, their schedules and their edits (paper 3.5, B)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from flowhelpers.activations.preflight import preflight_once
from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import FeatureId, Site, check_choice, parse_feature
from flowhelpers.core.files import write_text
from flowhelpers.flow.graph import FlowGraph
from flowhelpers.interventions.edits import add_per_row, rescale_per_row
from flowhelpers.suites.model import Edit, editing

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

STRATEGIES = ("single", "constant", "exponential", "linear")
UNITS = ("theta", "max", "unit")  # of s
SteeringVectors = Mapping[Site, Tensor]  # what is added to the stream, by hook point


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Step:
    """One feature of a plan: its name, r to rescale or s to add, and what one unit of s is."""

    feature: str
    strength: FiniteFloat
    scale: FiniteFloat  # a multiple of the feature's decoder row; 1 to rescale


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Plan:
    """Which features of a suite are steered, and how much.

    To `rescale` is h + (r - 1) · a · v with a read live (CHOICES 21), to `add` h + s · v. The unit
    of s is a feature's own threshold (`theta`) or max activation (`max`), or a vector of norm 1
    (`unit`; CHOICES 19).
    """

    suite: str
    kind: Literal["rescale", "add"]
    unit: Literal["theta", "max", "unit", "activation"]  # activation to rescale
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]
    about: str = ""

    def table(self) -> "pd.DataFrame":
        """One row a feature: `feature`, `strength`, `scale`, `layer`, `module`, `index`."""
        import pandas as pd

        return pd.DataFrame([asdict(s) | asdict(parse_feature(s.feature)) for s in self.steps])

    @contextmanager
    def on(self, suite: "Suite") -> Iterator[None]:
        """Steers every pass of the suite's model inside the block, in any code."""
        with editing(suite.model, plan_edits(suite, [self])):
            yield


def schedule(
    strength: float,
    layers: Sequence[int],
    strategy: str = "constant",
    alpha: float = -0.05,
    end_strength: float = 1.0,
    from_start: bool = False,
) -> dict[int, float]:
    """The strength at each layer of a graph, whichever are steered (paper B.2).

    `constant` and `single` give s; `exponential` s · exp(α l), with l the layer's number, or
    counted from the first layer (CHOICES 17); `linear` goes from s at the first to s* at the last,
    and is s where these are one (CHOICES 18). α and s* are the paper's. An unknown strategy is a
    ValueError.
    """
    check_choice("strategy", strategy, STRATEGIES)
    start, end = min(layers), max(layers)
    if strategy == "exponential":
        first = start if from_start else 0
        return {layer: strength * math.exp(alpha * (layer - first)) for layer in layers}
    if strategy == "linear" and end > start:
        slope = (end_strength - strength) / (end - start)
        return {layer: strength + slope * (layer - start) for layer in layers}
    return dict.fromkeys(layers, strength)


def make_plan(
    suite: "Suite",
    features: FlowGraph | Sequence[FeatureId | str] | FeatureId | str,
    strength: float,
    kind: Literal["rescale", "add"] = "add",
    strategy: str = "constant",
    layer: int | None = None,
    *,
    unit: Literal["theta", "max", "unit"] = "theta",
    max_activation: Mapping[str, float] | None = None,
    about: str = "",
    **of_schedule: Any,
) -> Plan:
    """A plan from the nodes of a flow graph, or from a list of features.

    `single` steers the features of one layer, the other strategies those of all layers from the
    first to that one (paper B.1, B.2); without a `layer` it is the last of the features.

    Args:
        features: A flow graph, all of whose nodes are steered, or features.
        strength: s, or r for `rescale`, which is the same at all layers.
        kind: As `unit`, in `Plan`.
        max_activation: Of each feature by its name, for the unit `max`.
        of_schedule: `alpha`, `end_strength` and `from_start` of `schedule`.

    Raises:
        ValueError: If there is no feature at the layer, or no such layer, or a feature or the graph
            is not of the suite.

    Example:
        >>> from flowhelpers import load_suite, make_plan
        >>> plan = make_plan(load_suite("flowlet"), ["3/res/10", "5/res/7"], 4.0, strategy="linear")
        >>> plan.table()[["feature", "strength"]].values.tolist()
        [['3/res/10', 4.0], ['5/res/7', 1.0]]
    """
    check_choice("kind", kind, ("add", "rescale"))
    check_choice("unit", unit, UNITS)
    if not math.isfinite(strength):
        raise ValueError(f"strength={strength}: expected a finite number")
    is_add = kind == "add"
    if not is_add and strategy not in ("single", "constant"):
        raise ValueError(f"strategy={strategy!r}: r is the same at all layers, single or constant")
    if isinstance(features, FlowGraph) and features.suite != suite.name:
        raise ValueError(f"a flow graph of suite {features.suite}: expected {suite.name}")
    if layer is not None and not 0 <= layer < suite.layers:
        raise ValueError(f"layer={layer}: {suite.name} has the layers 0 to {suite.layers - 1}")
    names = features.nodes["feature"].tolist() if isinstance(features, FlowGraph) else features
    unique = suite.features(names)
    layers = sorted({feature.layer for feature in unique})
    last = max(layers, default=0) if layer is None else layer
    steered = [f for f in unique if (f.layer == last if strategy == "single" else f.layer <= last)]
    if not steered:
        raise ValueError(f"no feature to steer at layer {last}: there are some at {layers}")
    at = schedule(strength, layers, strategy, **of_schedule)
    scales = [_scale(suite, f, unit, max_activation or {}) if is_add else 1.0 for f in steered]
    steps = (Step(str(f), float(at[f.layer]), x) for f, x in zip(steered, scales, strict=True))
    return Plan(suite.name, kind, unit if is_add else "activation", tuple(steps), about)


def _scale(suite: "Suite", feature: FeatureId, unit: str, maxima: Mapping[str, float]) -> float:
    """One unit of s, as a multiple of the feature's decoder row."""
    sae = suite.sae(feature.site)
    if unit == "unit":
        return 1 / float(sae.decoder_rows(torch.tensor([feature.index])).float().norm())
    if unit == "max":
        if str(feature) not in maxima:
            raise ValueError(f"unit='max': max_activation has no value for {feature}")
        size = float(maxima[str(feature)])
    elif sae.thresholds is None:
        raise ValueError(f"the SAE for {feature.site} has no thresholds: use unit='max' or 'unit'")
    else:
        size = float(sae.thresholds[feature.index])
    if not size > 0:
        raise ValueError(f"the {unit} of {feature} is {size}: expected a number above zero")
    return size


def unit_of(
    suite: "Suite", activations: FeatureActivations, unit: str | None = None
) -> dict[str, Any]:
    """The `unit` of s in a suite and the `max_activation` that it needs, for `make_plan`.

    Without a `unit` it is `theta` where all SAEs of the suite have thresholds, else `max`: the
    greatest activation in a sample of text, in which a feature that is never active has none.
    """
    lacking = any(sae.thresholds is None for sae in suite.saes.values())
    unit = unit or ("max" if lacking else "theta")
    check_choice("unit", unit, UNITS)
    found: dict[str, float] = {}
    for site, codes in activations.by_site.items() if unit == "max" else ():
        most = codes.max(axis=0).tocoo()
        names = [f"{site}/{index}" for index in most.col]
        found |= dict(zip(names, most.data.tolist(), strict=True))
    return {"unit": unit, "max_activation": found}


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan as JSON."""
    write_text(Path(path), TypeAdapter(Plan).dump_json(plan, indent=1).decode())


def load_plan(path: str | Path) -> Plan:
    """Reads what `save_plan` wrote, or a file by hand in the same form; else a ValueError."""
    try:
        return TypeAdapter(Plan).validate_json(Path(path).read_bytes())
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path} holds no plan: {'; '.join(faults)}") from None


def plan_edits(suite: "Suite", plans: Sequence[Plan | SteeringVectors | None]) -> list[Edit]:
    """Plans as edits of one batch, at every token; its rows are split equally among them."""
    adds: dict[Site, list[tuple[int, Tensor]]] = {}
    factors: dict[Site, list[tuple[int, int, float]]] = {}
    for number, plan in enumerate(plans):
        if isinstance(plan, Plan) and plan.kind == "rescale":
            for site, steps in _steps_by_site(suite, plan).items():
                rescaled = [(number, feature.index, step.strength) for feature, step in steps]
                factors.setdefault(site, []).extend(rescaled)
            continue
        vectors = steering_vectors(suite, plan) if isinstance(plan, Plan) else plan or {}
        for site, vector in vectors.items():
            adds.setdefault(site, []).append((number, vector))
    edits = []
    for site, added in adds.items():
        numbers, vectors = zip(*added, strict=True)
        edits.append(_for_rows(add_per_row, site, site, len(plans), numbers, torch.stack(vectors)))
    for site, rescaled in factors.items():
        sae = suite.sae(site)
        numbers, *values = zip(*rescaled, strict=True)
        values = [torch.tensor(value, device=sae.norms.device) for value in values]
        edits.append(_for_rows(rescale_per_row, sae, sae.input_site, len(plans), numbers, *values))
    return edits


def _for_rows(
    make_edit: Callable[..., Edit], at: Any, site: Site, n_plans: int, numbers: Sequence[int],
    *values: Tensor,
) -> Edit:  # fmt: skip
    """A per-row edit: each value is applied to every row of the plan with its number."""

    @cache
    def of_batch(n_rows: int) -> Edit:
        n = n_rows // n_plans
        rows = torch.tensor(numbers)[:, None] * n + torch.arange(n)
        rows = rows.flatten().to(values[0].device)
        return make_edit(at, rows, *(value.repeat_interleave(n, dim=0) for value in values))

    return Edit(site, lambda activations: of_batch(len(activations)).change(activations))


def steering_vectors(suite: "Suite", plan: Plan) -> SteeringVectors:
    """What a plan of kind `add` adds to the stream, by hook point; another is a ValueError."""
    if plan.kind != "add":
        raise ValueError(f"a plan of kind {plan.kind!r}: what it adds depends on the stream")
    vectors = {}
    for site, steps in _steps_by_site(suite, plan).items():
        sae = suite.sae(site)
        indices = torch.tensor([feature.index for feature, _ in steps], device=sae.norms.device)
        rows = sae.decoder_rows(indices).float()
        sizes = torch.tensor([s.strength * s.scale for _, s in steps], dtype=torch.float32)
        vectors[sae.input_site] = sizes.to(rows.device) @ rows
    return vectors


def _steps_by_site(suite: "Suite", plan: Plan) -> dict[Site, list[tuple[FeatureId, Step]]]:
    """The features of a plan, and their steps, by site; runs the suite's preflight once."""
    if plan.suite != suite.name:
        raise ValueError(f"a plan of suite {plan.suite}: expected one of {suite.name}")
    by_site: dict[Site, list[tuple[FeatureId, Step]]] = {}
    for step in plan.steps:
        feature = suite.feature(step.feature)
        by_site.setdefault(feature.site, []).append((feature, step))
    preflight_once(suite, by_site)
    return by_site
