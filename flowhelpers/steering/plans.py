"""Steering by features over many layers: plans, schedules, and their texts (paper 3.5, B)."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.activations.preflight import preflight_once
from flowhelpers.core.features import FeatureId, Site, parse_feature, suggestion
from flowhelpers.core.files import write_text
from flowhelpers.flow.graph import FlowGraph
from flowhelpers.interventions.edits import add_per_row, rescale, rescale_per_row
from flowhelpers.interventions.generation import (
    PHASES,
    NotFiniteError,
    continuations,
    prompt_ids,
    sample_seed,
    sample_tokens,
)
from flowhelpers.suites.model import Edit, editing

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

KINDS = ("rescale", "add")
STRATEGIES = ("single", "constant", "exponential", "linear")
UNITS = ("theta", "max", "unit")
ORIGINS = ("absolute", "span")
ALPHA, END_STRENGTH = -0.05, 1.0  # the paper's alpha and s*

SteeringVectors = Mapping[Site, Tensor]  # vectors that are added, whatever they come from, by site


class NoFeatureError(ValueError):
    """There is no feature to steer at a layer."""


@dataclass(frozen=True)
class Step:
    """One feature of a plan.

    Attributes:
        feature: Its name.
        strength: r for a plan that rescales, s for one that adds.
        scale: What one unit of s is, in units of the feature's decoder row; 1 where it rescales.
    """

    feature: str
    strength: float
    scale: float = 1.0


@dataclass(frozen=True)
class Plan:
    """Which features are steered, and how much.

    Attributes:
        suite: The suite's name.
        kind: `rescale`, h + (r - 1) · a · v with a read live (CHOICES 21), or `add`, h + s · v.
        unit: What s counts in (CHOICES 19): `theta`, the feature's own threshold; `max`, its own
            greatest activation; `unit`, a vector of norm 1.
        steps: The features.
        about: What it is, in words.
    """

    suite: str
    kind: str
    unit: str
    steps: tuple[Step, ...]
    about: str = ""

    def table(self) -> "pd.DataFrame":
        """One row a feature: `feature`, `layer`, `module`, `index`, `strength`, `scale`."""
        import pandas as pd

        rows = [(step, parse_feature(step.feature)) for step in self.steps]
        return pd.DataFrame(
            [(s.feature, f.layer, f.module, f.index, s.strength, s.scale) for s, f in rows],
            columns=["feature", "layer", "module", "index", "strength", "scale"],
        )

    @contextmanager
    def on(self, suite: "Suite") -> Iterator[None]:
        """Steers every pass of the suite's model inside the block, in any code.

        Raises:
            ValueError: If the plan is of another suite.
        """
        with editing(suite.model, plan_edits(suite, self)):
            yield


def schedule(
    strength: float,
    layers: Sequence[int],
    span: tuple[int, int],
    strategy: str = "constant",
    alpha: float = ALPHA,
    end_strength: float = END_STRENGTH,
    origin: Literal["absolute", "span"] = "absolute",
) -> dict[int, float]:
    """The strength at each layer (paper B.2).

    `exponential` has s · exp(α l), with l the layer's own number as printed, or counted from the
    start of the span (CHOICES 17); `linear` goes from s at the span's start to s* at its end, and
    is s where these are one layer (CHOICES 18); `constant` and `single` are s.

    Args:
        strength: s.
        layers: The layers.
        span: First and last layer of the graph, whichever layers are steered.
        strategy: One of `STRATEGIES`.
        alpha: α.
        end_strength: s*.
        origin: What l counts from.

    Raises:
        ValueError: If the strategy or origin is unknown or a number is not finite.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}{suggestion(strategy, STRATEGIES)}")
    for name, value in (("strength", strength), ("alpha", alpha), ("end_strength", end_strength)):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: expected a finite number")
    if origin not in ORIGINS:
        raise ValueError(f"unknown origin {origin!r}{suggestion(origin, ORIGINS)}")
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
    greatest: Mapping[str, float] | None = None,
    alpha: float = ALPHA,
    end_strength: float = END_STRENGTH,
    origin: Literal["absolute", "span"] = "absolute",
    about: str = "",
) -> Plan:
    """A plan from the features of a graph, or from features picked by hand or by a filter.

    `single` steers the features of one layer, the other strategies those of all layers from the
    first to that one (paper B.1, B.2).

    Args:
        suite: The suite.
        features: A flow graph, all of whose nodes are steered, or features.
        strength: s, or r for `rescale`, which is the same at all layers.
        kind: `rescale` or `add`.
        strategy: One of `STRATEGIES`.
        layer: The layer, or the last one; the last of the features unless given.
        unit: What s counts in, as in `Plan`.
        greatest: For `max`: the greatest activation of each feature.
        alpha: As in `schedule`.
        end_strength: As in `schedule`.
        origin: As in `schedule`.
        about: What it is, in words.

    Raises:
        ValueError: If there is no feature, none at the layer, one is not of the suite, the graph is
            another suite's, or a name or number is out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}{suggestion(kind, KINDS)}")
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}{suggestion(unit, UNITS)}")
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
    chosen = [f for f in found if (f.layer == last if strategy == "single" else f.layer <= last)]
    if not chosen:
        there = ", ".join(map(str, sorted({f.layer for f in found})))
        raise NoFeatureError(f"no feature to steer at layer {last}: there are some at {there}")
    at = schedule(strength, [f.layer for f in chosen], span, strategy, alpha, end_strength, origin)
    steps = tuple(
        Step(str(f), float(at[f.layer]), _scale(suite, f, unit, greatest) if kind == "add" else 1.0)
        for f in chosen
    )
    return Plan(suite.name, kind, unit if kind == "add" else "activation", steps, about)


def plan_or_none(suite: "Suite", *given: Any, **settings: Any) -> Plan | None:
    """`make_plan`, or None where there is no feature at the layer, as in the cells of a grid."""
    try:
        return make_plan(suite, *given, **settings)
    except NoFeatureError:
        return None


def _scale(
    suite: "Suite", feature: FeatureId, unit: str, greatest: Mapping[str, float] | None
) -> float:
    sae = suite.sae(feature.site)
    if unit == "unit":
        return 1 / float(sae.decoder_rows(torch.tensor([feature.index])).float().norm())
    if unit == "max":
        if str(feature) not in (greatest or {}):
            raise ValueError(f"no greatest activation of {feature}: expected one for each feature")
        value = float((greatest or {})[str(feature)])
    else:
        if sae.thresholds is None:
            raise ValueError(
                f"the SAE for {feature.site} has no thresholds: use unit='max' or 'unit'"
            )
        value = float(sae.thresholds[feature.index])
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"the unit of {feature} is {value}: expected a number above zero")
    return value


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan as YAML."""
    import yaml

    values = asdict(plan) | {"steps": [asdict(step) for step in plan.steps]}
    write_text(Path(path), yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def load_plan(path: str | Path) -> Plan:
    """Reads what `save_plan` wrote, or what was written by hand in the same form.

    Raises:
        ValueError: If it is no plan; the message says what is wrong.
    """
    import yaml

    try:
        values: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        listed = values.pop("steps")
        steps = tuple(Step(**step) for step in listed)
        plan = Plan(steps=steps, **values)
        given = {
            step.feature for step, values in zip(steps, listed, strict=True) if "scale" in values
        }
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no plan: {error}") from error
    if plan.kind not in KINDS:
        raise ValueError(f"{path}: unknown kind {plan.kind!r}{suggestion(str(plan.kind), KINDS)}")
    units = UNITS if plan.kind == "add" else ("activation",)
    if plan.unit not in units:
        raise ValueError(f"{path}: unknown unit {plan.unit!r}{suggestion(str(plan.unit), units)}")
    if not isinstance(plan.suite, str):
        raise ValueError(f"{path}: suite is {plan.suite!r}: expected a name")
    if not plan.steps:
        raise ValueError(f"{path}: the plan has no features")
    for step in plan.steps:
        parse_feature(str(step.feature))
        if plan.kind == "add" and step.feature not in given:
            raise ValueError(f"{path}: {step.feature} has no scale: what is one unit of s?")
        if not all(map(_is_number, (step.strength, step.scale))):
            raise ValueError(f"{path}: {step.feature} has no finite strength and scale")
    return plan


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and math.isfinite(value)


def plan_edits(suite: "Suite", plan: Plan) -> list[Edit]:
    """A plan as edits that act on every row and token; one edit for each site.

    Raises:
        ValueError: If the plan is of another suite.
    """
    found = []
    for site, steps in _by_site(suite, plan).items():
        sae = suite.sae(site)
        features = [feature for feature, _ in steps]
        if plan.kind == "rescale":
            found.append(rescale(sae, features, [step.strength for _, step in steps]))
        else:
            found.append(_add_everywhere(sae.input_site, _added(sae, steps)))
    return found


def steering_vectors(suite: "Suite", plan: Plan) -> SteeringVectors:
    """What a plan that adds adds, by the site that is edited.

    Raises:
        ValueError: If the plan is of another suite, or rescales.
    """
    if plan.kind != "add":
        raise ValueError(f"a plan of kind {plan.kind!r}: what it adds depends on the stream")
    by_site = _by_site(suite, plan).items()
    return {suite.sae(site).input_site: _added(suite.sae(site), s) for site, s in by_site}


def row_edits(
    suite: "Suite", plans: Sequence[Plan | SteeringVectors | None], each: int
) -> list[Edit]:
    """Several plans as edits of one batch: `each` rows for the first, as many for the next.

    Args:
        suite: The suite.
        plans: Plans, or vectors to be added; None for rows without edits.
        each: Rows of a plan.
    """
    adds: dict[Site, list[tuple[int, Tensor]]] = {}
    factors: dict[Site, list[tuple[int, int, float]]] = {}
    for number, plan in enumerate(plans):
        plan = _ready(suite, plan)
        if isinstance(plan, Plan):
            for site, steps in _by_site(suite, plan).items():
                some = [(number, feature.index, step.strength) for feature, step in steps]
                factors.setdefault(site, []).extend(some)
        elif plan is not None:
            for site, vector in plan.items():
                adds.setdefault(site, []).append((number, vector))
    found = []
    for site, vectors in adds.items():
        rows = _rows([number for number, _ in vectors], each)
        stacked = torch.stack([vector for _, vector in vectors]).repeat_interleave(each, dim=0)
        found.append(add_per_row(site, rows, stacked))
    for site, some in factors.items():
        sae = suite.sae(site)
        numbers, indices, r = zip(*some, strict=True)
        features = torch.tensor(indices, device=sae.norms.device).repeat_interleave(each)
        given = torch.tensor(r, device=features.device).repeat_interleave(each)
        rows = _rows(numbers, each).to(features.device)
        found.append(rescale_per_row(sae, rows, features, given))
    return found


def steer(
    suite: "Suite",
    plans: Mapping[str, Plan | SteeringVectors | None],
    prompt: str,
    samples: int | Sequence[int] = 32,
    max_new_tokens: int = 36,
    temperature: float = 1.27,
    top_p: float = 0.7,
    seed: int = 0,
    phases: Collection[str] = PHASES,
    skip_bos: bool = False,
    batch_size: int = 256,
    bar: bool = True,
) -> "pd.DataFrame":
    """Texts of several plans, many samples of each in one batch (paper B.1, B.2).

    Sample i has the same random stream under every plan, so that steered and unsteered text can be
    laid side by side. It does not depend on what else is in the batch.

    Args:
        suite: The suite.
        plans: Plans, or vectors to be added, by name; None for text without edits.
        prompt: What the texts go on from, taken literally (CHOICES 24).
        samples: Texts of each plan, or the numbers of the samples that are wanted.
        max_new_tokens: Tokens of each text.
        temperature: The paper's is 1.27.
        top_p: The paper's is 0.7.
        seed: Decides the texts.
        phases: Where plans act, as in `generation.sample_tokens`.
        skip_bos: Whether the first token is left as it is.
        batch_size: The most rows of a batch.
        bar: Whether a progress bar is shown.

    Returns:
        One row a text: `plan`, `sample`, `text` (without the prompt).

    Raises:
        ValueError: If there is no plan or sample, or a plan is of another suite.
        FloatingPointError: If strengths, or the logits that a plan makes, are infinite or NaN; it
            names plan and strengths.
    """
    import pandas as pd

    numbers = list(range(samples)) if isinstance(samples, int) else list(samples)
    if not plans or not numbers:
        raise ValueError(f"{len(plans)} plans and samples={samples}: expected 1 or more of each")
    ids = prompt_ids(suite.model, prompt, max_new_tokens)
    seeds = [sample_seed(seed, number) for number in numbers]
    names, tables, each = list(plans), [], len(numbers)
    together = max(1, batch_size // each)
    for start in range(0, len(names), together):
        some = names[start : start + together]
        ready = [_ready(suite, plans[name]) for name in some]
        for name, plan in zip(some, ready, strict=True):
            if not _is_finite(plan):
                raise FloatingPointError(f"{_in_words(name, plans[name])}: it is not finite")
        edits = row_edits(suite, ready, each)
        try:
            found = sample_tokens(
                suite.model, ids.expand(each * len(some), -1), seeds * len(some),
                max_new_tokens, temperature, top_p, edits, phases, skip_bos, show_progress=bar,
            )  # fmt: skip
        except NotFiniteError as error:
            name = some[error.rows[0] // each]
            raise FloatingPointError(f"{_in_words(name, plans[name])}: {error}") from error
        texts = continuations(suite.model, found[:, ids.shape[1] :])
        made = {"plan": np.repeat(some, each), "sample": numbers * len(some)}
        tables.append(pd.DataFrame(made | {"text": texts}))
    return pd.concat(tables, ignore_index=True)


def _ready(suite: "Suite", plan: Plan | SteeringVectors | None) -> Plan | SteeringVectors | None:
    """The plan, or what it adds where that is known beforehand."""
    return steering_vectors(suite, plan) if isinstance(plan, Plan) and plan.kind == "add" else plan


def _is_finite(plan: Plan | SteeringVectors | None) -> bool:
    if isinstance(plan, Plan):
        return all(math.isfinite(step.strength) for step in plan.steps)
    return all(bool(torch.isfinite(vector).all()) for vector in (plan or {}).values())


def _in_words(name: str, plan: Plan | SteeringVectors | None) -> str:
    if plan is None:
        return f"plan {name!r} (no edits)"
    if not isinstance(plan, Plan):
        norms = ", ".join(f"{vector.float().norm():.3g} at {at}" for at, vector in plan.items())
        return f"plan {name!r} (vectors of norm {norms})"
    strengths = [step.strength for step in plan.steps]
    layers = sorted({parse_feature(step.feature).layer for step in plan.steps})
    return (
        f"plan {name!r} ({plan.kind}, strengths {min(strengths):g} to {max(strengths):g}, layers"
        f" {layers[0]} to {layers[-1]})"
    )


def _by_site(suite: "Suite", plan: Plan) -> "dict[Site, list[tuple[FeatureId, Step]]]":
    _check_suite(plan.suite, suite, "a plan")
    found: dict[Site, list[tuple[FeatureId, Step]]] = {}
    for step in plan.steps:
        feature = suite.feature(step.feature)
        found.setdefault(feature.site, []).append((feature, step))
    preflight_once(suite, found)
    return found


def _added(sae: "SAE", steps: "Sequence[tuple[FeatureId, Step]]") -> "Float[Tensor, 'd_in']":
    """What a plan adds at one site."""
    rows = sae.decoder_rows(torch.tensor([f.index for f, _ in steps], device=sae.norms.device))
    given = [step.strength * step.scale for _, step in steps]
    sizes = torch.tensor(given, dtype=torch.float32, device=rows.device)
    return sizes @ rows.float()


def _add_everywhere(site: Site, vector: Tensor) -> Edit:
    # Not `edits.add`: strengths of several features may cancel to nothing, which is no error here.
    return Edit(site, lambda activations: activations + vector.to(activations))


def _rows(numbers: Sequence[int], each: int) -> Tensor:
    return (torch.tensor(numbers)[:, None] * each + torch.arange(each)).flatten()


def _check_suite(of: str, suite: "Suite", what: str) -> None:
    if of != suite.name:
        raise ValueError(f"{what} of suite {of}: expected one of {suite.name}")
