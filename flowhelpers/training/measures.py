"""The figures of a suite's card: loss, SAEs, flow against chance, tests and themes."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowhelpers.activations.corpora import passages
from flowhelpers.activations.sparse import FeatureActivations, collect, collect_tokens
from flowhelpers.core.features import Site, predecessor_sites
from flowhelpers.core.progress_bar import progress
from flowhelpers.groups.occurrences import find_occurrences
from flowhelpers.groups.significance import mann_whitney_tests, share_significant
from flowhelpers.labels.describe import auc
from flowhelpers.matching.scores import feature_scores
from flowhelpers.matching.table import match_table
from flowhelpers.suites.model import Activations, Edit, Tokens, logits_of, run_model, token_losses

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite


def measure(
    suite: "Suite", tokens: Tokens, seed: int = 0
) -> "tuple[dict[str, float], dict[str, pd.DataFrame]]":
    """The figures of a suite on a text, the worst site or layer of each, and their tables."""
    residual = [site for site in suite.saes if site.module == "res"]
    if not residual:
        raise ValueError(f"suite {suite.name} has no residual SAE: there is no flow in it")
    nats, bits = bits_per_byte(suite, tokens)
    sites = measure_saes(suite, tokens)
    is_residual = sites["site"].str.endswith("/res")
    of_residual, explained = sites[is_residual], sites["explained_variance"]
    figures = {
        "bits per byte": bits,
        "nats per token": nats,
        "L0 / d_model, highest site": sites["l0_share_of_d"].max(),
        "explained variance, lowest res": of_residual["explained_variance"].min(),
        "dead share, highest site": sites["dead_share"].max(),
        "loss recovered, lowest res": of_residual["loss_recovered"].min(),
    }
    if not is_residual.all():
        figures["explained variance, lowest mlp, att"] = explained[~is_residual].min()
    tables = {"sites": sites}
    if any({s, *predecessor_sites(s).values()} <= set(suite.saes) for s in residual if s.layer):
        activations = collect_tokens(suite, tokens)
        matches = match_table(suite, 1, seed)
        occurrences = find_occurrences(matches, activations)
        flow = measure_flow(feature_scores(matches), activations, occurrences.table)
        sampled = occurrences.table["token_row"].isin(sample_tokens(activations, seed=seed))
        tests = mann_whitney_tests(replace(occurrences, table=occurrences.table[sampled]))
        shares = share_significant(tests)
        above = flow["s_res_above_null"]
        figures |= {
            "s(R) above null, layer 1": above[flow["layer"] == 1].min(),
            "s(R) above null, lowest later layer": above[flow["layer"] > 1].min(),
            "s(M) or s(A) above null, mean of layers": flow["module_above_null"].mean(),
            "residual predecessor active, all occurrences": occurrences.table["res"].mean(),
            "… against chance, lowest layer": flow["ratio"].min(),
        }
        for score, share in shares.iterrows():
            figures[f"significant tests, {score}, one active (AO)"] = share["AO"]
            figures[f"… {score}, AO − both inactive (IB)"] = share["AO"] - share["IB"]
        tables |= {"flow": flow, "tests": shares.reset_index()}
    tables["themes"] = measure_themes(suite, seed)
    told_apart = tables["themes"]["auc_held_out"] >= 0.75
    return figures | {"subjects told apart, AUC ≥ 0.75": float(told_apart.sum())}, tables


def bits_per_byte(suite: "Suite", tokens: Tokens, batch: int = 16) -> tuple[float, float]:
    """Loss of the next token: nats per token, and bits per byte of the text that is predicted."""
    nats, count, size = 0.0, 0, 0
    for rows in progress(torch.arange(len(tokens.ids)).split(batch), "loss"):
        ids, is_text = tokens.ids[rows], tokens.is_text[rows]
        losses = token_losses(logits_of(suite.model, ids)[:, :-1], ids[:, 1:])
        nats += losses[is_text[:, 1:]].double().sum().item()
        count += int(is_text[:, 1:].sum())
        texts = [row[keep].tolist() for row, keep in zip(ids, is_text, strict=True)]
        size += sum(len(suite.model.tokenizer.decode(text).encode()) for text in texts)
    return nats / count, nats / size / math.log(2)


def measure_saes(
    suite: "Suite", tokens: Tokens, batch: int = 16, loss_rows: int = 32
) -> "pd.DataFrame":
    """L0, explained variance (CHOICES 28), dead share and loss recovered at every site.

    `sae_lens.evals` asks for an `ActivationsStore` and reads a hook, which our text, whose special
    tokens are left out, and sites at z do not fit; of it the explained variance is used. A feature
    is dead if it is active at no token. The loss is measured on the first `loss_rows` texts.
    """
    import pandas as pd
    from sae_lens.evals import ExplainedVarianceCalculator

    variance = {site: ExplainedVarianceCalculator() for site in suite.saes}
    active = {site: torch.zeros(sae.width) for site, sae in suite.saes.items()}
    reads = [sae.input_site for sae in suite.saes.values()]
    for rows in progress(torch.arange(len(tokens.ids)).split(batch), "reconstruction"):
        ids, is_text = tokens.ids[rows], tokens.is_text[rows]
        _, read = run_model(suite.model, ids, read=reads, stop_after=suite.layers - 1)
        for site, sae in suite.saes.items():
            x = read[sae.input_site][is_text].float()
            codes = sae.encode(x)
            variance[site].add_batch(sae.decode(codes, x).float(), x)
            active[site] += (codes > 0).sum(0).cpu()
    recovered = loss_recovered(suite, tokens, loss_rows, batch)
    table = pd.DataFrame(
        {
            "site": str(site),
            "l0": active[site].sum().item() / int(tokens.is_text.sum()),
            "explained_variance": variance[site].compute(),
            "dead_share": (active[site] == 0).double().mean().item(),
            "loss_recovered": recovered[site],
        }
        for site in suite.saes
    )
    table.insert(2, "l0_share_of_d", table["l0"] / suite.model.d_model)
    return table


@torch.no_grad()
def loss_recovered(
    suite: "Suite", tokens: Tokens, rows: int = 32, batch: int = 16
) -> dict[Site, float]:
    """Share of the loss that zeroing a site costs which its SAE's reconstruction saves."""
    texts, masks = tokens.ids[:rows].split(batch), tokens.is_text[:rows].split(batch)

    def change(x: Activations, to: Callable[[Activations], Activations], at: torch.Tensor):
        return torch.where(at[..., None], to(x), x)

    def loss(site: Site, to: Callable[[Activations], Activations]) -> float:
        losses = []
        for ids, is_text in zip(texts, masks, strict=True):
            logits = logits_of(suite.model, ids, [Edit(site, partial(change, to=to, at=is_text))])
            losses.append(token_losses(logits[:, :-1], ids[:, 1:])[is_text[:, 1:]])
        return torch.cat(losses).double().mean().item()

    clean = loss(next(iter(suite.saes)), lambda x: x)
    recovered = {}
    for site, sae in progress(list(suite.saes.items()), "loss recovered"):
        zeroed = loss(sae.input_site, torch.zeros_like)
        rebuilt = loss(sae.input_site, lambda x, sae=sae: sae.decode(sae.encode(x), x))
        recovered[site] = (zeroed - rebuilt) / (zeroed - clean)
    return recovered


