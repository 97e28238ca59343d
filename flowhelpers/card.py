"""What a suite is worth, measured: the figures of its model card."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowhelpers.activations import FeatureActivations, collect, collect_tokens
from flowhelpers.features import FeatureId, Site
from flowhelpers.files import write_json, write_text
from flowhelpers.groups import occurrences, share_significant, significance
from flowhelpers.labels import auc, top_contexts, top_tokens, written_tokens
from flowhelpers.matching import match_table, scores
from flowhelpers.model import Activations, Edit, Tokens, logits_of, run, tokenize
from flowhelpers.runs import progress
from flowhelpers.texts import load_texts, passages

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.dictionaries import Dictionary
    from flowhelpers.suites import Suite


TITLES = {
    "sites": "Each site",
    "flow": "Flow against chance, by layer",
    "tests": "Share of significant Mann-Whitney tests (p < 0.001; 5 tokens of each of 250 texts)",
    "themes": "The residual feature that tells a subject of the passages from all others",
    "examples": "Two features of every site, chosen by rule: a third and two thirds of the way"
    " from the rarest to the commonest; its strongest «token» in context, from three texts",
}


@dataclass(frozen=True)
class Bar:
    """One figure of a suite beside what was asked of it, if anything was."""

    name: str
    value: float
    asked: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of what was asked."""
        if self.asked is None:
            return True
        return bool(self.value >= self.asked if self.at_least else self.value <= self.asked)

    @property
    def asks(self) -> str:
        """What was asked, in signs."""
        return "" if self.asked is None else f"{'≥' if self.at_least else '≤'} {self.asked:g}"

    def __str__(self) -> str:
        return f"{'' if self.met else 'MISSED':<7}{self.name:<48}{self.value:8.3f}  {self.asks}"


def local_tokens(suite: "Suite", max_tokens: int = 128, seed: int = 0) -> Tokens:
    """Text that the embedded model never saw: the passages and held-out Python source."""
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
        losses = _losses(logits_of(suite.model, ids), ids)
        nats += losses[is_text[:, 1:]].double().sum().item()
        count += int(is_text[:, 1:].sum())
        size += sum(
            len(suite.model.tokenizer.decode(row[keep].tolist()).encode())
            for row, keep in zip(ids, is_text, strict=True)
        )
    return nats / count, nats / size / math.log(2)


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(ids), -1)


def measure_dictionaries(
    suite: "Suite", tokens: Tokens, batch: int = 16, loss_rows: int = 32
) -> "pd.DataFrame":
    """L0, explained variance, dead share and loss recovered at every site.

    Explained variance is 1 − Σ‖x − x̂‖² / Σ‖x − mean‖² (CHOICES 28). A feature is dead if it is
    active at none of the tokens. Loss recovered compares the model's loss with the site's
    activations at text tokens replaced by their reconstruction and by zeros.

    Args:
        suite: The suite.
        tokens: Text never trained on.
        batch: Texts in one forward pass.
        loss_rows: Texts on which the loss is measured.
    """
    import pandas as pd

    sites = list(suite.dictionaries)
    sums = {site: dict.fromkeys(("error", "square", "active"), 0.0) for site in sites}
    totals = {site: torch.zeros(suite.model.d_model, dtype=torch.double) for site in sites}
    fired = {site: torch.zeros(suite.dictionary(site).width, dtype=torch.bool) for site in sites}
    count = 0
    for rows in progress(torch.arange(len(tokens.ids)).split(batch), "reconstruction"):
        ids, is_text = tokens.ids[rows], tokens.is_text[rows]
        _, read = run(suite.model, ids, read=sites, stop_after=suite.layers - 1)
        count += int(is_text.sum())
        for site in sites:
            x = read[site][is_text].float()
            codes = suite.dictionary(site).encode(x)
            error = x - suite.dictionary(site).decode(codes).float()
            sums[site]["error"] += error.double().square().sum().item()
            sums[site]["square"] += x.double().square().sum().item()
            sums[site]["active"] += (codes > 0).sum().item()
            totals[site] += x.double().sum(0).cpu()
            fired[site] |= (codes > 0).any(0).cpu()
    recovered = loss_recovered(suite, tokens, loss_rows, batch)
    records = []
    for site in sites:
        variance = sums[site]["square"] - totals[site].square().sum().item() / count
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
    """Share of the loss that zeroing a site costs which its dictionary's reconstruction saves."""
    parts = list(
        zip(tokens.ids[:rows].split(batch), tokens.is_text[:rows].split(batch), strict=True)
    )

    def loss(site: Site, replacement: Callable[[Activations], Activations]) -> float:
        losses = []
        for ids, is_text in parts:

            def replace(x: Activations, is_text: torch.Tensor = is_text) -> Activations:
                return torch.where(is_text[..., None], replacement(x), x)

            found = _losses(logits_of(suite.model, ids, [Edit(site, replace)]), ids)
            losses.append(found[is_text[:, 1:]])
        return torch.cat(losses).double().mean().item()

    def rebuilt(x: Activations, dictionary: "Dictionary") -> Activations:
        return dictionary.decode(dictionary.encode(x))

    clean = loss(next(iter(suite.dictionaries)), lambda x: x)
    recovered = {}
    for site, dictionary in progress(list(suite.dictionaries.items()), "loss recovered"):
        zeroed = loss(site, torch.zeros_like)
        kept = loss(site, partial(rebuilt, dictionary=dictionary))
        recovered[site] = (zeroed - kept) / (zeroed - clean)
    return recovered


