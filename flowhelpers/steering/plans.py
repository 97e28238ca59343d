"""Steering by features over many layers: plans, schedules, and their texts (paper 3.5, B)."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor

from flowhelpers.activations.preflight import preflight_once
from flowhelpers.core.features import FeatureId, Site, parse_feature, suggestion
from flowhelpers.core.files import write_text
from flowhelpers.flow.graph import FlowGraph
from flowhelpers.interventions.edits import rescale
from flowhelpers.suites.model import Edit, editing

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

KINDS = ("rescale", "add")
STRATEGIES = ("single", "constant", "exponential", "linear")
UNITS = ("theta", "max", "unit")
ORIGINS = ("absolute", "span")
ALPHA, END_STRENGTH = -0.05, 1.0  # the paper's alpha and s*
SteeringVectors = Mapping[Site, Tensor]  # what is added to the stream, by hook point


class NoFeatureError(ValueError):
    """There is no feature to steer at a layer."""


def check_choice(name: str, value: str, valid: Iterable[str]) -> None:
    """Raises a ValueError with the nearest valid value where `value` is not one of them."""
    if value not in (valid := list(valid)):
        raise ValueError(f"unknown {name} {value!r}{suggestion(value, valid)}")


@dataclass(frozen=True)
class Step:
    """One feature of a plan.

    Attributes:
        feature: Its name.
        strength: r to rescale, s to add.
        scale: One unit of s, as a multiple of the feature's decoder row; 1 to rescale.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    feature: str
    strength: FiniteFloat
    scale: FiniteFloat = 1.0


@dataclass(frozen=True)
class Plan:
    """Which features are steered, and how much.

    Attributes:
        suite: Its name.
        kind: `rescale`, h + (r - 1) · a · v with a read live (CHOICES 21), or `add`, h + s · v.
        unit: The unit of s (CHOICES 19): `theta`, the feature's own threshold; `max`, its own max
            activation; `unit`, a vector of norm 1. `activation` for a plan that rescales.
        steps: One for each feature.
        about: A description.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    suite: str
    kind: str
    unit: str
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]
    about: str = ""

    def table(self) -> "pd.DataFrame":
        """One row a feature: `feature`, `layer`, `module`, `index`, `strength`, `scale`."""
        import pandas as pd

        features = [parse_feature(step.feature) for step in self.steps]
        table = pd.DataFrame([asdict(step) for step in self.steps])
        for place, name in enumerate(("layer", "module", "index"), start=1):
            table.insert(place, name, [getattr(feature, name) for feature in features])
        return table

    @contextmanager
    def on(self, suite: "Suite") -> Iterator[None]:
        """Steers every pass of the suite's model inside the block, in any code."""
        with editing(suite.model, plan_edits(suite, self)):
            yield


