"""Thousands of edits, each on a row of a batch of its own.

An edit at a token changes nothing before it. So the text before the token is read once, and a pass
holds one row for each intervention: of that token where only activations are wanted, and of the
rest of the text where the loss is.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.activations.sparse import PASS_TENSORS
from flowhelpers.core.features import Site, predecessor_site
from flowhelpers.core.machine import free_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.interventions.edits import add_per_row, rescale_per_row
from flowhelpers.suites.model import (
    Edit,
    Model,
    PromptCache,
    Tokens,
    cache_prompt,
    run_model,
    token_losses,
)

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

Offset = tuple[int, str]  # a site relative to a case: layers above its target, and module
TARGET_OFFSET: Offset = (0, "res")
PREDECESSOR_OFFSETS: dict[str, Offset] = {"res": (-1, "res"), "mlp": (0, "mlp"), "att": (0, "att")}
LARGEST_BATCH = 1024  # rows; beyond these a pass only gets longer
LOGIT_TENSORS = 4
ENCODED_TENSORS = 4
CPU_BUDGET = 2**30
LOSSES = ["loss_before", "token_loss_before", "loss_after", "token_loss_after"]


@dataclass(frozen=True)
class Outcome:
    """Activations and losses with and without edits.

    Attributes:
        before: By offset, the activations at each token without edits, `[tokens, features]`.
        after: By offset, those after each distinct intervention, `[rows, features]`.
        token: The row of `before` for each case.
        row: The row of `after` for each case.
        losses: One row a case, in nats: `loss_before` and `loss_after`, the text's mean next-token
            cross-entropy; `token_loss_before` and `token_loss_after`, the edited token's own,
            missing at the last token. None unless asked for.
    """

    before: "Mapping[Offset, csr_matrix]"
    after: "Mapping[Offset, csr_matrix]"
    token: np.ndarray
    row: np.ndarray
    losses: "pd.DataFrame | None"

    def activations(
        self, features: np.ndarray, offset: Offset = TARGET_OFFSET, cases: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """One feature's activation for each of the cases (by default all), before and after."""
        chosen = slice(None) if cases is None else cases
        old = self.before[offset][self.token[chosen], features]
        new = self.after[offset][self.row[chosen], features]
        return np.asarray(old).ravel(), np.asarray(new).ravel()


