"""How many interventions a second, beside a loop of `run_with_hooks`; and the paper's experiment.

    python tests/benchmarks/deactivation_speed.py [--suite flowlet] [--device cpu]

The loop is what a user of TransformerLens would write: one `run_with_hooks` over the text for each
intervention, with a hook that edits and one that reads; a second loop cuts the text at the token
and stops at the layer. Beside them stands an experiment of the size of the paper's: 13,125 features
by five methods, at a quarter, half and all of its texts: the time grows with the texts.

On two cores of an Intel Xeon with `flowlet`, texts of up to 128 tokens: the batch makes 1,635 a
second over an experiment of the paper's size, 56 times as many as the loop (34 times cut and
stopped), which takes 16 s for its 42,645 cases, 25,408 of them different. On an AMD EPYC 1,753 a
second, 51 (30) times.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from clock import options, seconds
from torch import Tensor

from flowhelpers.activations.sampling import datasets_for, draw_sample, texts_of
from flowhelpers.activations.sparse import read_sample
from flowhelpers.core.features import predecessor_site
from flowhelpers.deactivation import (
    ablation_cases,
    active_predecessors,
    concat_methods,
    draw_targets,
    middle_layers,
    sources_of,
)
from flowhelpers.interventions.batched import _distinct, intervene
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite, load_suite
from flowhelpers.suites.model import Tokens, hook_name

PAPER_TARGETS = 13_125


@torch.no_grad()
def by_hooks(
    suite: Suite, tokens: Tokens, cases: pd.DataFrame, edits: pd.DataFrame, cut: bool
) -> list[Tensor]:
    """Every case on its own: the features of the target's site at its token."""
    found: list[Tensor] = []
    for number, case in enumerate(cases.itertuples()):
        at, layer, text = int(case.position), int(case.layer), int(case.text)
        end = at + 1 if cut else 1 + int(tokens.is_text[text].nonzero().max())
        target = suite.sae(f"{layer}/res")
        hooks: list[tuple[str, Callable[..., Any]]] = []
        for edit in edits[edits["case"] == number].itertuples():
            sae = suite.sae(predecessor_site(layer, edit.module))
            vector = float(edit.amount) * sae.lens_sae.W_dec[int(edit.feature)]

            def push(stream: Tensor, hook: Any, vector: Tensor = vector, at: int = at) -> Tensor:
                stream[:, at] += vector
                return stream

            hooks.append((hook_name(suite.model, sae.input_site), push))

        def read(stream: Tensor, hook: Any, target: Any = target, at: int = at) -> None:
            found.append(target.encode(stream[0, at]))

        hooks.append((hook_name(suite.model, target.input_site), read))
        stop = {"stop_at_layer": layer + 1} if cut and layer + 1 < suite.layers else {}
        ids = tokens.ids[text : text + 1, :end]
        suite.model.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks, **stop)
    return found


def main() -> None:
    """Prints what was measured."""
    given = options(__doc__, suite="flowlet", device="cpu", loop=60)  # interventions of the loops
    suite = load_suite(given.suite, given.device)
    texts = texts_of(datasets_for(suite.row)[:1], 35)
    sample = draw_sample(suite.model, texts, 12)
    with tempfile.TemporaryDirectory() as folder:
        read = read_sample(suite, sample, Path(folder))
    layers = middle_layers(suite.layers)
    targets = draw_targets(read, layers)
    if len(targets) > PAPER_TARGETS:
        targets = targets.sample(PAPER_TARGETS, random_state=0).sort_index(ignore_index=True)
    cosine = match_table(suite)
    everything = [text for some in texts.values() for text in some]
    tables = {
        "random": (match_table(suite, method="random"), 1),
        "permutation": (match_table(suite, method="permutation"), 1),
        "top-1": (cosine, 1),
        "top-5": (cosine, 5),
        "pearson": (match_table(suite, method="pearson", texts=everything), 1),
    }
    parts = {}
    for method, (table, n) in tables.items():
        parts[method] = ablation_cases(
            targets, active_predecessors(sources_of(targets, table, read, n))
        )
    cases, edits = concat_methods(parts)

    some = cases.sample(given.loop, random_state=0).index.sort_values()
    own = edits[edits["case"].isin(some)]
    own = own.assign(case=np.searchsorted(some, own["case"]))
    where = targets.loc[cases["target"][some], ["text", "position", "layer"]].reset_index(drop=True)
    rates = {}
    for name, cut in (("over the whole text", False), ("cut and stopped", True)):
        by_hooks(suite, sample.ids, where[:3], own, cut)
        took, each = seconds(lambda cut=cut: by_hooks(suite, sample.ids, where, own, cut))
        rates[name] = given.loop / took
        print(f"loop of run_with_hooks, {name}: {rates[name]:.1f} interventions a second")
    read = [
        pd.DataFrame({"case": i, "layer": layer, "module": "res", "feature": np.arange(len(codes))})
        for i, (layer, codes) in enumerate(zip(where["layer"], each, strict=True))
    ]
    after, _ = intervene(suite, sample.ids, where, own, pd.concat(read))
    off = np.abs(after["new"].to_numpy() - torch.cat(each).cpu().numpy()).max()
    print(f"the largest difference of an activation between loop and batch: {off:.1e}")

    where = targets.loc[cases["target"], ["text", "position", "layer"]].reset_index(drop=True)
    took, made = 0.0, 0
    for share in (0.25, 0.5, 1.0):  # of the texts
        own = np.flatnonzero(where["text"] < share * len(sample.ids.ids))
        changes = edits[edits["case"].isin(own)]
        changes = changes.assign(case=np.searchsorted(own, changes["case"]))
        some = where.iloc[own].reset_index(drop=True)
        reads = some.assign(case=some.index, module="res", feature=0)
        given = (suite, sample.ids, some, changes, reads)
        took, _ = seconds(lambda given=given: intervene(*given))
        made = len(_distinct(some, changes)[1])
        print(f"{share:.0%} of the texts: {made:,} in {took:.1f} s, {made / took:,.0f} a second")
    print(f"{len(targets):,} targets x {len(parts)} methods: {len(cases):,} cases in {took:.0f} s,")
    print(f"  {made:,} different interventions, {made / took:,.0f} a second:")
    for name, slow in rates.items():
        print(f"  {made / took / slow:.0f} times the loop {name}")


if __name__ == "__main__":
    main()
