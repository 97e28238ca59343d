"""A feature that is planted on a theme is found, and what its choice is worth is measured apart."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import toys
from scipy.sparse import csr_matrix

from flowhelpers.activations.corpora import subjects
from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.flow.graph import flow_graph, keep_nodes
from flowhelpers.matching.table import match_table
from flowhelpers.steering import themes
from flowhelpers.steering.judge_embedded import EmbeddedJudge
from flowhelpers.steering.judge_endpoint import PROMPTS, EndpointJudge
from flowhelpers.steering.themes import (
    PAPER,
    Theme,
    clearest_themes,
    judge_of,
    theme_features,
    theme_of,
)
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Model

SITE, OTHER = Site(1, "res"), Site(0, "mlp")
# Passages of three subjects in no order, eight of each.
OF = ["sea", "space", "war", "war", "sea", "space"] * 4
EACH = 8  # tokens of a passage


def numbers(subject: str, half: int | None = None) -> list[int]:
    """The passages on a subject; of a half, every second, from the first (0) or second (1)."""
    found = [number for number, name in enumerate(OF) if name == subject]
    return found if half is None else found[half::2]


@pytest.fixture(scope="module")
def read() -> FeatureActivations:
    """Activations of passages, by hand.

    At 1/res: 0 always active alike; 4 on all of space; 2 on the first half of space alone; 3 on the
    second half alone; 1 on all of space, and less on all of war; 5 nowhere; 6 on all but space. At
    0/mlp: 2 on the first half of space, twice as much on one of war's; 1 on all of the sea.
    """
    codes = {SITE: np.zeros((len(OF), EACH, 7)), OTHER: np.zeros((len(OF), EACH, 4))}
    res, mlp = codes[SITE], codes[OTHER]
    res[:, :, 0] = 1
    res[numbers("space"), 3, 4] = 2
    res[numbers("space", 0), :, 2] = 1
    res[numbers("space", 1), :, 3] = 1
    res[numbers("space"), 5, 1] = 3
    res[numbers("war"), 5, 1] = 1
    res[numbers("sea") + numbers("war"), 0, 6] = 1
    mlp[numbers("space", 0), 1, 2] = 1
    mlp[numbers("war", 0)[1], 1, 2] = 2
    mlp[numbers("sea"), 1, 1] = 2
    return toys.planted_activations(
        {site: made.reshape(-1, made.shape[2]).tolist() for site, made in codes.items()}
    )


def test_a_planted_feature_is_found_and_tried_on_the_other_half(read: FeatureActivations):
    table = theme_features(read, OF, "space", [SITE])
    assert list(table.columns) == [
        *("feature", "auc", "share", "auc_other", "share_other", "layer", "module")
    ]
    expected = {  # auc, share, auc_other, share_other
        "1/res/2": (1, 1, 0.5, 0),
        "1/res/4": (1, 1, 1, 1),
        "1/res/1": (1, 0.75, 1, 0.75),
        "1/res/0": (0.5, 1 / 3, 0.5, 1 / 3),
        "1/res/3": (0.5, 0, 1, 1),
        "1/res/5": (0.5, 0, 0.5, 0),
        "1/res/6": (0, 0, 0, 0),
    }
    assert table["feature"].tolist() == list(expected)
    values = table[["auc", "share", "auc_other", "share_other"]].to_numpy()
    assert values == pytest.approx(np.array(list(expected.values())))
    assert set(table["layer"]) == {1}
    assert set(table["module"]) == {"res"}


def test_features_of_all_sites_stand_in_one_table(read: FeatureActivations):
    table = theme_features(read, OF, "space")
    assert table["feature"].tolist()[:4] == ["1/res/2", "1/res/4", "1/res/1", "0/mlp/2"]
    row = table.iloc[3]
    assert (len(table), row["layer"], row["module"]) == (11, 0, "mlp")
    expected = [1 - 1 / 8, 4 / 6, 0.5]
    assert row[["auc", "share", "auc_other"]].tolist() == pytest.approx(expected)
    assert theme_features(read, OF, "sea", iter([OTHER, SITE]))["feature"][0] == "0/mlp/1"


def test_the_half_for_choosing_has_no_part_in_the_other():
    # Noise: what is best on one half is no better than chance on the other.
    rng = np.random.default_rng(0)
    of = ["space", "sea"] * 24
    tokens = pd.DataFrame({"text": np.arange(48).repeat(2), "position": 1, "token": 100})
    codes = rng.random((96, 400))
    read = FeatureActivations(tokens, {SITE: csr_matrix(codes)})
    table = theme_features(read, of, "space")
    assert table["auc"].head(8).mean() > 0.75
    assert table["auc_other"].head(40).mean() == pytest.approx(0.5, abs=0.05)


def test_a_theme_that_no_passage_is_on_is_an_error(read: FeatureActivations):
    with pytest.raises(ValueError, match="unknown theme 'spcae'; did you mean 'space'"):
        theme_features(read, OF, "spcae")
    with pytest.raises(ValueError, match="0 rows are positive"):
        theme_features(read, OF, "weather")


def test_the_clearest_themes_have_the_feature_most_their_own():
    def table(*shares: float) -> pd.DataFrame:
        return pd.DataFrame({"share_other": shares, "share": [1.0] * len(shares)})

    features = {
        "sea": table(0.2, 0.5, 0.1),
        "war": table(0.1, 0.2, 0.9),  # too far down
        "law": table(0.6, 0.0, 1.0),
        "art": table(0.5, 0.5, 0.0),
        "rain": table(0.3, 0.1, 0.0),
    }
    assert clearest_themes(features, 3, best=2) == ["law", "sea", "art"]
    assert clearest_themes(features, 9, best=2) == ["law", "sea", "art", "rain", "war"]
    assert clearest_themes(features, 2, best=3) == ["law", "war"]
    assert clearest_themes(features, 2) == ["law", "war"]


def test_themes_are_those_of_the_paper_or_of_the_passages():
    assert theme_of("Wedding") == Theme("Wedding", "weddings")
    assert theme_of("weddings") == Theme("weddings", "weddings")
    for name, theme in PAPER.items():
        assert theme_of(name) == theme
        assert theme.name == name
        assert theme.subject in subjects()
        # The paper's prompt has this name for the letter.
        named = f"{theme.letter}) ** {name} **"
        assert not theme.letter or named in PROMPTS["suppress"][0]
    letters = {name: theme_of(name).letter for name in subjects()}
    assert {name: letter for name, letter in letters.items() if letter} == {
        "particle_physics": "b",
        "experiments": "c",
    }
    with pytest.raises(ValueError, match="unknown theme 'Weding'; did you mean 'Wedding'"):
        theme_of("Weding")


def test_the_judge_of_a_theme_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def stand_in(kind: type) -> Callable[..., Any]:
        def made(*given: Any, **named: Any) -> Any:
            asked.append((kind, given, named))
            return object.__new__(kind)

        return made

    monkeypatch.setattr(themes, "EndpointJudge", stand_in(EndpointJudge))
    monkeypatch.setattr(themes, "embedded_judge", stand_in(EmbeddedJudge))
    model = object.__new__(Model)
    physics, wedding = theme_of("Scientific concepts and entities"), theme_of("Wedding")
    assert isinstance(judge_of(wedding, model, seed=3), EmbeddedJudge)
    assert isinstance(judge_of(wedding, model, "endpoint", model="small"), EndpointJudge)
    judge_of(physics, model, "endpoint", "suppress", base_url="here")
    judge_of(physics, model, "endpoint", "promote")
    judge_of(wedding, model, "embedded", "suppress")
    assert asked == [
        (EmbeddedJudge, (model, "weddings", 3), {}),
        (EndpointJudge, ("Wedding", "promote"), {"subject": None, "model": "small"}),
        (EndpointJudge, (physics.name, "suppress"), {"subject": "b", "base_url": "here"}),
        (EndpointJudge, (physics.name, "promote"), {"subject": None}),
        (EmbeddedJudge, (model, "weddings", 0), {}),
    ]
    with pytest.raises(ValueError, match="unknown judge 'embeded'; did you mean 'embedded'"):
        judge_of(wedding, model, "embeded")
    with pytest.raises(ValueError, match="does not ask for Wedding: Scientific concepts and ent"):
        judge_of(wedding, model, "endpoint", "suppress")


def test_nodes_that_are_not_on_the_theme_go_with_their_edges_and_seeds_stay(planted: Suite):
    graph = flow_graph(planted, "1/res/3", match_table(planted, k=2))
    names = graph.nodes["feature"].tolist()
    gone = next(n for n in names if n.startswith("1/") and n not in graph.seeds)
    ends = (graph.edges["source"] == gone) | (graph.edges["target"] == gone)
    assert 0 < ends.sum() < len(graph.edges)
    left = keep_nodes(graph, (name for name in names if name != gone))
    assert left.nodes["feature"].tolist() == [name for name in names if name != gone]
    assert left.edges.equals(graph.edges[~ends].reset_index(drop=True))
    assert (left.suite, left.seeds, left.choices) == (graph.suite, graph.seeds, graph.choices)
    alone = keep_nodes(graph, [])
    assert alone.nodes["feature"].tolist() == ["1/res/3"]
    assert alone.edges.empty
