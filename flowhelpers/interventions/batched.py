"""Thousands of edits, each on a row of a batch of its own.

An edit at a token changes nothing before it. So the text before a token is read once; what differs
is that token alone, and a pass holds one row for each intervention, of a single token where only
the target's activation is wanted, and of the rest of the text where the loss is.
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
from flowhelpers.core.features import FeatureId, Site, predecessor_site
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

TARGET: tuple[int, str] = (0, "res")
PREDECESSORS: dict[str, tuple[int, str]] = {
    "res": (-1, "res"),
    "mlp": (0, "mlp"),
    "att": (0, "att"),
}
MOST_AT_ONCE = 1024  # rows; beyond these a pass only gets longer
LOGIT_TENSORS = 4
ENCODED_TENSORS = 4
CPU_BUDGET = 2**30


@dataclass(frozen=True)
class Outcome:
    """What features do after edits, and what they do without.

    A place is relative to the layer of a case: `(0, "res")` is the target's site.

    Attributes:
        before: At each place, the activations at each token without edits, `[tokens, features]`.
        after: At each place, the activations after each distinct intervention, `[rows, features]`.
        token: The row of `before` that belongs to each case.
        row: The row of `after` that belongs to each case.
        losses: One row a case: `loss_before` and `loss_after`, mean next-token cross-entropy of the
            text in nats, and `token_loss_before` and `token_loss_after`, of the edited token's own
            next one, missing at the last; None unless asked for.
    """

    before: "Mapping[tuple[int, str], csr_matrix]"
    after: "Mapping[tuple[int, str], csr_matrix]"
    token: np.ndarray
    row: np.ndarray
    losses: "pd.DataFrame | None"

    def activations(
        self, features: np.ndarray, place: tuple[int, str] = TARGET, cases: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """One feature's activation for each case, before and after.

        Args:
            features: The feature of each case, by its index.
            place: Where.
            cases: Which cases; by default all.
        """
        chosen = slice(None) if cases is None else cases
        old = self.before[place][self.token[chosen], features]
        new = self.after[place][self.row[chosen], features]
        return np.asarray(old).ravel(), np.asarray(new).ravel()


def intervene(
    suite: "Suite",
    tokens: Tokens,
    cases: "pd.DataFrame",
    edits: "pd.DataFrame",
    read: Sequence[tuple[int, str]] = (TARGET,),
    loss: bool = False,
    batch_size: int | None = None,
) -> Outcome:
    """Changes the stream at one token for each case, and reads features at that token (paper A.2).

    Interventions that are the same at the same token and layer are made once. All edits of a case
    are made in one forward pass (CHOICES 9).

    Args:
        suite: The suite.
        tokens: The texts.
        cases: One row a case: `text` (row of `tokens`), `position`, `layer` (of the target).
        edits: One row for each feature that is changed: `case` (number of the case's row), `module`
            (a predecessor's: R_{L-1}, M_L or A_L), `feature`, and either `amount`, what is added in
            units of the feature's decoder row, (r - 1) · a of the clean run; or `r`, for an
            activation that is read live.
        read: Places whose features are read, after the edits: layers above the case's, and module.
        loss: Whether the pass goes on to the end of the text and the model, for the loss.
        batch_size: The most rows in a pass; by default as many as memory allows. If a GPU runs
            out of memory, it is halved, with a warning.

    Raises:
        ValueError: If a text, position (BOS among them), layer, site or feature does not exist, an
            amount is not finite, a case has no edit, or an edit is lost to rounding.
        RuntimeError: If an edit changed what comes before it.
        MemoryError: If not even one row fits.
    """
    import pandas as pd

    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    read = tuple(dict.fromkeys(read))
    _check(suite, tokens, cases, edits, read)
    row, first, edits = _distinct(cases, edits)
    chosen = cases.iloc[first].reset_index(drop=True).sort_values("layer", kind="stable")
    of_row = edits.groupby("row").indices
    before: dict[tuple[int, str], list] = {place: [] for place in read}
    after: dict[tuple[int, str], list] = {place: [] for place in read}
    order: list[int] = []
    losses: list[Tensor] = []
    seen: dict[tuple[int, int, int], int] = {}
    layers = chosen["layer"].unique().tolist()
    # Layers share passes, unless their SAEs are not all in memory.
    by = ["text"] if isinstance(suite.saes, dict) else ["layer", "text"]
    groups = [part for _, part in chosen.groupby(by)]
    width = max(suite.sae(Site(layer + up, m)).width for up, m in read for layer in layers)
    for group in progress(groups, "interventions"):
        text = int(group["text"].iloc[0])
        end = 1 + int(tokens.is_text[text].nonzero().max())
        ids = tokens.ids[text : text + 1, :end]
        logits, prefix = cache_prompt(suite.model, ids)
        early = token_losses(logits[:, :-1], ids[:, 1:])[0]
        for position, there in group.groupby("position"):
            own = ids[:, position : end if loss else position + 1]
            most = rows_at_once(suite.model, prefix, position, own.shape[1], loss, width)
            start = 0
            while start < len(there):
                some = there.iloc[start : start + min(most, batch_size or most)]
                mine = [of_row[r] for r in some.index]
                part = edits.iloc[np.concatenate(mine)]
                at = np.repeat(np.arange(len(mine)), [len(each) for each in mine])
                part = part.assign(at=at + 1, layer=some["layer"].to_numpy()[at])
                batch = own.expand(len(some) + 1, -1)
                try:
                    logits, found = _pass(
                        suite, batch, prefix.first(position), some["layer"], part, read, loss
                    )
                    if logits is not None:
                        later = token_losses(logits[:, :-1], batch[:, 1:])
                        losses.append(_mean_losses(early[:position], later).cpu())
                except torch.OutOfMemoryError as error:
                    batch_size = _halved(len(some), error)
                    continue
                fresh = {at for at in some["layer"] if (at, text, position) not in seen}
                for layer in sorted(fresh):
                    seen[layer, text, position] = len(seen)
                for (layer, place), codes in found.items():
                    before[place] += [codes[:1]] if layer in fresh else []
                    after[place].append(codes[1:])
                order += list(some.index)
                start += len(some)
    back = np.argsort(order)
    table = None
    if loss:
        names = ["loss_before", "token_loss_before", "loss_after", "token_loss_after"]
        table = pd.DataFrame(torch.cat(losses).numpy()[back][row], columns=names)
    clean = {place: _stack(parts) for place, parts in before.items()}
    changed = {place: _stack(parts)[back] for place, parts in after.items()}
    where = cases[["layer", "text", "position"]].itertuples(index=False, name=None)
    token = np.array([seen[key] for key in where])
    return Outcome(clean, changed, token, row, table)


def rows_at_once(
    model: Model, prefix: PromptCache, before: int, after: int, loss: bool, width: int = 0
) -> int:
    """How many rows a pass can have: half of the memory that is free, on a CPU a GiB at most.

    Args:
        model: The model.
        prefix: Keys and values of a text.
        before: Tokens that every row takes from it.
        after: Tokens of its own that a row has.
        loss: Whether logits are needed.
        width: Features of the widest SAE that reads a row.
    """
    device, element = str(model.device), model.unembedding.element_size()
    kept = sum(part.shape[1] * part.shape[3] for layer in prefix.layers for part in layer)
    of_row = 3 * kept * (before + after) * element
    of_row += after * model.d_model * PASS_TENSORS * element
    of_row += width * ENCODED_TENSORS * 4
    of_row += loss * after * model.unembedding.shape[1] * LOGIT_TENSORS * 4
    room = free_memory(device) // 2
    room = room if device.startswith("cuda") else min(room, CPU_BUDGET)
    return int(np.clip(room // of_row, 1, MOST_AT_ONCE))


def _check(
    suite: "Suite",
    tokens: Tokens,
    cases: "pd.DataFrame",
    edits: "pd.DataFrame",
    read: Sequence[tuple[int, str]],
) -> None:
    if cases.empty or edits.empty:
        raise ValueError(f"{len(cases)} cases and {len(edits)} edits: expected one or more of each")
    texts = tokens.is_text.cpu().numpy()
    for row in cases[["text", "position"]].drop_duplicates().itertuples():
        if not 0 <= row.text < len(texts):
            raise ValueError(f"no text {row.text}: there are {len(texts)}")
        length = 1 + int(texts[row.text].nonzero()[0].max(initial=0))
        if not 0 <= row.position < length:
            raise ValueError(
                f"position {row.position} lies outside text {row.text}, which has {length} tokens"
            )
        if not texts[row.text, row.position]:
            kind = "BOS" if row.position == 0 else "a special token"
            raise ValueError(
                f"position {row.position} of text {row.text} is {kind}: none is edited"
            )
    if missing := sorted(set(range(len(cases))) - set(edits["case"])):
        raise ValueError(f"case {missing[0]} has no edit")
    if outside := sorted(set(edits["case"]) - set(range(len(cases)))):
        raise ValueError(f"an edit names case {outside[0]}: there are {len(cases)}")
    if edits.duplicated(["case", "module", "feature"]).any():
        twice = edits[edits.duplicated(["case", "module", "feature"])].iloc[0]
        raise ValueError(f"case {twice['case']} names {twice['module']}/{twice['feature']} twice")
    size = edits["amount" if "amount" in edits else "r"].to_numpy(float)
    if not np.isfinite(size).all():
        bad = edits.iloc[int(np.flatnonzero(~np.isfinite(size))[0])]
        raise ValueError(
            f"case {bad['case']}: the change of {bad['module']}/{bad['feature']} is not finite"
        )
    layers = cases["layer"].to_numpy()[edits["case"]]
    for (layer, module), part in edits.groupby([layers, "module"], observed=True):
        site = predecessor_site(int(layer), str(module))
        for index in (part["feature"].min(), part["feature"].max()):
            suite.feature(FeatureId(site.layer, site.module, int(index)))
    for layer in cases["layer"].unique():
        for shift, module in read:
            suite.sae(Site(int(layer) + shift, module))


def _distinct(
    cases: "pd.DataFrame", edits: "pd.DataFrame"
) -> "tuple[np.ndarray, np.ndarray, pd.DataFrame]":
    """Cases that ask for the same: each one's row, the first case of each row, and its edits."""
    size = "amount" if "amount" in edits else "r"
    what = edits.groupby(["module", "feature", size], observed=True).ngroup()
    what = edits.assign(what=what).sort_values(["case", "what"])
    what = what.groupby("case")["what"].agg(tuple)
    asked = cases[["text", "position", "layer"]].reset_index(drop=True).assign(what=what)
    row = asked.groupby(list(asked.columns), sort=False).ngroup().to_numpy()
    first = np.unique(row, return_index=True)[1]
    kept = edits[edits["case"].isin(first)]
    return row, first, kept.assign(row=row[kept["case"]]).reset_index(drop=True)


def _pass(
    suite: "Suite",
    ids: Int[Tensor, "batch position"],
    prefix: PromptCache,
    layers: "pd.Series",
    edits: "pd.DataFrame",
    read: Sequence[tuple[int, str]],
    loss: bool,
) -> "tuple[Tensor | None, dict[tuple[int, tuple[int, str]], csr_matrix]]":
    """One forward pass; row 0 is without edits, and each edit's `at` is its row.

    Gives logits, and by layer and place the features of row 0 and of the rows of that layer, layers
    in their order.
    """
    from scipy.sparse import csr_matrix

    changes, first = [], np.full(len(ids), np.inf)
    for (layer, module), part in edits.groupby(["layer", "module"], sort=False, observed=True):
        sae = suite.sae(predecessor_site(int(layer), str(module)))
        changes.append(_change(sae, part))
        np.minimum.at(first, part["at"].to_numpy(), _order(sae.input_site))
    rows = {
        layer: torch.tensor([0, *(np.flatnonzero(layers == layer) + 1)], device=ids.device)
        for layer in sorted({int(layer) for layer in layers})
    }
    there = {
        (layer, place): suite.sae(Site(layer + place[0], place[1]))
        for layer in rows
        for place in read
    }
    # What comes before an edit is read as well, to see that it stays as it was.
    before = [Site(at, m) for layer in rows for at, m in ((layer - 1, "res"), (layer, "att"))]
    wanted = [sae.input_site for sae in there.values()]
    wanted = list(dict.fromkeys([*wanted, *(site for site in before if site.layer >= 0)]))
    last = max(site.layer for site in (*wanted, *(change.site for change in changes)))
    logits, found = run_model(suite.model, ids, wanted, changes, None if loss else last, prefix)
    for site, activations in found.items():
        unedited = torch.from_numpy(first > _order(site)).to(ids.device)
        _check_order(site, activations[unedited], activations[:1])
    codes = {}
    for (layer, place), sae in there.items():
        dense = sae.encode(found[sae.input_site][rows[layer], 0])
        codes[layer, place] = csr_matrix(dense.float().cpu().numpy())
    return logits, codes


def _change(sae: "SAE", edits: "pd.DataFrame") -> Edit:
    device = sae.norms.device
    rows, features = (torch.tensor(edits[c].to_numpy(), device=device) for c in ("at", "feature"))
    if "amount" not in edits:
        r = torch.tensor(edits["r"].to_numpy(np.float32), device=device)
        return rescale_per_row(sae, rows, features, r, 0)
    amount = torch.tensor(edits["amount"].to_numpy(np.float32), device=device)
    return add_per_row(
        sae.input_site, rows, amount[:, None] * sae.decoder_rows(features).float(), 0
    )


def _check_order(
    site: Site,
    activations: Float[Tensor, "rows position d_in"],
    clean: Float[Tensor, "1 position d_in"],
) -> None:
    """What lies before the first edit of a row is as it is without edits, at that token."""
    if not len(activations):
        return
    off = (activations[:, 0] - clean[:, 0]).abs().max() / clean[:, 0].abs().max()
    if not off <= (1e-4 if clean.dtype == torch.float32 else 3e-2):
        raise RuntimeError(
            f"an edit changed {site}, which lies before it, by {off:.1%} of its size"
        )


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


def _halved(rows: int, error: torch.OutOfMemoryError) -> int:
    if rows == 1:
        raise MemoryError("not even one intervention fits into the device's memory") from error
    warnings.warn(
        f"the device ran out of memory with {rows} interventions in a pass: it goes on with"
        f" {rows // 2}",
        stacklevel=3,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows // 2


def _stack(parts: "list[csr_matrix]") -> "csr_matrix":
    from scipy.sparse import vstack

    width = max(part.shape[1] for part in parts)
    for part in parts:
        part.resize(part.shape[0], width)
    return vstack(parts, format="csr")
