"""The figures of a suite, measured: loss, SAEs, flow against chance, tests and themes."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowhelpers.activations.corpora import load_texts, passages
from flowhelpers.activations.sparse import FeatureActivations, collect, collect_tokens
from flowhelpers.core.features import FeatureId, Site, predecessor_sites
from flowhelpers.core.progress_bar import progress
from flowhelpers.groups.occurrences import find_occurrences
from flowhelpers.groups.significance import mann_whitney_tests, share_significant
from flowhelpers.labels.describe import auc, top_contexts, top_logit_tokens, top_tokens
from flowhelpers.matching.scores import feature_scores
from flowhelpers.matching.table import match_table
from flowhelpers.suites.model import (
    Activations,
    Edit,
    Tokens,
    logits_of,
    run_model,
    token_losses,
    tokenize,
)

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE


def measure(
    suite: "Suite", tokens: Tokens, k: int = 1, seed: int = 0
) -> "tuple[dict[str, float], dict[str, pd.DataFrame]]":
    """The figures of a suite on a text, and the tables behind them."""
    if not any(site.module == "res" for site in suite.saes):
        raise ValueError(f"suite {suite.name} has no residual SAE: there is no flow in it")
    nats, bits = bits_per_byte(suite, tokens)
    activations = collect_tokens(suite, tokens)
    tables = {"sites": measure_saes(suite, tokens)}
    found = {"bits per byte": bits, "nats per token": nats} | site_figures(tables["sites"])
    if any(_has_all(suite, layer) for layer in range(1, suite.layers)):
        matches = match_table(suite, k, seed)
        active = find_occurrences(matches, activations)
        sampled = active.table["token_row"].isin(sample_tokens(activations, seed=seed))
        tables["flow"] = measure_flow(feature_scores(matches), activations, active.table)
        tests = mann_whitney_tests(replace(active, table=active.table[sampled]))
        tables["tests"] = share_significant(tests).reset_index()
        found |= flow_figures(tables["flow"], tables["tests"], active.table["res"].mean())
    tables["themes"] = measure_themes(suite, seed)
    tables["examples"] = example_features(suite, activations)
    told_apart = tables["themes"]["auc_held_out"] >= 0.75
    return found | {"subjects told apart, AUC ≥ 0.75": float(told_apart.sum())}, tables


def _has_all(suite: "Suite", layer: int) -> bool:
    site = Site(layer, "res")
    return {site, *predecessor_sites(site).values()} <= set(suite.saes)


def site_figures(sites: "pd.DataFrame") -> dict[str, float]:
    """The worst site of `measure_saes`; dead and crowded ones of all, others by module."""
    residual = sites["site"].str.endswith("/res")
    explained = sites["explained_variance"]
    modules = {"explained variance, lowest mlp, att": explained[~residual].min()}
    return {
        "L0 / d_model, highest site": sites["l0_share_of_d"].max(),
        "explained variance, lowest res": explained[residual].min(),
        **(modules if not residual.all() else {}),
        "dead share, highest site": sites["dead_share"].max(),
        "loss recovered, lowest res": sites["loss_recovered"][residual].min(),
    }


def flow_figures(
    flow: "pd.DataFrame", tests: "pd.DataFrame", predecessor_active: float
) -> dict[str, float]:
    """The worst layer of `measure_flow` or its mean, and what `share_significant` gives.

    Args:
        flow: One row a layer.
        tests: One row a score.
        predecessor_active: Share of all occurrences whose residual predecessor is active.
    """
    above = flow["s_res_above_null"]
    shares = tests.set_index("score")
    return {
        "s(R) above null, layer 1": above[flow["layer"] == 1].min(),
        "s(R) above null, lowest later layer": above[flow["layer"] > 1].min(),
        "s(M) or s(A) above null, mean of layers": flow["module_above_null"].mean(),
        "residual predecessor active, all occurrences": predecessor_active,
        "… against chance, lowest layer": flow["ratio"].min(),
        **{f"significant tests, {s}, one active (AO)": at for s, at in shares["AO"].items()},
        **{
            f"… {s}, AO − both inactive (IB)": at for s, at in (shares["AO"] - shares["IB"]).items()
        },
    }


def local_tokens(suite: "Suite", max_tokens: int = 128, seed: int = 0) -> Tokens:
    """The passages, and Python source that `sources` holds out from training."""
    texts = [text for name in ("fiction", "science", "maths") for text in load_texts(name, None)]
    return tokenize(suite.model, texts + load_texts("python", 150, seed), max_tokens)


def row_tokens(suite: "Suite", rows: np.ndarray) -> Tokens:
    """Rows of token ids as a batch whose special tokens are not text."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(suite.model.device)
    special = torch.tensor(sorted(suite.model.tokenizer.all_special_ids), device=ids.device)
    return Tokens(ids, ~torch.isin(ids, special))