def measure_flow(
    table: "pd.DataFrame", activations: FeatureActivations, found: "pd.DataFrame"
) -> "pd.DataFrame":
    """Flow against chance, for every layer from 1 on.

    Args:
        table: One row a feature, as `matching.scores` gives.
        activations: Activations on text never trained on.
        found: Occurrences, as `groups.occurrences` gives.

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
    sites = [site for site in suite.dictionaries if site.module == "res"]
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
    for site in suite.dictionaries:
        often = np.bincount(
            activations.by_site[site].tocoo().col, minlength=suite.dictionary(site).width
        )
        order = np.argsort(often, kind="stable")[(often == 0).sum() :]
        for share in (1 / 3, 2 / 3) if len(order) else ():
            feature = FeatureId(site.layer, site.module, int(order[int(share * len(order))]))
            writes = written_tokens(suite, feature, 8)["token"]
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


def measure(
    suite: "Suite", tokens: Tokens, k: int = 1, seed: int = 0
) -> tuple[list[Bar], "dict[str, pd.DataFrame]"]:
    """All figures of a suite on text it never saw, and the tables behind them."""
    nats, bits = bits_per_byte(suite, tokens)
    sites = measure_dictionaries(suite, tokens)
    activations = collect_tokens(suite, tokens)
    table = scores(match_table(suite, k, seed))
    found = occurrences(table, activations)
    flow = measure_flow(table, activations, found)
    sampled = found["token_row"].isin(sample_tokens(activations, seed=seed))
    tests = share_significant(significance(found[sampled]))
    themes = measure_themes(suite, seed)
    residual = sites["site"].str.endswith("/res")
    bars = [
        Bar("bits per byte", bits, 1.70, at_least=False),
        Bar("nats per token", nats),
        Bar("L0 / d_model, highest site", sites["l0_share_of_d"].max(), 0.08, at_least=False),
        Bar(
            "explained variance, lowest res", sites.loc[residual, "explained_variance"].min(), 0.75
        ),
        Bar(
            "explained variance, lowest mlp, att",
            sites.loc[~residual, "explained_variance"].min(),
            0.65,
        ),
        Bar("dead share, highest site", sites["dead_share"].max(), 0.10, at_least=False),
        Bar("loss recovered, lowest res", sites.loc[residual, "loss_recovered"].min(), 0.90),
        Bar("s(R) above null, layer 1", flow["s_res_above_null"].iloc[0], 0.80),
        Bar("s(R) above null, lowest later layer", flow["s_res_above_null"].iloc[1:].min(), 0.92),
        Bar("s(M) or s(A) above null, mean of layers", flow["module_above_null"].mean(), 0.22),
        Bar("residual predecessor active, all occurrences", found["res"].mean(), 0.45),
        Bar("… against chance, lowest layer", flow["ratio"].min(), 5.0),
        *(
            Bar(f"significant tests, {name}, one active (AO)", row["AO"], 0.85)
            for name, row in tests.iterrows()
        ),
        *(
            Bar(f"… {name}, AO − both inactive (IB)", row["AO"] - row["IB"], 0.0)
            for name, row in tests.iterrows()
        ),
        Bar("subjects told apart, AUC ≥ 0.75", float((themes["auc_held_out"] >= 0.75).sum()), 8),
    ]
    tables = {
        "sites": sites,
        "flow": flow,
        "tests": tests.reset_index(),
        "themes": themes,
        "examples": example_features(suite, activations),
    }
    return bars, tables


Measured = tuple[list[Bar], "dict[str, pd.DataFrame]"]

LOCAL = "the passages and held-out modules of the standard library"
HELD_OUT = "held-out documents of the training mix"


def measured_bars(name: str, rows: Path | None = None, write: bool = False) -> dict[str, list[Bar]]:
    """Measure a suite on text it never saw.

    Args:
        name: A suite.
        rows: The folder of its training, whose held-out rows are then used as well.
        write: Whether to write `card.md` and `card.json` into the suite's folder.

    Returns:
        The figures, by the text they were measured on.
    """
    from flowhelpers.recipe import held_out_rows
    from flowhelpers.suites import load_suite

    suite = load_suite(name)
    measured: dict[str, Measured] = {}
    if rows:
        measured[HELD_OUT] = measure(suite, row_tokens(suite, held_out_rows(rows)))
    measured[LOCAL] = measure(suite, local_tokens(suite))
    if write:
        if suite.row.folder is None:
            raise ValueError(f"suite {suite.name} is no folder: there is no place for its card")
        write_card(suite.row.folder, measured)
    return {text: bars for text, (bars, _) in measured.items()}


def stored_bars(name: str) -> dict[str, list[Bar]]:
    """The figures of the card that a suite's folder holds.

    Raises:
        FileNotFoundError: If it has none.
    """
    from flowhelpers.suites import find_suite

    row = find_suite(name)
    path = row.folder / "card.json" if row.folder else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"suite {row.name} has no card; `card {name} --measure` measures it"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    return {text: [Bar(**bar) for bar in found["bars"]] for text, found in record.items()}


def write_card(folder: Path, measured: "Mapping[str, Measured]") -> None:
    """Write `card.md` and `card.json` into a suite's folder.

    Args:
        folder: The suite's folder; its `about.md`, if there is one, comes before the figures.
        measured: For each text it was measured on, what `measure` gave.
    """
    about = folder / "about.md"
    lines = [about.read_text(encoding="utf-8").strip() if about.is_file() else "# Model card"]
    for name, (bars, tables) in measured.items():
        lines += ["", f"## Measured on {name}", ""]
        lines += ["| figure | value | asked | |", "| --- | --- | --- | --- |"]
        for bar in bars:
            lines.append(
                f"| {bar.name} | {bar.value:.3f} | {bar.asks} | {'' if bar.met else 'missed'} |"
            )
        for title, table in tables.items():
            lines += ["", f"### {TITLES[title]}", "", _markdown(table)]
    record = {
        name: {
            "bars": [asdict(bar) for bar in bars],
            "tables": {title: table.to_dict("records") for title, table in tables.items()},
        }
        for name, (bars, tables) in measured.items()
    }
    write_text(folder / "card.md", "\n".join(lines) + "\n")
    write_json(folder / "card.json", record)


def _markdown(table: "pd.DataFrame") -> str:
    def cell(value: object) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", "\\n")

    rows = [list(table.columns), ["---"] * table.shape[1], *table.astype(object).values.tolist()]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)