def measure_flow(
    scores: "pd.DataFrame", activations: FeatureActivations, occurrences: "pd.DataFrame"
) -> "pd.DataFrame":
    """By layer: live features whose match beats the null, and active predecessors against chance.

    Chance is how often the predecessor is active in general, whatever the feature does.
    """
    import pandas as pd

    records = []
    for layer, of_layer in scores[scores["layer"] > 0].groupby("layer"):
        codes = activations.by_site[Site(int(layer), "res")]
        live = of_layer[np.isin(of_layer["feature"], np.unique(codes.tocoo().col))]
        above = {m: live[f"s_{m}"] > live[f"null_{m}"] for m in ("res", "mlp", "att")}
        at_layer = occurrences[occurrences["layer"] == layer]
        records.append(
            {
                "layer": layer,
                "live": len(live),
                "s_res_above_null": above["res"].mean(),
                "module_above_null": (above["mlp"] | above["att"]).mean(),
                "predecessor_active": at_layer["res"].mean(),
                "by_chance": at_layer["rate_res"].mean(),
            }
        )
    table = pd.DataFrame(records)
    return table.assign(ratio=table["predecessor_active"] / table["by_chance"])


def measure_themes(suite: "Suite", seed: int = 0) -> "pd.DataFrame":
    """For each subject of the passages, the residual feature that tells it from all others.

    The feature is chosen on one half of the passages by AUC of its strongest activation in a
    passage; the AUC reported is that of the other half.
    """
    import pandas as pd

    frame = passages()
    sites = [site for site in suite.saes if site.module == "res"]
    activations = collect(suite, frame["text"].tolist(), sites)
    text = activations.tokens["text"].to_numpy()
    codes = {str(s): pd.DataFrame(activations.by_site[s].toarray()) for s in sites}
    by_feature = pd.concat({s: c.groupby(text).max() for s, c in codes.items()}, axis=1)
    strongest = by_feature.to_numpy()
    half = np.zeros(len(frame), dtype=bool)
    rng = np.random.default_rng(seed)
    for rows in frame.groupby("subject").indices.values():
        half[rng.permutation(rows)[: len(rows) // 2]] = True
    records = []
    for subject in sorted(frame["subject"].unique()):
        is_subject = (frame["subject"] == subject).to_numpy()
        chosen_on = auc(strongest[half], is_subject[half])
        best = int(np.argmax(chosen_on))
        site, index = by_feature.columns[best]
        records.append(
            {
                "subject": subject,
                "feature": f"{site}/{index}",
                "auc_chosen_on": chosen_on[best],
                "auc_held_out": auc(strongest[~half][:, [best]], is_subject[~half])[0],
            }
        )
    return pd.DataFrame(records)


def sample_tokens(
    activations: FeatureActivations, texts: int = 250, per_text: int = 5, seed: int = 0
) -> np.ndarray:
    """Rows of `activations.tokens`: so many tokens of each of so many texts (paper A.1)."""
    rng = np.random.default_rng(seed)
    rows = list(activations.tokens.groupby("text").indices.values())
    chosen = rng.permutation(len(rows))[:texts]
    return np.concatenate([rng.permutation(rows[text])[:per_text] for text in chosen])