def intervene(
    suite: "Suite",
    tokens: Tokens,
    cases: "pd.DataFrame",
    edits: "pd.DataFrame",
    read: Sequence[Offset] = (TARGET_OFFSET,),
    loss: bool = False,
    batch_size: int | None = None,
) -> Outcome:
    """Changes the stream at one token for each case, and reads features at that token (paper A.2).

    All edits of a case are made in one forward pass (CHOICES 9); cases that ask for the same
    changes of a token share a row of a batch.

    Args:
        suite: A model and its SAEs.
        tokens: The texts.
        cases: One row a case: `text` (row of `tokens`), `position`, `layer` (of the target).
        edits: One row a feature that is changed: `case` (the case's row number), `module` (of
            R_{L-1}, M_L or A_L), `feature`, and either `amount`, what is added in units of the
            decoder row, (r - 1) · a of the clean run; or `r`, with a read live.
        read: Offsets of the sites whose features are read, after the edits.
        loss: Whether the pass goes on to the end of the text and the model, for the loss.
        batch_size: The most rows in a pass; by default as many as memory allows. If a GPU runs
            out of memory, it is halved, with a warning.

    Raises:
        ValueError: If a case has no edit or is at BOS or another special token, an amount is not
            finite, or an edit is lost to rounding.
        RuntimeError: If an edit changed what comes before it.
        MemoryError: If not even one row fits.
    """
    import pandas as pd
    from scipy.sparse import vstack

    at = torch.tensor(cases[["text", "position"]].to_numpy(), device=tokens.is_text.device)
    if not tokens.is_text[at[:, 0], at[:, 1]].all():
        raise ValueError("a case is at BOS or a special token: expected tokens of the text")
    read = tuple(dict.fromkeys(read))
    row, first_cases, edits = _distinct(cases, edits)
    rows = cases.iloc[first_cases].reset_index(drop=True).sort_values("layer", kind="stable")
    edits_of_row = edits.groupby("row").indices
    layers = rows["layer"].unique().tolist()
    widths = {(up, m): max(suite.sae(Site(at + up, m)).width for at in layers) for up, m in read}
    before: dict[Offset, list] = {offset: [] for offset in read}
    after: dict[Offset, list] = {offset: [] for offset in read}
    clean, order, losses = [], [], []
    # Layers share passes, unless their SAEs are not all in memory.
    by = ["text"] if isinstance(suite.saes, dict) else ["layer", "text"]
    for _, rows_of_text in progress([*rows.groupby(by)], "interventions"):
        text = int(rows_of_text["text"].iloc[0])
        end = 1 + int(tokens.is_text[text].nonzero().max())
        ids = tokens.ids[text : text + 1, :end]
        logits, prefix = cache_prompt(suite.model, ids)
        clean_losses = token_losses(logits[:, :-1], ids[:, 1:])[0]
        for position, at_token in rows_of_text.groupby("position"):
            rest = ids[:, position : end if loss else position + 1]
            most = _fitting_rows(
                suite.model, prefix, position, rest.shape[1], loss, max(widths.values())
            )
            start, earlier = 0, prefix.first(position)
            while start < len(at_token):
                batch = at_token.iloc[start : start + min(most, batch_size or most)]
                batch_edits = edits.iloc[np.concatenate([edits_of_row[i] for i in batch.index])]
                batch_row = 1 + batch.index.get_indexer(batch_edits["row"])
                batch_edits = batch_edits.assign(batch_row=batch_row)
                repeated = rest.expand(len(batch) + 1, -1)
                try:
                    logits, codes = _pass(
                        suite, repeated, earlier, batch["layer"], batch_edits, read, loss
                    )
                    if logits is not None:
                        later = token_losses(logits[:, :-1], repeated[:, 1:])
                        losses.append(_mean_losses(clean_losses[:position], later).cpu())
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        raise MemoryError("the device has no room for one intervention") from error
                    told = f"out of memory with {len(batch)} interventions in a pass: it goes on"
                    batch_size = len(batch) // 2
                    warnings.warn(f"{told} with {batch_size}", stacklevel=2)
                    torch.cuda.empty_cache()
                    continue
                clean += [(layer, text, position) for layer in sorted({*batch["layer"]})]
                for (_, offset), of_site in codes.items():
                    of_site.resize(of_site.shape[0], widths[offset])
                    before[offset].append(of_site[:1])
                    after[offset].append(of_site[1:])
                order += list(batch.index)
                start += len(batch)
    back = np.argsort(order)
    clean_row = dict(zip(reversed(clean), reversed(range(len(clean))), strict=True))
    tokens_of_cases = cases[["layer", "text", "position"]].itertuples(index=False, name=None)
    return Outcome(
        {offset: vstack(parts, format="csr") for offset, parts in before.items()},
        {offset: vstack(parts, format="csr")[back] for offset, parts in after.items()},
        np.array([clean_row[token] for token in tokens_of_cases]),
        row,
        pd.DataFrame(torch.cat(losses).numpy()[back][row], columns=LOSSES) if loss else None,
    )