def bits_per_byte(suite: "Suite", tokens: Tokens, batch: int = 16) -> tuple[float, float]:
    """Loss of the next token: nats per token, and bits per byte of the text that is predicted."""
    nats, count, size = 0.0, 0, 0
    for rows in progress(torch.arange(len(tokens.ids)).split(batch), "loss"):
        ids, is_text = tokens.ids[rows], tokens.is_text[rows]
        losses = token_losses(logits_of(suite.model, ids)[:, :-1], ids[:, 1:])
        nats += losses[is_text[:, 1:]].double().sum().item()
        count += int(is_text[:, 1:].sum())
        size += sum(
            len(suite.model.tokenizer.decode(row[keep].tolist()).encode())
            for row, keep in zip(ids, is_text, strict=True)
        )
    return nats / count, nats / size / math.log(2)


def measure_saes(
    suite: "Suite", tokens: Tokens, batch: int = 16, loss_rows: int = 32
) -> "pd.DataFrame":
    """L0, explained variance, dead share and loss recovered at every site.

    Explained variance is 1 − Σ‖x − x̂‖² / Σ‖x − mean‖² (CHOICES 28). A feature is dead if it is
    active at none of the tokens. Loss recovered compares the model's loss with the site's
    activations at text tokens replaced by their reconstruction and by zeros.

    Args:
        suite: The suite.
        tokens: The text.
        batch: Texts in one forward pass.
        loss_rows: Texts on which the loss is measured.
    """
    import pandas as pd

    sites = list(suite.saes)
    reads = {site: suite.sae(site).input_site for site in sites}
    sums = {site: dict.fromkeys(("error", "square", "active"), 0.0) for site in sites}
    totals: dict[Site, torch.Tensor] = dict.fromkeys(sites, torch.zeros(()))
    fired = {site: torch.zeros(suite.sae(site).width, dtype=torch.bool) for site in sites}
    count = 0
    for rows in progress(torch.arange(len(tokens.ids)).split(batch), "reconstruction"):
        ids, is_text = tokens.ids[rows], tokens.is_text[rows]
        _, read = run_model(
            suite.model, ids, read=list(reads.values()), stop_after=suite.layers - 1
        )
        count += int(is_text.sum())
        for site in sites:
            x = read[reads[site]][is_text].float()
            codes = suite.sae(site).encode(x)
            error = x - suite.sae(site).decode(codes, x).float()
            sums[site]["error"] += error.double().square().sum().item()
            sums[site]["square"] += x.double().square().sum().item()
            sums[site]["active"] += (codes > 0).sum().item()
            totals[site] = totals[site] + x.double().sum(0).cpu()
            fired[site] |= (codes > 0).any(0).cpu()
    recovered = loss_recovered(suite, tokens, loss_rows, batch)
    records = []
    for site in sites:
        variance = sums[site]["square"] - float((totals[site] ** 2).sum()) / count
        l0 = sums[site]["active"] / count
        records.append(
            {
                "site": str(site),
                "l0": l0,
                "l0_share_of_d": l0 / suite.model.d_model,
                "explained_variance": 1 - sums[site]["error"] / variance,
                "dead_share": 1 - fired[site].double().mean().item(),
                "loss_recovered": recovered[site],
            }
        )
    return pd.DataFrame(records)


