"""What a feature is about: the tokens it writes, and where it is active."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import FeatureId, Site
from flowhelpers.suites.model import final_norm, token_strings

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite


@torch.no_grad()
def logit_lens(
    suite: "Suite", site: Site, indices: Int[Tensor, "features"]
) -> Float[Tensor, "features vocabulary"]:
    """The logits that decoder directions give by themselves, through the final norm's gain."""
    model, sae = suite.model, suite.sae(site)
    features = (FeatureId(site.layer, site.module, index) for index in indices.tolist())
    directions = torch.stack([sae.direction(feature) for feature in features])
    directions = directions.to(model.unembedding)
    # Without the bias that a norm may have: it writes the same tokens for every feature.
    bias = final_norm(model, torch.zeros_like(directions[:1]))
    return (final_norm(model, directions) - bias) @ model.unembedding


@torch.no_grad()
def top_logit_tokens(suite: "Suite", feature: FeatureId | str, k: int = 10) -> "pd.DataFrame":
    """The tokens that a feature's direction makes most likely, by the logit lens.

    Columns `token` and `logit`, best first; logits relative to their mean over the vocabulary, for
    a direction of the norm that the final norm expects.
    """
    import pandas as pd

    feature = suite.feature(feature)
    logits = logit_lens(suite, feature.site, torch.tensor([feature.index]))[0]
    top = (logits - logits.mean()).float().topk(k)
    tokens = token_strings(suite.model, top.indices.tolist())
    return pd.DataFrame({"token": tokens, "logit": top.values.cpu().numpy()})


def top_tokens(
    suite: "Suite", feature: FeatureId | str, activations: FeatureActivations, k: int = 10
) -> "pd.DataFrame":
    """The tokens of a corpus at which a feature is most active, each token once.

    Columns `token`, `activation` (the highest there), `count` (how often it is active there).
    """
    import pandas as pd

    values = activations.of(suite.feature(feature))
    occurrences = pd.DataFrame({"id": activations.tokens["token"], "activation": values})
    by_token = occurrences[values != 0].groupby("id")["activation"]
    best = by_token.agg(activation="max", count="size").nlargest(k, "activation")
    best.insert(0, "token", token_strings(suite.model, best.index.tolist()))
    return best.reset_index(drop=True)


def top_contexts(
    suite: "Suite", feature: FeatureId | str, activations: FeatureActivations, k=5, width=8
) -> "pd.DataFrame":
    """The places of a corpus where a feature is most active, at most one for each text.

    Columns `text` (its number), `activation`, and `before`, `token`, `after`: the token and up to
    `width` tokens on each side.
    """
    import pandas as pd

    tokens = activations.tokens.assign(activation=activations.of(suite.feature(feature)))
    active = tokens[tokens["activation"] > 0].sort_values("activation", ascending=False)
    decode = suite.model.tokenizer.decode
    rows = []
    for row, place in active.drop_duplicates("text").head(k).iterrows():
        near = tokens.loc[max(0, row - width) : row + width]
        ids = near.loc[near["text"] == place["text"], "token"]
        parts = ids[ids.index < row], ids[ids.index == row], ids[ids.index > row]
        texts = (decode(part.tolist()) for part in parts)
        rows.append((int(place["text"]), float(place["activation"]), *texts))
    return pd.DataFrame(rows, columns=["text", "activation", "before", "token", "after"])


def describe_features(
    suite: "Suite",
    features: Iterable[FeatureId | str],
    activations: FeatureActivations | None = None,
    k: int = 4,
    user_labels: "pd.DataFrame | None" = None,
) -> "pd.DataFrame":
    """Labels: your own where you have them, else what features write and where they are active.

    `user_labels` are as `read_labels` and `neuronpedia_labels` give; of several for a feature the
    last counts. Columns: `feature`, `writes` (`k` tokens), `active_at` (empty without activations),
    `label`, which holds both, one a line, or your own, and `label_from`.
    """
    import pandas as pd

    known, rows = {}, []
    if user_labels is not None:
        own = user_labels.drop_duplicates("feature", keep="last").set_index("feature")
        known = own[["label", "label_from"]].T.to_dict("list")
    for feature in map(suite.feature, features):
        writes, active_at = _listed(top_logit_tokens(suite, feature, k)["token"]), ""
        label, label_from = f"writes {writes}", "logit lens"
        if activations and feature.site in activations.by_site:
            active_at = _listed(top_tokens(suite, feature, activations, k)["token"])
            label += f"\nactive at {active_at or 'nothing read'}"
            label_from += " and top tokens"
        label, label_from = known.get(str(feature), (label, label_from))
        rows.append((str(feature), writes, active_at, label, label_from))
    return pd.DataFrame(rows, columns=["feature", "writes", "active_at", "label", "label_from"])