def _fitting_rows(
    model: Model, prefix: PromptCache, before: int, after: int, loss: bool, width: int = 0
) -> int:
    """How many rows fit in half of the free memory, on a CPU in a GiB at most.

    A row has `before` tokens of the prefix and `after` of its own; `width` is the widest SAE's.
    """
    device, element = str(model.device), model.unembedding.element_size()
    kept = sum(part.shape[1] * part.shape[3] for layer in prefix.layers for part in layer)
    of_row = 3 * kept * (before + after) * element
    of_row += after * model.d_model * PASS_TENSORS * element
    of_row += width * ENCODED_TENSORS * 4
    of_row += loss * after * model.unembedding.shape[1] * LOGIT_TENSORS * 4
    room = free_memory(device) // 2
    room = room if device.startswith("cuda") else min(room, CPU_BUDGET)
    return int(np.clip(room // of_row, 1, LARGEST_BATCH))


def _distinct(
    cases: "pd.DataFrame", edits: "pd.DataFrame"
) -> "tuple[np.ndarray, np.ndarray, pd.DataFrame]":
    """The row of each case, equal where they ask for the same; each row's first case and edits."""
    size = "amount" if "amount" in edits else "r"
    what = edits.groupby(["module", "feature", size], observed=True).ngroup()
    what = what.sort_values().groupby(edits["case"]).agg(tuple)
    if what.index.tolist() != list(range(len(cases))):
        raise ValueError(f"edits of {len(what)} cases: expected some for each of {len(cases)}")
    if edits["feature"].min() < 0:
        raise ValueError("an edit of feature -1, which stands for no match")
    asked = cases[["text", "position", "layer"]].reset_index(drop=True).assign(what=what)
    row = asked.groupby(list(asked.columns), sort=False).ngroup().to_numpy()
    first_cases = np.unique(row, return_index=True)[1]
    kept = edits[edits["case"].isin(first_cases)].reset_index(drop=True)
    layer = cases["layer"].to_numpy()[kept["case"]]
    return row, first_cases, kept.assign(row=row[kept["case"]], layer=layer)


def _pass(
    suite: "Suite",
    ids: Int[Tensor, "batch position"],
    prefix: PromptCache,
    layers: "pd.Series",
    edits: "pd.DataFrame",
    read: Sequence[Offset],
    loss: bool,
) -> "tuple[Tensor | None, dict[tuple[int, Offset], csr_matrix]]":
    """One forward pass; row 0 is without edits, and each edit names its `batch_row`.

    Gives logits, and by layer and offset the features of row 0 and of the rows of that layer.
    """
    from scipy.sparse import csr_matrix

    changes, first_edit = [], np.full(len(ids), np.inf)
    for (layer, module), part in edits.groupby(["layer", "module"], sort=False, observed=True):
        sae = suite.sae(predecessor_site(int(layer), str(module)))
        changes.append(_edit(sae, part))
        np.minimum.at(first_edit, part["batch_row"].to_numpy(), _order(sae.input_site))
    rows = {
        int(layer): torch.tensor([0, *(places + 1)], device=ids.device)
        for layer, places in layers.groupby(layers).indices.items()
    }
    saes = {(layer, (up, m)): suite.sae(Site(layer + up, m)) for layer in rows for up, m in read}
    # What comes before an edit is read as well, to see that it stays as it was.
    earlier = [Site(at, m) for layer in rows for at, m in ((layer - 1, "res"), (layer, "att"))]
    wanted = [sae.input_site for sae in saes.values()]
    wanted = list(dict.fromkeys([*wanted, *(site for site in earlier if site.layer >= 0)]))
    last = max(site.layer for site in (*wanted, *(change.site for change in changes)))
    logits, stream = run_model(suite.model, ids, wanted, changes, None if loss else last, prefix)
    for site, activations in stream.items():
        unedited = torch.from_numpy(first_edit > _order(site)).to(ids.device)  # row 0 among them
        clean = activations[0, 0]
        moved = (activations[unedited, 0] - clean).abs().max() / clean.abs().max()
        if not moved <= (1e-4 if clean.dtype == torch.float32 else 3e-2):
            raise RuntimeError(f"an edit changed {site}, which lies before it, by {moved:.1%}")
    codes = {}
    for (layer, offset), sae in saes.items():
        dense = sae.encode(stream[sae.input_site][rows[layer], 0])
        codes[layer, offset] = csr_matrix(dense.float().cpu().numpy())
    return logits, codes


def _edit(sae: "SAE", edits: "pd.DataFrame") -> Edit:
    device = sae.norms.device
    names = ("batch_row", "feature")
    rows, features = (torch.tensor(edits[c].to_numpy(), device=device) for c in names)
    live = "amount" not in edits
    size = edits["r" if live else "amount"].to_numpy(np.float32)
    size = torch.tensor(size, device=device)
    if live:
        return rescale_per_row(sae, rows, features, size, 0)
    vectors = size[:, None] * sae.decoder_rows(features).float()
    return add_per_row(sae.input_site, rows, vectors, 0)


def _order(site: Site) -> int:
    """The place of a site among all that the stream passes."""
    return 4 * site.layer + ("z", "att", "mlp", "res").index(site.module)


def _mean_losses(
    early: Float[Tensor, "tokens"], later: Float[Tensor, "batch rest"]
) -> Float[Tensor, "edited 4"]:
    """The text's mean loss and that of the token itself, of row 0 and of each edited row."""
    whole = (early.sum() + later.sum(1)) / (len(early) + later.shape[1])
    token = later[:, 0] if later.shape[1] else torch.full_like(whole, torch.nan)
    both = torch.stack([whole, token], dim=1)
    return torch.cat([both[:1].expand(len(both) - 1, -1), both[1:]], dim=1)