def schedule(
    strength: float,
    layers: Sequence[int],
    span: tuple[int, int],
    strategy: str = "constant",
    alpha: float = ALPHA,
    end_strength: float = END_STRENGTH,
    origin: str = "absolute",
) -> dict[int, float]:
    """The strength at each layer (paper B.2).

    Args:
        strength: s.
        layers: The layers that are steered.
        span: First and last layer of the graph, whichever layers are steered.
        strategy: `constant` and `single` give s; `exponential` s · exp(α l); `linear` goes from s
            at the span's start to s* at its end, and is s where these are one layer (CHOICES 18).
        alpha: α.
        end_strength: s*.
        origin: l is a layer's number (`absolute`), or counts from the `span`'s start (CHOICES 17).

    Raises:
        ValueError: If the strategy or origin is unknown or a number is not finite.
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("origin", origin, ORIGINS)
    if not all(map(math.isfinite, (strength, alpha, end_strength))):
        raise ValueError(f"{strength=}, {alpha=}, {end_strength=}: expected finite numbers")
    start, end = span
    if strategy == "exponential":
        first = start if origin == "span" else 0
        return {layer: strength * math.exp(alpha * (layer - first)) for layer in layers}
    if strategy == "linear" and end > start:
        slope = (end_strength - strength) / (end - start)
        return {layer: strength + slope * (layer - start) for layer in layers}
    return dict.fromkeys(layers, strength)


def make_plan(
    suite: "Suite",
    features: FlowGraph | Sequence[FeatureId | str],
    strength: float,
    kind: str = "add",
    strategy: str = "constant",
    layer: int | None = None,
    *,
    unit: str = "theta",
    max_activation: Mapping[str, float] | None = None,
    alpha: float = ALPHA,
    end_strength: float = END_STRENGTH,
    origin: str = "absolute",
    about: str = "",
) -> Plan:
    """A plan from the nodes of a flow graph, or from a list of features.

    `single` steers the features of one layer, the other strategies those of all layers from the
    first to that one (paper B.1, B.2).

    Args:
        suite: Where the features are.
        features: A flow graph, all of whose nodes are steered, or features.
        strength: s, or r for `rescale`, which is the same at all layers.
        kind: `rescale` or `add`.
        strategy: One of `STRATEGIES`; as `alpha`, `end_strength` and `origin` in `schedule`.
        layer: The layer, or the last one; the last of the features unless given.
        unit: The unit of s, as in `Plan`.
        max_activation: For `unit="max"`: the max activation of each feature.
        alpha: α.
        end_strength: s*.
        origin: Where layers are counted from.
        about: A description.

    Raises:
        NoFeatureError: If there is no feature at the layer.
        ValueError: If there is no feature at all, or one or the graph is not of the suite.

    Example:
        >>> from flowhelpers import load_suite, make_plan
        >>> plan = make_plan(load_suite("flowlet"), ["3/res/10", "5/res/7"], 4.0, strategy="linear")
        >>> plan.table()[["feature", "strength"]].values.tolist()
        [['3/res/10', 4.0], ['5/res/7', 1.0]]
    """
    check_choice("kind", kind, KINDS)
    check_choice("unit", unit, UNITS)
    if kind == "rescale" and strategy not in ("single", "constant"):
        raise ValueError(f"strategy={strategy!r}: r is the same at all layers, single or constant")
    if isinstance(features, FlowGraph):
        _check_suite(features.suite, suite, "a flow graph")
        names = features.nodes["feature"].tolist()
    else:
        names = list(features)
    found = list(dict.fromkeys(suite.feature(name) for name in names))
    if not found:
        raise ValueError("no feature to steer: expected a graph or features, such as 12/res/4230")
    span = min(f.layer for f in found), max(f.layer for f in found)
    last = span[1] if layer is None else layer
    steered = [f for f in found if (f.layer == last if strategy == "single" else f.layer <= last)]
    if not steered:
        layers = sorted({f.layer for f in found})
        raise NoFeatureError(f"no feature to steer at layer {last}: there are some at {layers}")
    at = schedule(strength, [f.layer for f in steered], span, strategy, alpha, end_strength, origin)
    is_add = kind == "add"
    steps = tuple(
        Step(str(f), float(at[f.layer]), _scale(suite, f, unit, max_activation) if is_add else 1.0)
        for f in steered
    )
    return Plan(suite.name, kind, unit if is_add else "activation", steps, about)


def plan_or_none(suite: "Suite", *args: Any, **settings: Any) -> Plan | None:
    """`make_plan`, or None where there is no feature at the layer, as in the cells of a grid."""
    try:
        return make_plan(suite, *args, **settings)
    except NoFeatureError:
        return None


def _scale(
    suite: "Suite", feature: FeatureId, unit: str, max_activation: Mapping[str, float] | None
) -> float:
    sae = suite.sae(feature.site)
    if unit == "unit":
        value = 1 / float(sae.decoder_rows(torch.tensor([feature.index])).float().norm())
    elif unit == "max":
        value = float((max_activation or {}).get(str(feature), math.nan))
    elif sae.thresholds is None:
        raise ValueError(f"the SAE for {feature.site} has no thresholds: use unit='max' or 'unit'")
    else:
        value = float(sae.thresholds[feature.index])
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"the unit ({unit}) of {feature} is {value}: expected a number above zero")
    return value


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan as YAML."""
    import yaml

    values = asdict(plan) | {"steps": [asdict(step) for step in plan.steps]}
    write_text(Path(path), yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def load_plan(path: str | Path) -> Plan:
    """Reads what `save_plan` wrote, or a file by hand in the same form; else a ValueError."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        plan = TypeAdapter(Plan).validate_json(json.dumps(values, default=str), strict=True)
        check_choice("kind", plan.kind, KINDS)
        check_choice("unit", plan.unit, UNITS if plan.kind == "add" else ("activation",))
        for step, given in zip(plan.steps, values["steps"], strict=True):
            parse_feature(step.feature)
            if plan.kind == "add" and "scale" not in given:
                raise ValueError(f"{step.feature} has no scale: what is one unit of s?")
    except (yaml.YAMLError, ValidationError, ValueError) as error:
        raise ValueError(f"{path} is no plan: {error}") from error
    return plan


def _check_suite(of: str, suite: "Suite", what: str) -> None:
    if of != suite.name:
        raise ValueError(f"{what} of suite {of}: expected one of {suite.name}")


def plan_edits(suite: "Suite", plan: Plan) -> list[Edit]:
    """A plan as edits that act on every row and token; one edit for each site."""
    if plan.kind == "add":
        return [_add_everywhere(*at) for at in steering_vectors(suite, plan).items()]
    return [
        rescale(suite.sae(site), [f for f, _ in steps], [step.strength for _, step in steps])
        for site, steps in steps_by_site(suite, plan).items()
    ]


def steering_vectors(suite: "Suite", plan: Plan) -> SteeringVectors:
    """What a plan of kind `add` adds to the stream, by hook point.

    Raises:
        ValueError: If the plan is of another suite, or rescales.
    """
    if plan.kind != "add":
        raise ValueError(f"a plan of kind {plan.kind!r}: what it adds depends on the stream")
    vectors = {}
    for site, steps in steps_by_site(suite, plan).items():
        sae = suite.sae(site)
        indices = torch.tensor([feature.index for feature, _ in steps], device=sae.norms.device)
        rows = sae.decoder_rows(indices).float()
        sizes = torch.tensor([s.strength * s.scale for _, s in steps], dtype=torch.float32)
        vectors[sae.input_site] = sizes.to(rows.device) @ rows
    return vectors


def steps_by_site(suite: "Suite", plan: Plan) -> "dict[Site, list[tuple[FeatureId, Step]]]":
    """The features of a plan, and their steps, by site; runs the suite's preflight once."""
    _check_suite(plan.suite, suite, "a plan")
    by_site: dict[Site, list[tuple[FeatureId, Step]]] = {}
    for step in plan.steps:
        feature = suite.feature(step.feature)
        by_site.setdefault(feature.site, []).append((feature, step))
    preflight_once(suite, by_site)
    return by_site


def _add_everywhere(site: Site, vector: Tensor) -> Edit:
    # Not `edits.add`: strengths of several features may cancel to nothing, which is no error here.
    return Edit(site, lambda activations: activations + vector.to(activations))