def menu(
    suite: "Suite",
    features: Iterable[FeatureId | str],
    activations: FeatureActivations | None = None,
    user_labels: "pd.DataFrame | None" = None,
) -> list[tuple[str, str]]:
    """Features for a dropdown to offer, each once: what it says of them, and their names."""
    about = describe_features(suite, dict.fromkeys(map(str, features)), activations, 4, user_labels)
    said = about["label"].str.split("\n").str[-1]
    return list(zip(about["feature"] + ": " + said, about["feature"], strict=True))


def read_labels(path: str | Path, suite: "Suite") -> "pd.DataFrame":
    """Labels from a CSV file: `feature`, `label`, and maybe `label_from` (empty: the file's)."""
    import pandas as pd

    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not {"feature", "label"} <= {*table}:
        raise ValueError(f"{path} has the columns {', '.join(table)}: expected feature and label")
    table["feature"] = [str(suite.feature(name)) for name in table["feature"]]
    empty = table["label"].str.strip() == ""
    for problem, rows in (("is without a label", empty), ("twice", table["feature"].duplicated())):
        if rows.any():
            raise ValueError(f"{path}: {table['feature'][rows].iloc[0]} {problem}")
    said = table["label_from"] if "label_from" in table else pd.Series("", table.index)
    return table[["feature", "label"]].assign(label_from=said.mask(said == "", Path(path).name))


def subject_scores(
    activations: FeatureActivations, site: Site, on_subject: np.ndarray, counted: np.ndarray
) -> "pd.DataFrame":
    """How well each feature tells the texts on one subject from others, by its mean activation.

    `on_subject` says of each text whether it is on the subject, `counted` whether it counts. Of
    each feature, a row: `auc`, the chance that a text on the subject has more of it than another
    (0.5 if it cannot tell), and the `share` of its activation that is on the subject. All features
    are ranked at once; scikit-learn's `roc_auc_score` would take them one by one.
    """
    means = text_means(activations, site)[: len(counted)][counted]
    return auc_and_share(means, on_subject[counted])


def text_means(
    activations: FeatureActivations, site: Site, features: Sequence[int] | None = None
) -> np.ndarray:
    """The mean activation of each feature of a site, or of some, in each text."""
    from scipy.sparse import csr_matrix

    text = activations.tokens["text"].to_numpy()
    members = csr_matrix((np.ones(len(text)), (text, np.arange(len(text)))))
    codes = activations.by_site[site]
    codes = codes if features is None else codes[:, features]
    return (members @ codes).toarray() / np.maximum(np.bincount(text), 1)[:, None]


def auc_and_share(means: np.ndarray, positive: np.ndarray) -> "pd.DataFrame":
    """`auc` and `share` (of `subject_scores`) of columns of means, by which rows are on it."""
    import pandas as pd
    from scipy.stats import rankdata

    total, n, m = means.sum(axis=0), int(positive.sum()), int((~positive).sum())
    if not n or not m:
        raise ValueError(f"{n} texts are on the subject and {m} are not: expected some of each")
    share = means[positive].sum(axis=0) / np.where(total > 0, total, 1)
    ranks = rankdata(means, axis=0)[positive].sum(axis=0)  # the mean rank where some are equal
    return pd.DataFrame({"auc": (ranks - n * (n + 1) / 2) / (n * m), "share": share})


def _listed(tokens: Iterable[str]) -> str:
    stripped = [("(byte)" if "\ufffd" in token else token.strip(), token) for token in tokens]
    return ", ".join(bare if bare and bare.isprintable() else repr(t) for bare, t in stripped)