@torch.no_grad()
def loss_recovered(
    suite: "Suite", tokens: Tokens, rows: int = 32, batch: int = 16
) -> dict[Site, float]:
    """Share of the loss that zeroing a site costs which its SAE's reconstruction saves."""
    parts = list(
        zip(tokens.ids[:rows].split(batch), tokens.is_text[:rows].split(batch), strict=True)
    )

    def loss(site: Site, replacement: Callable[[Activations], Activations]) -> float:
        losses = []
        for ids, is_text in parts:

            def replace(x: Activations, is_text: torch.Tensor = is_text) -> Activations:
                return torch.where(is_text[..., None], replacement(x), x)

            logits = logits_of(suite.model, ids, [Edit(site, replace)])
            found = token_losses(logits[:, :-1], ids[:, 1:])
            losses.append(found[is_text[:, 1:]])
        return torch.cat(losses).double().mean().item()

    def rebuilt(x: Activations, sae: "SAE") -> Activations:
        return sae.decode(sae.encode(x), x)

    clean = loss(next(iter(suite.saes)), lambda x: x)
    recovered = {}
    for site, sae in progress(list(suite.saes.items()), "loss recovered"):
        zeroed = loss(sae.input_site, torch.zeros_like)
        kept = loss(sae.input_site, partial(rebuilt, sae=sae))
        recovered[site] = (zeroed - kept) / (zeroed - clean)
    return recovered


def measure_flow(
    table: "pd.DataFrame", activations: FeatureActivations, found: "pd.DataFrame"
) -> "pd.DataFrame":
    """Flow against chance, for every layer from 1 on.

    Args:
        table: One row a feature, as `matching.scores` gives.
        activations: Activations on a text.
        found: One row an occurrence, the table of `groups.occurrences`.

    Returns:
        For each layer: share of live features with s(R) above the null, share with s(M) or s(A)
        above theirs, share of occurrences whose residual predecessor is active at the same token,
        the same share by chance (how often that predecessor is active in general), their ratio.
    """
    import pandas as pd

    records = []
    for layer, part in table[table["layer"] > 0].groupby("layer"):
        codes = activations.by_site[Site(int(layer), "res")]
        live = part[np.isin(part["feature"], np.unique(codes.tocoo().col))]
        here = found[found["layer"] == layer]
        records.append(
            {
                "layer": layer,
                "live": len(live),
                "s_res_above_null": (live["s_res"] > live["null_res"]).mean(),
                "module_above_null": (
                    (live["s_mlp"] > live["null_mlp"]) | (live["s_att"] > live["null_att"])
                ).mean(),
                "predecessor_active": here["res"].mean(),
                "by_chance": here["rate_res"].mean(),
                "ratio": here["res"].mean() / here["rate_res"].mean(),
            }
        )
    return pd.DataFrame(records)


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
    strongest, features = [], []
    for site in sites:
        codes = activations.by_site[site].toarray()
        bounds = np.flatnonzero(np.diff(text, prepend=-1))
        strongest.append(np.maximum.reduceat(codes, bounds, axis=0))
        features += [FeatureId(site.layer, site.module, i) for i in range(codes.shape[1])]
    table = np.concatenate(strongest, axis=1)
    half = np.zeros(len(frame), dtype=bool)
    rng = np.random.default_rng(seed)
    for _, rows in frame.groupby("subject").indices.items():
        half[rng.permutation(rows)[: len(rows) // 2]] = True
    records = []
    for subject in sorted(frame["subject"].unique()):
        mine = (frame["subject"] == subject).to_numpy()
        chosen_on = auc(table[half], mine[half])
        best = int(np.argmax(chosen_on))
        records.append(
            {
                "subject": subject,
                "feature": str(features[best]),
                "auc_chosen_on": chosen_on[best],
                "auc_held_out": auc(table[~half][:, [best]], mine[~half])[0],
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


def example_features(suite: "Suite", activations: FeatureActivations) -> "pd.DataFrame":
    """Two features of every site that has a live one, chosen by rule.

    Of the live ones, in order of how often they are active, those at one third and two thirds.
    """
    import pandas as pd

    records = []
    for site in suite.saes:
        often = np.bincount(activations.by_site[site].tocoo().col, minlength=suite.sae(site).width)
        order = np.argsort(often, kind="stable")[(often == 0).sum() :]
        for share in (1 / 3, 2 / 3) if len(order) else ():
            feature = FeatureId(site.layer, site.module, int(order[int(share * len(order))]))
            writes = top_logit_tokens(suite, feature, 8)["token"]
            reads = top_tokens(suite, feature, activations, 8)["token"]
            contexts = top_contexts(suite, feature, activations, k=3, width=6)
            shown = contexts["before"] + "«" + contexts["token"] + "»" + contexts["after"]
            records.append(
                {
                    "feature": str(feature),
                    "active_share": often[feature.index] / len(activations.tokens),
                    "writes": " ".join(repr(token) for token in writes),
                    "active_at": " ".join(repr(token) for token in reads),
                    "in_context": " … ".join(shown),
                }
            )
    return pd.DataFrame(records)
