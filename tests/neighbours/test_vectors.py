"""Vectors of planted features: those of the theme come in, those of the texts' rest do not."""

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from scipy.sparse import csr_matrix

from flowhelpers import neighbours
from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.suites.saes import SAE, make_sae

SITE = Site(0, "res")
FEATURES, TEXTS, LENGTH = 40, 20, 50
THEME, LOUD, OFTEN, OTHER, ALWAYS = range(5)


@pytest.fixture(scope="module")
def sae() -> SAE:
    rows = torch.eye(FEATURES, toys.D_MODEL)
    rows[toys.D_MODEL :] = torch.eye(toys.D_MODEL)[: FEATURES - toys.D_MODEL]
    return make_sae(SITE, toys.write_lens_sae(2 * rows, SITE), toys.D_MODEL, "planted")


@pytest.fixture(scope="module")
def contrast() -> pd.DataFrame:
    """Of half of the texts each; THEME is louder there and more often, LOUD louder only."""
    rng = np.random.default_rng(0)
    is_on = np.arange(TEXTS) < TEXTS // 2
    token_on = is_on.repeat(LENGTH)
    codes = np.zeros((TEXTS * LENGTH, FEATURES))
    some = rng.random(codes.shape) < 0.1
    codes[:, 5:39] = some[:, 5:39] * 0.1
    codes[:, THEME] = np.where(token_on, some[:, THEME] | (rng.random(1000) < 0.4), 0) * 2.0
    codes[:, LOUD] = some[:, LOUD] * np.where(token_on, 5.0, 0.5)
    codes[:, OFTEN] = np.where(token_on, 0.02, some[:, OFTEN] * 0.1)
    codes[:, OTHER] = np.where(token_on, 0, some[:, OTHER] * 3.0)
    codes[:, ALWAYS] = 1.0
    tokens = pd.DataFrame({"text": np.arange(TEXTS).repeat(LENGTH)})
    return neighbours.contrasts(FeatureActivations(tokens, {SITE: csr_matrix(codes)}), SITE, is_on)


def test_contrasts_by_hand(contrast: pd.DataFrame):
    assert contrast.loc[ALWAYS, ["amplitude", "frequency", "information"]].abs().max() < 1e-12
    assert not contrast.isna().any(axis=None)
    assert contrast.loc[THEME, "off"] == 0
    assert contrast.loc[OTHER, "amplitude"] < 0
    share = contrast.loc[THEME, "on"] / 2
    assert contrast.loc[THEME, "frequency"] == pytest.approx(share)
    assert contrast.loc[THEME, "added"] == pytest.approx(contrast.loc[THEME, "on"])
    assert contrast.loc[39, "active"] == 0
    # OTHER is active at a share of the other texts' tokens, and then above its mean there.
    assert contrast.loc[OTHER, "taken"] == pytest.approx(
        contrast.loc[OTHER, "off"] * -contrast.loc[OTHER, "frequency"]
    )
    on = contrast.loc[LOUD, "on"]
    share_off = on / 5 - contrast.loc[LOUD, "frequency"]
    expected = on * (1 - share_off) + max(on - 0.5, 0) * share_off
    assert contrast.loc[LOUD, "added"] == pytest.approx(expected)
    h = [-p * np.log(p) - (1 - p) * np.log(1 - p) for p in (share / 2, share)]
    assert contrast.loc[THEME, "information"] == pytest.approx(h[0] - h[1] / 2)
    with pytest.raises(ValueError, match="expected texts on the theme and others"):
        neighbours.contrasts(
            FeatureActivations(pd.DataFrame({"text": [0]}), {SITE: csr_matrix(np.ones((1, 1)))}),
            SITE,
            [True],
        )


def test_atoms_differ_both_in_amplitude_and_in_frequency_and_in_one_direction(
    sae: SAE, contrast: pd.DataFrame
):
    vector = neighbours.target_atoms(sae, contrast, top=0.06)
    for atom in (THEME, OTHER):  # more of the theme, and less
        assert vector[atom] == pytest.approx(2 * contrast.loc[atom, "amplitude"])
    assert vector[LOUD] == vector[OFTEN] == vector[ALWAYS] == 0
    against = contrast.copy()
    against.loc[THEME, "frequency"] *= -1
    assert neighbours.target_atoms(sae, against, top=0.06)[THEME] == 0


def test_functional_activations_come_up_on_the_theme_and_go_down_off_it(
    sae: SAE, contrast: pd.DataFrame
):
    vector = neighbours.functional_vector(sae, contrast, k=3)
    assert vector[THEME] == pytest.approx(2 * contrast.loc[THEME, "added"])
    assert vector[OTHER] == pytest.approx(-2 * contrast.loc[OTHER, "taken"])
    assert vector[ALWAYS] == 0
    assert int((vector != 0).sum()) <= 3


def test_a_refined_vector_loses_what_is_irrelevant_and_gains_what_is_near(
    sae: SAE, contrast: pd.DataFrame
):
    contrast = contrast.copy()
    contrast.loc[32, ["amplitude", "active"]] = 0  # never active; its direction is THEME's own
    amplitude = contrast["amplitude"].to_numpy(float)
    rows = sae.decoder_rows(torch.arange(FEATURES)).float()
    raw = torch.tensor(amplitude).float() @ rows + 7 * torch.eye(toys.D_MODEL)[20]
    relevance = np.where(np.arange(FEATURES) == THEME, 0.9, 0.5)
    refined = neighbours.refined_vector(sae, raw, contrast.assign(active=1), relevance)
    expected = 2 * amplitude[THEME]
    assert refined[THEME] == pytest.approx(expected, rel=1e-5)
    assert refined[20] == pytest.approx(7, abs=1e-5)  # what no feature explains stays
    assert refined[LOUD].abs() < 1e-5
    gained = neighbours.refined_vector(sae, raw, contrast, relevance)
    assert gained[THEME] == pytest.approx(2 * expected, rel=1e-5)


def test_what_is_near_comes_in_by_its_cosine_and_what_is_not_stays_out():
    rows = torch.eye(4, toys.D_MODEL)
    rows[2, :3] = torch.tensor([0.6, 0, 0.8])  # of the first, which is relevant
    rows[3, :4] = torch.tensor([0.3, 0, 0, 0.91**0.5])
    sae = make_sae(SITE, toys.write_lens_sae(rows, SITE), toys.D_MODEL, "planted")
    contrast = pd.DataFrame({"amplitude": [2.0, 0, 0, 0], "active": [5, 5, 0, 0]})
    change = neighbours.refined_vector(sae, torch.zeros(toys.D_MODEL), contrast, [0.9, 0, 0, 0])
    torch.testing.assert_close(change, 0.6 * 2.0 * rows[2])


def test_where_nothing_is_left_it_says_so(sae: SAE, contrast: pd.DataFrame):
    with pytest.raises(ValueError, match="no feature of 0/res is left"):
        neighbours.target_atoms(sae, contrast.assign(amplitude=0.0))
