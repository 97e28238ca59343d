"""A feature that is planted on a theme is found, and what its choice is worth is measured apart."""

from typing import Any

import numpy as np
import pytest
import toys

from flowhelpers.activations.corpora import subjects
from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.steering import themes
from flowhelpers.steering.judge_embedded import EmbeddedJudge
from flowhelpers.steering.judge_endpoint import PROMPTS, EndpointJudge
from flowhelpers.steering.themes import LETTERS, PAPER, judge_of, theme_features, theme_of
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
    # Features of all sites stand in one table.
    table = theme_features(read, OF, "space")
    assert table["feature"].tolist()[:4] == ["1/res/2", "1/res/4", "1/res/1", "0/mlp/2"]
    row = table.iloc[3]
    assert (len(table), row["layer"], row["module"]) == (11, 0, "mlp")
    expected = [1 - 1 / 8, 4 / 6, 0.5]
    assert row[["auc", "share", "auc_other"]].tolist() == pytest.approx(expected)
    assert theme_features(read, OF, "sea", iter([OTHER, SITE]))["feature"][0] == "0/mlp/1"

    with pytest.raises(ValueError, match="unknown theme 'spcae'; did you mean 'space'"):
        theme_features(read, OF, "spcae")
    with pytest.raises(ValueError, match="0 texts are on the subject"):
        theme_features(read, OF, "weather")


def test_themes_are_those_of_the_paper_or_of_the_passages():
    assert theme_of("Wedding and marriage") == ("Wedding and marriage", "weddings")
    assert theme_of("weddings") == ("weddings", "weddings")
    assert set(PAPER.values()) <= set(subjects())
    asked = PROMPTS["suppress"][0]  # the paper's prompt has its own letter for each name
    for name, subject in PAPER.items():
        assert (f"{LETTERS.get(subject)}) ** {name} **" in asked) == (subject in LETTERS)
    with pytest.raises(
        ValueError, match="unknown theme 'Weding and marriage'; did you mean 'Wedding and marriage'"
    ):
        theme_of("Weding and marriage")


def test_the_judge_of_a_theme_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    model = object.__new__(Model)
    wedding, physics = theme_of("Wedding and marriage"), theme_of("particle_physics")
    for maker, kind in (("EndpointJudge", EndpointJudge), ("embedded_judge", EmbeddedJudge)):

        def made(*given: Any, kind: type = kind, **named: Any) -> Any:
            asked.append((kind, given, named))
            return object.__new__(kind)

        monkeypatch.setattr(themes, maker, made)
    judge_of(wedding, model, seed=3)
    judge_of(wedding, model, "endpoint", model="small")
    judge_of(physics, model, "endpoint", "suppress", base_url="here")
    assert asked == [
        (EmbeddedJudge, (model, "weddings", 3), {}),
        (EndpointJudge, ("Wedding and marriage", "promote"), {"subject": None, "model": "small"}),
        (EndpointJudge, (physics.name, "suppress"), {"subject": "b", "base_url": "here"}),
    ]
    with pytest.raises(ValueError, match="unknown judge 'embeded'; did you mean 'embedded'"):
        judge_of(wedding, model, "embeded")
