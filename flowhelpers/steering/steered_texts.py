"""Plans as edits of the stream, and the texts that they make (paper 3.5, B.1, B.2)."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.interventions.edits import add_per_row, rescale_per_row
from flowhelpers.interventions.generation import (
    PHASES,
    NotFiniteError,
    continuations,
    prompt_ids,
    sample_seed,
    sample_tokens,
)
from flowhelpers.steering.plans import Plan, SteeringVectors, steering_vectors, steps_by_site
from flowhelpers.suites.model import Edit

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite


def row_edits(
    suite: "Suite", plans: Sequence[Plan | SteeringVectors | None], n_rows: int
) -> list[Edit]:
    """Several plans as edits of one batch: `n_rows` rows for the first, as many for the next.

    Raises:
        ValueError: If a plan is of another suite, or a strength or vector is not finite.
    """
    adds: dict[Site, list[tuple[int, Tensor]]] = {}
    factors: dict[Site, list[tuple[int, int, float]]] = {}
    for number, plan in enumerate(plans):
        if isinstance(plan, Plan) and plan.kind == "rescale":
            for site, steps in steps_by_site(suite, plan).items():
                rescaled = [(number, feature.index, step.strength) for feature, step in steps]
                factors.setdefault(site, []).extend(rescaled)
            continue
        vectors = steering_vectors(suite, plan) if isinstance(plan, Plan) else plan or {}
        for site, vector in vectors.items():
            adds.setdefault(site, []).append((number, vector))
    edits = []
    for site, added in adds.items():
        rows = _rows([number for number, _ in added], n_rows)
        stacked = torch.stack([vector for _, vector in added]).repeat_interleave(n_rows, dim=0)
        edits.append(add_per_row(site, rows, stacked))
    for site, rescaled in factors.items():
        sae = suite.sae(site)
        numbers, indices, r = zip(*rescaled, strict=True)
        features = torch.tensor(indices, device=sae.norms.device).repeat_interleave(n_rows)
        r_of_rows = torch.tensor(r, device=features.device).repeat_interleave(n_rows)
        rows = _rows(numbers, n_rows).to(features.device)
        edits.append(rescale_per_row(sae, rows, features, r_of_rows))
    return edits


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
    show_progress: bool = True,
) -> "pd.DataFrame":
    """Texts of several plans, many samples of each in one batch (paper B.1, B.2).

    Sample i has the same random stream under every plan, so that steered and unsteered text can be
    laid side by side. What else is in the batch makes no difference.

    Args:
        suite: Of the plans.
        plans: Plans, or vectors to be added, by name; None for text without edits.
        prompt: What the texts go on from, taken literally (CHOICES 24).
        samples: Texts of each plan, or the numbers of the samples that are wanted.
        max_new_tokens: Tokens of each text.
        temperature: As in the paper, like `top_p`.
        top_p: The mass of the nucleus.
        seed: Decides the texts.
        phases: Where plans act, as in `generation.sample_tokens` (CHOICES 20).
        skip_bos: Whether the first token is left as it is.
        batch_size: The most rows of a batch.
        show_progress: Whether a progress bar is shown.

    Returns:
        One row a text: `plan`, `sample`, `text` (without the prompt).

    Raises:
        ValueError: If there is no plan or sample, a plan is of another suite, or a strength or
            vector is not finite.
        FloatingPointError: If the logits that a plan makes are infinite or NaN; it names the plan.

    Example:
        >>> from flowhelpers import load_suite, make_plan, steer
        >>> suite = load_suite("flowlet")
        >>> plans = {"unsteered": None, "steered": make_plan(suite, ["4/res/3"], 8.0)}
        >>> table = steer(suite, plans, "I think", samples=2, max_new_tokens=4)
        >>> table[["plan", "sample"]].values.tolist()
        [['unsteered', 0], ['unsteered', 1], ['steered', 0], ['steered', 1]]
    """
    import pandas as pd

    numbers = list(range(samples)) if isinstance(samples, int) else list(samples)
    if not plans or not numbers:
        raise ValueError(f"{len(plans)} plans and samples={samples}: expected 1 or more of each")
    ids = prompt_ids(suite.model, prompt, max_new_tokens)
    seeds = [sample_seed(seed, number) for number in numbers]
    names, texts = list(plans), []
    plans_per_batch = max(1, batch_size // len(numbers))
    for start in range(0, len(names), plans_per_batch):
        batch = names[start : start + plans_per_batch]
        edits = row_edits(suite, [plans[name] for name in batch], len(numbers))
        try:
            tokens = sample_tokens(
                suite.model, ids.expand(len(numbers) * len(batch), -1), seeds * len(batch),
                max_new_tokens, temperature, top_p, edits, phases, skip_bos,
                show_progress=show_progress,
            )  # fmt: skip
        except NotFiniteError as error:
            name = batch[error.rows[0] // len(numbers)]
            raise FloatingPointError(f"plan {name!r}: {error}") from error
        texts += continuations(suite.model, tokens[:, ids.shape[1] :])
    plan_of_row = np.repeat(names, len(numbers))
    return pd.DataFrame({"plan": plan_of_row, "sample": numbers * len(names), "text": texts})


def _rows(numbers: Sequence[int], n_rows: int) -> Tensor:
    return (torch.tensor(numbers)[:, None] * n_rows + torch.arange(n_rows)).flatten()
