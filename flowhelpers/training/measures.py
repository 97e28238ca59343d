"""The figures of a suite's card: loss, SAEs, and flow against chance."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.activations.sparse import FeatureActivations, collect
from flowhelpers.core.features import predecessor_sites
from flowhelpers.core.progress_bar import progress
from flowhelpers.groups.occurrences import find_occurrences
from flowhelpers.groups.significance import mann_whitney_tests, share_significant
from flowhelpers.matching.scores import feature_scores
from flowhelpers.matching.table import match_table
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Activations, Edit, Tokens, logits_of, run_model, token_losses

BATCH = 16  # texts in one forward pass


def measure(
    suite: Suite, tokens: Tokens, seed: int = 0
) -> tuple[dict[str, float], dict[str, pd.DataFrame]]:
    """The figures of a suite on a text, the worst site or layer of each, and their tables."""
    nats, bits = bits_per_byte(suite, tokens)
    sites = measure_saes(suite, tokens)
    is_residual = sites["site"].str.endswith("/res")
    figures = {
        "bits per byte": bits,
        "nats per token": nats,
        "L0 / d_model, highest site": sites["l0_share_of_d"].max(),
        "explained variance, lowest res": sites["explained_variance"][is_residual].min(),
        "explained variance, lowest mlp, att": sites["explained_variance"][~is_residual].min(),
        "dead share, highest site": sites["dead_share"].max(),
        "loss recovered, lowest res": sites["loss_recovered"][is_residual].min(),
    }
    tables = {"sites": sites}
    later = [site for site in suite.saes if site.module == "res" and site.layer]
    if any({site, *predecessor_sites(site).values()} <= set(suite.saes) for site in later):
        activations = collect(suite, tokens)
        matches = match_table(suite, 1, seed)
        occurrences = find_occurrences(matches, activations)
        flow = measure_flow(feature_scores(matches), occurrences.table)
        sampled = occurrences.table["token_row"].isin(sample_tokens(activations, seed))
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
    return figures, tables


@torch.no_grad()
def text_losses(suite: Suite, tokens: Tokens, edit: Edit | None = None) -> Float[Tensor, "tokens"]:
    """The loss of each token of the text in nats; an edit is made at the text alone."""
    losses = []
    for ids, is_text in zip(tokens.ids.split(BATCH), tokens.is_text.split(BATCH), strict=True):

        def change(x: Activations, at: Tensor = is_text[..., None]) -> Activations:
            return torch.where(at, edit.change(x), x) if edit else x

        logits = logits_of(suite.model, ids, [Edit(edit.site, change)] if edit else [])
        losses.append(token_losses(logits[:, :-1], ids[:, 1:])[is_text[:, 1:]])
    return torch.cat(losses).double()


def bits_per_byte(suite: Suite, tokens: Tokens) -> tuple[float, float]:
    """Loss of the next token: nats per token, and bits per byte of the text that is predicted."""
    losses = text_losses(suite, tokens)
    rows = [ids[is_text] for ids, is_text in zip(tokens.ids, tokens.is_text, strict=True)]
    size = len("".join(suite.model.tokenizer.batch_decode(rows)).encode())
    return losses.mean().item(), losses.sum().item() / size / math.log(2)


def measure_saes(suite: Suite, tokens: Tokens) -> pd.DataFrame:
    """L0, explained variance (CHOICES 28), dead share and loss recovered at every site.

    A feature is dead if it is active at no token. The loss recovered is the share of the loss that
    zeroing the site costs which the SAE saves, on the first 32 texts. `sae_lens.evals` asks for an
    `ActivationsStore` and a hook, which our text and sites at z do not fit.
    """
    from sae_lens.evals import ExplainedVarianceCalculator

    variance = {site: ExplainedVarianceCalculator() for site in suite.saes}
    active = {site: torch.zeros(sae.width) for site, sae in suite.saes.items()}
    reads = [sae.input_site for sae in suite.saes.values()]
    for rows in progress(torch.arange(len(tokens.ids)).split(BATCH), "reconstruction"):
        ids, is_text = tokens.ids[rows], tokens.is_text[rows]
        _, read = run_model(suite.model, ids, read=reads, stop_after=suite.layers - 1)
        for site, sae in suite.saes.items():
            x = read[sae.input_site][is_text].float()
            codes = sae.encode(x)
            variance[site].add_batch(sae.decode(codes, x).float(), x)
            active[site] += (codes > 0).sum(0).cpu()
    first = Tokens(tokens.ids[:32], tokens.is_text[:32])
    clean = text_losses(suite, first).mean().item()
    records = []
    for site, sae in progress(list(suite.saes.items()), "loss recovered"):
        zeroed, rebuilt = (
            text_losses(suite, first, Edit(sae.input_site, to)).mean().item()
            for to in (torch.zeros_like, lambda x, sae=sae: sae.decode(sae.encode(x), x))
        )
        l0 = active[site].sum().item() / int(tokens.is_text.sum())
        records.append(
            {
                "site": str(site),
                "l0": l0,
                "l0_share_of_d": l0 / suite.model.d_model,
                "explained_variance": variance[site].compute(),
                "dead_share": (active[site] == 0).double().mean().item(),
                "loss_recovered": (zeroed - rebuilt) / (zeroed - clean),
            }
        )
    return pd.DataFrame(records)


def measure_flow(scores: pd.DataFrame, occurrences: pd.DataFrame) -> pd.DataFrame:
    """By layer: live features whose match beats the null, and active predecessors against chance.

    Chance is how often the predecessor is active in general, whatever the feature does.
    """
    live = scores.merge(occurrences[["layer", "feature"]].drop_duplicates())
    above = {m: live[f"s_{m}"] > live[f"null_{m}"] for m in ("res", "mlp", "att")}
    live["s_res_above_null"] = above["res"]
    live["module_above_null"] = above["mlp"] | above["att"]
    table = live.groupby("layer")[["s_res_above_null", "module_above_null"]].mean()
    active = occurrences.groupby("layer")[["res", "rate_res"]].mean()
    table[["predecessor_active", "by_chance"]] = active
    return table.assign(ratio=active["res"] / active["rate_res"]).reset_index()


def sample_tokens(activations: FeatureActivations, seed: int) -> np.ndarray:
    """Rows of `activations.tokens`: 5 tokens of each of 250 texts (paper A.1)."""
    rng = np.random.default_rng(seed)
    rows = list(activations.tokens.groupby("text").indices.values())
    chosen = rng.permutation(len(rows))[:250]
    return np.concatenate([rng.permutation(rows[text])[:5] for text in chosen])
