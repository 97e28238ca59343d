"""What a feature is about: the tokens it writes, and where it is active."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import FeatureId, Site, suggestion
from flowhelpers.suites.model import final_norm, token_strings

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite


@torch.no_grad()
def logit_lens(
    suite: "Suite", site: Site, indices: Int[Tensor, "features"]
) -> Float[Tensor, "features vocabulary"]:
    """The logits that directions of an SAE give by themselves, through the final norm.

    Raises:
        ValueError: If a row was excluded.
    """
    model = suite.model
    sae = suite.sae(site)
    features = (FeatureId(site.layer, site.module, index) for index in indices.tolist())
    directions = torch.stack([sae.direction(feature) for feature in features])
    directions = directions.to(model.unembedding)
    # Without the bias that a norm may have: it writes the same tokens for every feature.
    bias = final_norm(model, torch.zeros_like(directions[:1]))
    return (final_norm(model, directions) - bias) @ model.unembedding


@torch.no_grad()
def top_logit_tokens(suite: "Suite", feature: FeatureId | str, k: int = 10) -> "pd.DataFrame":
    """The tokens that a feature's direction makes most likely (logit lens through the final norm).

    Returns:
        `token` and `logit` of the k highest, best first; logits relative to their mean over the
        vocabulary, for a direction of the norm that the final norm expects.
    """
    import pandas as pd

    feature = suite.feature(feature)
    logits = logit_lens(suite, feature.site, torch.tensor([feature.index]))[0]
    model = suite.model
    top = (logits - logits.mean()).float().topk(k)
    return pd.DataFrame(
        {"token": token_strings(model, top.indices.tolist()), "logit": top.values.cpu().numpy()}
    )


def top_tokens(
    suite: "Suite", feature: FeatureId | str, activations: FeatureActivations, k: int = 10
) -> "pd.DataFrame":
    """The tokens of a corpus at which a feature is most active, each token once.

    Returns:
        `token`, `activation` (the highest at that token), `count` (how often it is active there).
    """
    import pandas as pd

    feature = suite.feature(feature)
    values = activations.of(feature)
    active = np.flatnonzero(values)
    found = pd.DataFrame(
        {"id": activations.tokens["token"].to_numpy()[active], "activation": values[active]}
    )
    best = found.groupby("id")["activation"].agg(["max", "size"]).nlargest(k, "max")
    return pd.DataFrame(
        {
            "token": token_strings(suite.model, best.index.tolist()),
            "activation": best["max"].to_numpy(),
            "count": best["size"].to_numpy(),
        }
    )


def top_contexts(
    suite: "Suite",
    feature: FeatureId | str,
    activations: FeatureActivations,
    k: int = 5,
    width: int = 8,
) -> "pd.DataFrame":
    """The places of a corpus where a feature is most active, at most one for each text.

    Returns:
        `text` (its number), `activation`, and the tokens `before`, `token`, `after`.
    """
    import pandas as pd

    feature = suite.feature(feature)
    values = activations.of(feature)
    frame = activations.tokens.assign(activation=values)
    frame = frame[frame["activation"] > 0].sort_values("activation", ascending=False)
    rows = []
    ids = activations.tokens["token"].to_numpy()
    texts = activations.tokens["text"].to_numpy()
    for row, place in frame.drop_duplicates("text").head(k).iterrows():
        span = np.arange(max(0, row - width), min(len(ids), row + width + 1))
        span = span[texts[span] == place["text"]]
        decode = suite.model.tokenizer.decode
        rows.append(
            {
                "text": int(place["text"]),
                "activation": float(place["activation"]),
                "before": decode(ids[span[span < row]].tolist()),
                "token": decode([int(ids[row])]),
                "after": decode(ids[span[span > row]].tolist()),
            }
        )
    return pd.DataFrame(rows, columns=["text", "activation", "before", "token", "after"])


def describe_features(
    suite: "Suite",
    features: Iterable[FeatureId | str],
    activations: FeatureActivations | None = None,
    k: int = 4,
    own: "pd.DataFrame | None" = None,
    writes: bool = True,
) -> "pd.DataFrame":
    """Labels: your own where you have them, else what features write and where they are active.

    With `writes=False` and no activations, no model is needed and none is loaded.

    Args:
        suite: The suite.
        features: The features.
        activations: Activations on a corpus; without them only what features write is known.
        k: How many tokens of each kind.
        own: Labels that come before all others, as `read_labels` and
            `on_neuronpedia.neuronpedia_labels` give; of several for a feature the last.
        writes: Whether to say what features write, for which the model is needed.

    Returns:
        `feature`, `writes`, `active_at` (empty if unknown), `label`, which holds both, one a line,
        or your own, and `label_from`, which says where the label comes from. A feature of which
        nothing is known has an empty label, from nowhere.
    """
    import pandas as pd

    found = [suite.feature(feature) for feature in features]
    mine = {}
    if own is not None:
        rows = own[own["feature"].isin([str(feature) for feature in found])]
        labels = zip(rows["label"], rows["label_from"], strict=True)
        mine = dict(zip(rows["feature"], labels, strict=True))
    rows = []
    for feature in found:
        written, reads, lines, sources = "", "", [], []
        if writes:
            written = _listed(top_logit_tokens(suite, feature, k)["token"])
            lines.append(f"writes {written}")
            sources.append("logit lens")
        if activations and feature.site in activations.by_site:
            reads = _listed(top_tokens(suite, feature, activations, k)["token"])
            lines.append(f"active at {reads or 'nothing read'}")
            sources.append("top tokens")
        label, source = "\n".join(lines), " and ".join(sources)
        label, source = mine.get(str(feature), (label, source))
        rows.append((str(feature), written, reads, label, source))
    return pd.DataFrame(rows, columns=["feature", "writes", "active_at", "label", "label_from"])


def _read_jsonl(path: Path) -> "pd.DataFrame":
    import pandas as pd

    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {row!r}, expected an object")
    return pd.DataFrame(rows, dtype=object)


def read_labels(path: str | Path, suite: "Suite") -> "pd.DataFrame":
    """Your own labels: a CSV or JSONL file with a `feature` and a `label` for each row.

    Returns:
        `feature`, `label` and `label_from`, the file's name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, lacks a column, or names a feature that the
            suite does not have, or one twice.
    """
    import pandas as pd

    path = Path(path)
    readers = {
        ".csv": partial(pd.read_csv, dtype=str, keep_default_na=False),
        ".jsonl": _read_jsonl,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a file of labels, .csv or .jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        table = readers[path.suffix](path)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    for column in ("feature", "label"):
        if column not in table:
            raise ValueError(f"{path} has no column {column!r}{suggestion(column, table.columns)}")
    problems, names = [], []
    for row, (name, label) in enumerate(zip(table["feature"], table["label"], strict=True), 1):
        try:
            names.append(str(suite.feature(str(name))))
            if not isinstance(label, str) or not label.strip():
                raise ValueError(f"the label of {name} is {label!r}, expected text")
        except ValueError as error:
            problems.append(f"row {row}: {error}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: " + "; ".join(problems[:3]) + more)
    table = table[["feature", "label"]].assign(feature=names)
    twice = table["feature"][table["feature"].duplicated()]
    if len(twice):
        raise ValueError(f"{path} labels {twice.iloc[0]} more than once")
    return table.assign(label_from=path.name)


def subject_scores(
    activations: FeatureActivations, site: Site, on_subject: np.ndarray, counted: np.ndarray
) -> "pd.DataFrame":
    """How well each feature tells the texts on one subject from others, by its mean activation.

    Args:
        activations: Activations on texts of several subjects.
        site: The site whose features are asked for.
        on_subject: For each text, whether it is on the subject.
        counted: For each text, whether it counts; the others can serve as a test.

    Returns:
        One row a feature: `auc`, the chance that a text on the subject has more of it than another
        text (0.5 for a feature that cannot tell), and `share` of its activation that is on the
        subject.

    Raises:
        ValueError: If all of the texts that count are on the subject, or none is.
    """
    import pandas as pd
    from scipy.sparse import csr_matrix

    mine = on_subject[counted]
    text = activations.tokens["text"].to_numpy()
    members = csr_matrix((np.ones(len(text)), (text, np.arange(len(text)))))
    lengths = np.maximum(np.bincount(text, minlength=len(counted)), 1)[:, None]
    means = ((members @ activations.by_site[site]).toarray() / lengths)[counted]
    total = means.sum(axis=0)
    return pd.DataFrame(
        {
            "auc": auc(means, mine),
            "share": means[mine].sum(axis=0) / np.where(total > 0, total, 1),
        }
    )


def auc(values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """For each column, the chance that a positive row has more of it than another (ties: half).

    Args:
        values: `[rows, columns]`.
        positive: For each row, whether it is positive.

    Raises:
        ValueError: If all rows are positive, or none is.
    """
    from scipy.stats import rankdata

    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        raise ValueError(f"{n} rows are positive and {m} are not: expected some of each")
    ranks = rankdata(values, axis=0)[positive].sum(axis=0)
    return (ranks - n * (n + 1) / 2) / (n * m)


def _listed(tokens: Iterable[str]) -> str:
    stripped = [(token, token.strip()) for token in tokens]
    return ", ".join(bare if bare and bare.isprintable() else repr(t) for t, bare in stripped)
