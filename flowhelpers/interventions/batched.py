"""Thousands of edits, each on a row of a batch of its own.

An edit at a token changes nothing before it. So the text before the token is read once, and a pass
holds one row for each intervention: of that token where only activations are wanted, and of the
rest of the text where the loss is. Tokens share passes, each with a row without edits: with the
loss those at the same place of their texts, else all. SAEs read once many passes are made.
"""

from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from flowhelpers.activations.sparse import PASS_TENSORS
from flowhelpers.core.features import Site, predecessor_site
from flowhelpers.core.machine import free_memory, halved
from flowhelpers.core.progress_bar import progress
from flowhelpers.interventions.edits import add_per_row, rescale_per_row
from flowhelpers.suites.model import (
    Model,
    Tokens,
    cache_prompt,
    run_model,
    takes_padding,
    token_losses,
)
from flowhelpers.suites.prompt_cache import PromptCache

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

LARGEST_BATCH = 1024  # rows; beyond these a pass only gets longer
CPU_BUDGET = 2**30
KEPT_BYTES = 2**30  # of the stream at edited tokens, before it is encoded
Kept = tuple[Site, Tensor, np.ndarray, np.ndarray, "pd.Index"]  # stream, its rows, features, reads
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
            finite, an edit is lost to rounding, or `batch_size` is below 1.
        RuntimeError: If an edit changed what comes before it.
        MemoryError: If not even one row fits.
    """
    import pandas as pd

    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    at = torch.tensor(cases[["text", "position"]].to_numpy(), device=tokens.is_text.device)
    if not tokens.is_text[at[:, 0], at[:, 1]].all():
        raise ValueError("a case is at BOS or a special token: expected tokens of the text")
    row_of_case, rows = _distinct(cases, edits)
    fitting, texts_at_once = _fitting(suite, tokens.ids.shape[1], loss, reads)
    most, block = batch_size or fitting, -1
    at_first = most
    rows["block"] = pd.factorize(rows["text"], sort=True)[0] // texts_at_once
    # Layers share passes unless their SAEs are not all in memory, places where nothing follows.
    by = [*([] if getattr(suite.saes, "all_fit", True) else ["layer"]), "block"]
    rows["token"] = rows.groupby([*by, "position", "text"]).ngroup()
    by += ["position"] if loss or not takes_padding(suite.model) else []
    rows = rows.sort_values("token", kind="stable").reset_index(names="was")
    row_of_case = rows["was"].to_numpy().argsort()[row_of_case]
    numbered = rows[["case", "layer"]].reset_index(names="row")
    edits = edits.merge(numbered, on="case").sort_values("row", kind="stable")
    reads = reads.reset_index(drop=True)
    of_row = reads.assign(row=row_of_case[reads["case"]]).sort_values("row", kind="stable")
    activations, kept = np.zeros((2, len(reads)), np.float32), []
    losses = np.zeros((len(rows), len(LOSSES)), np.float32)
    ends = tokens.is_text.int().cumsum(1).argmax(1) + 1
    for _, rows_here in progress([*rows.groupby(by)], "interventions"):
        if block != (block := int(rows_here["block"].iloc[0])):
            texts = np.unique(rows.loc[rows["block"] == block, "text"])
            early, prefix = _read_texts(suite.model, tokens.ids[texts, : int(ends[texts].max())])
        start = 0
        while start < len(rows_here):
            token = rows_here["token"].to_numpy()[start:]
            place = np.arange(1, len(token) + 1) + token - token[0]  # after each token's clean row
            batch = rows_here.iloc[start:][place <= most]
            place = place[: len(batch)]
            is_clean = ~np.isin(np.arange(place[-1] + 1), place)
            of_token = batch.drop_duplicates("token")[["text", "position"]].to_numpy()
            clean, (text, at) = (
                each[..., is_clean.cumsum() - 1] for each in (np.flatnonzero(is_clean), of_token.T)
            )
            position, end, ids = int(at.max()), ends[text], tokens.ids[text]
            rest = ids[:, position : end.max()] if loss else ids[range(len(at)), at][:, None]
            changed, read = (
                table.iloc[slice(*table["row"].searchsorted(batch.index[[0, -1]] + [0, 1]))]
                for table in (edits, of_row)
            )
            changed, read = (
                t.assign(place=place[t["row"] - batch.index[0]]) for t in (changed, read)
            )
            own, lengths = torch.from_numpy(np.stack([texts.searchsorted(text), at])).to(ids.device)
            try:
                earlier = prefix.of_rows(own, lengths)
                logits, streams = _pass(suite, rest, earlier, clean, changed, read, loss)
                later = None if logits is None else token_losses(logits[:, :-1], rest[:, 1:])
            except torch.OutOfMemoryError as error:
                most = halved(len(batch), "intervention", error, said=most < at_first)
                continue
            kept += streams
            if sum(stream.nbytes for _, stream, *_ in kept) > KEPT_BYTES:
                _encode(suite, kept, activations)
            if later is not None:
                ahead = end - 1 - position  # tokens with a next one; what follows is padding
                later = later * (torch.arange(later.shape[1], device=end.device) < ahead[:, None])
                whole = (early[own, :position].sum(1) + later.sum(1)) / (end - 1)
                first = later[:, 0] if later.shape[1] else whole
                both = torch.stack([whole, first.where(ahead > 0, torch.nan)], 1).cpu().numpy()
                losses[batch.index] = np.hstack([both[clean[place]], both[place]])
            start += len(batch)
    _encode(suite, kept, activations)
    reads = reads.assign(old=activations[0], new=activations[1])
    return reads, pd.DataFrame(losses[row_of_case], columns=LOSSES) if loss else None


def _fitting(suite: "Suite", length: int, loss: bool, reads: "pd.DataFrame") -> tuple[int, int]:
    """Rows of a pass in half of the free memory, texts in a quarter; on a CPU in a GiB at most."""
    model, device, own = suite.model, str(suite.model.device), length if loss else 1
    encoded = 0
    for site in reads[["layer", "module"]].drop_duplicates().itertuples(index=False):
        encoded = max(encoded, suite.about(Site(*site), "width"))
        suite.about(Site(*site), "input_site")  # asked for later, and known from the same reading
    encoded += own * model.unembedding.shape[1] if loss else 0
    size = model.d_model * model.unembedding.element_size()
    of_text = 2 * model.layers * length * size  # keys and values; of a row three times
    of_row = 3 * of_text + own * PASS_TENSORS * size + 16 * encoded
    room = min(free_memory(device) // 2, np.inf if device.startswith("cuda") else CPU_BUDGET)
    return int(np.clip(room // of_row, 1, LARGEST_BATCH)), max(1, int(room // 2 // of_text))


def _read_texts(model: Model, ids: Int[Tensor, "text position"]) -> tuple[Tensor, PromptCache]:
    """Losses, and keys and values, of texts: read one by one, as their logits are large."""
    losses, prefixes = [], []
    for text in ids.split(1):
        logits, prefix = cache_prompt(model, text)
        losses.append(token_losses(logits[:, :-1], text[:, 1:]))
        prefixes.append(prefix.layers)
    layers = (zip(*layer, strict=True) for layer in zip(*prefixes, strict=True))
    return torch.cat(losses), PromptCache(
        tuple((torch.cat(keys), torch.cat(values)) for keys, values in layers)
    )


def _encode(suite: "Suite", kept: list[Kept], activations: np.ndarray) -> None:
    """Fills in what the kept streams say, site by site, so that each SAE is loaded once."""
    for site, stream, rows, features, at in sorted(kept, key=itemgetter(0)):
        codes = suite.sae(site).encode(stream.to(suite.model.device))
        activations[:, at] = codes[rows, features].float().cpu().numpy()
    kept.clear()


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
    prefix: PromptCache | None,
    clean: np.ndarray,
    edits: "pd.DataFrame",
    reads: "pd.DataFrame",
    loss: bool,
) -> tuple[Tensor | None, list[Kept]]:
    """Logits of one forward pass, and what is to be encoded; `clean` is each row's unedited one."""
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
    reads_of_site = {
        Site(int(layer), str(module)): at
        for (layer, module), at in reads.groupby(["layer", "module"], observed=True).indices.items()
    }
    inputs = {site: suite.about(site, "input_site") for site in reads_of_site}
    # What comes before an edit is read as well, to see that it stays as it was.
    layers = edits["layer"].unique().tolist()
    earlier = [Site(at, m) for layer in layers for at, m in ((layer - 1, "res"), (layer, "att"))]
    wanted = {*inputs.values(), *(site for site in earlier if site.layer >= 0)}
    last = max(site.layer for site in (*wanted, *(change.site for change in changes)))
    logits, stream = run_model(suite.model, ids, wanted, changes, None if loss else last, prefix)
    for site, activations in stream.items():
        unedited = torch.from_numpy(first_edit > _order(site)).to(ids.device)  # clean ones too
        here = activations[:, 0][clean]
        off = (activations[:, 0] - here).abs().amax(1) / here.abs().amax(1)
        moved = off[unedited].max()
        if not moved <= (1e-4 if here.dtype == torch.float32 else 3e-2):
            raise RuntimeError(f"an edit changed {site}, which lies before it, by {moved:.1%}")
    kept = []
    for site, at in reads_of_site.items():
        places, features = reads[["place", "feature"]].to_numpy()[at].T
        rows, own = np.unique([clean[places], places], return_inverse=True)
        here = stream[inputs[site]][rows, 0].cpu()
        kept.append((site, here, own.reshape(2, -1), features, reads.index[at]))
    return logits, kept


def _order(site: Site) -> int:
    """The place of a site among all that the stream passes."""
    return 4 * site.layer + ("z", "att", "mlp", "res").index(site.module)
