"""Thousands of edits, each on a row of a batch of its own.

An edit at a token changes nothing before it. So the text before the token is read once, and a pass
holds one row for each intervention: of that token where only activations are wanted, and of the
rest of the text where the loss is.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from flowhelpers.activations.sparse import PASS_TENSORS
from flowhelpers.core.features import Site, predecessor_site
from flowhelpers.core.machine import free_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.interventions.edits import add_per_row, rescale_per_row
from flowhelpers.suites.model import PromptCache, Tokens, cache_prompt, run_model, token_losses

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

LARGEST_BATCH = 1024  # rows; beyond these a pass only gets longer
CPU_BUDGET = 2**30
LOSSES = ["loss_before", "token_loss_before", "loss_after", "token_loss_after"]


def intervene(
    suite: "Suite",
    tokens: Tokens,
    cases: "pd.DataFrame",
    edits: "pd.DataFrame",
    reads: "pd.DataFrame",
    loss: bool = False,
    batch_size: int | None = None,
) -> "tuple[pd.DataFrame, pd.DataFrame | None]":
    """Changes the stream at one token for each case, and reads features at that token (paper A.2).

    All edits of a case are made in one forward pass (CHOICES 9); cases that ask for the same
    changes of a token share a row of a batch.

    Args:
        cases: One row a case: `text` (row of `tokens`), `position`, `layer` (of the target).
        edits: One row a feature that is changed: `case` (the case's row number), `module`,
            `feature`, and either `amount`, what is added in units of the decoder row, (r - 1) · a
            of the clean run; or `r`, with a read live.
        reads: One row a feature that is read: `case`, `layer`, `module`, `feature`.
        loss: Whether the pass goes on to the end of the text and the model, for the loss.
        batch_size: The most rows in a pass, by default as many as memory allows; halved, with a
            warning, where a GPU runs out of it.

    Returns:
        `reads` with the activations `old`, without edits, and `new`. With `loss` one row a case, in
        nats: `loss_before` and `loss_after`, the text's mean next-token cross-entropy;
        `token_loss_before` and `token_loss_after`, the edited token's own, missing at the last.

    Raises:
        ValueError: If a case has no edit or is at BOS or another special token, an amount is not
            finite, or an edit is lost to rounding.
        RuntimeError: If an edit changed what comes before it.
        MemoryError: If not even one row fits.
    """
    import pandas as pd

    at = torch.tensor(cases[["text", "position"]].to_numpy(), device=tokens.is_text.device)
    if not tokens.is_text[at[:, 0], at[:, 1]].all():
        raise ValueError("a case is at BOS or a special token: expected tokens of the text")
    row_of_case, rows = _distinct(cases, edits)
    # Layers share passes, unless their SAEs are not all in memory.
    by = ["text"] if getattr(suite.saes, "all_fit", True) else ["layer", "text"]
    most = batch_size or _fitting_rows(suite, tokens.ids.shape[1], loss, reads)
    by_token = rows.groupby([*by, "position"])
    rows = rows.assign(token=by_token.ngroup(), place=by_token.cumcount())
    of_case = rows[["token", "place"]].iloc[row_of_case[reads["case"]]].reset_index(drop=True)
    reads = reads.reset_index(drop=True)
    tables = [t.groupby("token") for t in (edits.merge(rows, on="case"), reads.join(of_case))]
    activations = np.zeros((2, len(reads)), np.float32)
    losses = np.zeros((len(rows), len(LOSSES)), np.float32)
    for _, rows_of_text in progress([*rows.groupby(by)], "interventions"):
        text = int(rows_of_text["text"].iloc[0])
        end = 1 + int(tokens.is_text[text].nonzero().max())
        ids = tokens.ids[text : text + 1, :end]
        logits, prefix = cache_prompt(suite.model, ids)
        early = token_losses(logits[:, :-1], ids[:, 1:])
        for (token, position), rows_at in rows_of_text.groupby(["token", "position"]):
            start, own = 0, [table.get_group(token) for table in tables]
            while start < len(rows_at):
                batch = rows_at.iloc[start : start + most]
                rest = ids[:, position : end if loss else position + 1].expand(len(batch) + 1, -1)
                shifted = (table.assign(place=table["place"] + 1 - start) for table in own)
                changed, read = (t[t["place"].between(1, len(batch))] for t in shifted)
                try:
                    logits, codes = _pass(suite, rest, prefix.first(position), changed, read, loss)
                    later = None if logits is None else token_losses(logits[:, :-1], rest[:, 1:])
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        raise MemoryError("the device has no room for one intervention") from error
                    most = len(batch) // 2
                    told = f"out of memory with {len(batch)} interventions in a pass"
                    warnings.warn(f"{told}: it goes on with {most}", stacklevel=2)
                    continue
                activations[:, read.index] = codes
                if later is not None:
                    whole = (early[0, :position].sum() + later.sum(1)) / (end - 1)
                    token_loss = later[:, 0] if later.shape[1] else whole * torch.nan
                    both = torch.stack([whole, token_loss], dim=1).cpu().numpy()
                    losses[batch.index] = np.hstack([both[:1].repeat(len(batch), 0), both[1:]])
                start += len(batch)
    reads = reads.assign(old=activations[0], new=activations[1])
    return reads, pd.DataFrame(losses[row_of_case], columns=LOSSES) if loss else None


def _fitting_rows(suite: "Suite", length: int, loss: bool, reads: "pd.DataFrame") -> int:
    """How many rows fit in half of the free memory, on a CPU in a GiB at most."""
    model, device, own = suite.model, str(suite.model.device), length if loss else 1
    sites = reads[["layer", "module"]].drop_duplicates().itertuples(index=False)
    encoded = max(suite.sae(Site(*site)).width for site in sites)
    encoded += own * model.unembedding.shape[1] if loss else 0
    stream = 6 * model.layers * length + own * PASS_TENSORS  # keys and values, three times
    of_row = stream * model.d_model * model.unembedding.element_size() + 16 * encoded
    room = min(free_memory(device) // 2, np.inf if device.startswith("cuda") else CPU_BUDGET)
    return int(np.clip(room // of_row, 1, LARGEST_BATCH))


def _distinct(cases: "pd.DataFrame", edits: "pd.DataFrame") -> "tuple[np.ndarray, pd.DataFrame]":
    """The row of each case, equal where they ask for the same; rows, with the first such case."""
    size = "amount" if "amount" in edits else "r"
    what = edits.groupby(["module", "feature", size], observed=True).ngroup()
    what = what.sort_values().groupby(edits["case"]).agg(tuple)
    if what.index.tolist() != list(range(len(cases))):
        raise ValueError(f"edits of {len(what)} cases: expected some for each of {len(cases)}")
    if edits["feature"].min() < 0:
        raise ValueError("an edit of feature -1, which stands for no match")
    asked = cases[["text", "position", "layer"]].reset_index(drop=True).assign(what=what)
    row_of_case = asked.groupby([*asked], sort=False).ngroup().to_numpy()
    rows = asked.drop_duplicates().drop(columns="what")
    return row_of_case, rows.reset_index(names="case")


def _pass(
    suite: "Suite",
    ids: Int[Tensor, "batch position"],
    prefix: PromptCache,
    edits: "pd.DataFrame",
    reads: "pd.DataFrame",
    loss: bool,
) -> tuple[Tensor | None, np.ndarray]:
    """Logits of one forward pass, and `[2, reads]` what is read in row 0 and in its own row."""
    changes, first_edit, live = [], np.full(len(ids), np.inf), "amount" not in edits
    for (layer, module), part in edits.groupby(["layer", "module"], sort=False, observed=True):
        sae = suite.sae(predecessor_site(int(layer), str(module)))
        rows, features = torch.tensor(part[["place", "feature"]].to_numpy().T, device=ids.device)
        size = part["r"] if live else part["amount"]
        size = torch.tensor(size.to_numpy(np.float32), device=ids.device)
        if live:
            changes.append(rescale_per_row(sae, rows, features, size, [0]))
        else:
            vectors = size[:, None] * sae.decoder_rows(features).float()
            changes.append(add_per_row(sae.input_site, rows, vectors, [0]))
        np.minimum.at(first_edit, part["place"].to_numpy(), _order(sae.input_site))
    reads_of_site = reads.groupby(["layer", "module"], observed=True).indices
    saes = {site: suite.sae(Site(int(site[0]), str(site[1]))) for site in reads_of_site}
    # What comes before an edit is read as well, to see that it stays as it was.
    layers = edits["layer"].unique().tolist()
    earlier = [Site(at, m) for layer in layers for at, m in ((layer - 1, "res"), (layer, "att"))]
    wanted = {*(sae.input_site for sae in saes.values())}
    wanted |= {site for site in earlier if site.layer >= 0}
    last = max(site.layer for site in (*wanted, *(change.site for change in changes)))
    logits, stream = run_model(suite.model, ids, wanted, changes, None if loss else last, prefix)
    for site, activations in stream.items():
        unedited = torch.from_numpy(first_edit > _order(site)).to(ids.device)  # row 0 among them
        clean = activations[0, 0]
        moved = (activations[unedited, 0] - clean).abs().max() / clean.abs().max()
        if not moved <= (1e-4 if clean.dtype == torch.float32 else 3e-2):
            raise RuntimeError(f"an edit changed {site}, which lies before it, by {moved:.1%}")
    found = np.zeros((2, len(reads)), np.float32)
    for site, sae in saes.items():
        at = reads_of_site[site]
        places, feature = reads[["place", "feature"]].to_numpy()[at].T
        places, own = np.unique(places, return_inverse=True)
        codes = sae.encode(stream[sae.input_site][[0, *places.tolist()], 0])
        codes = codes.float().cpu().numpy()
        found[:, at] = codes[0, feature], codes[1 + own, feature]
    return logits, found


def _order(site: Site) -> int:
    """The place of a site among all that the stream passes."""
    return 4 * site.layer + ("z", "att", "mlp", "res").index(site.module)
