"""Far matches, on the planted suite: the chain is known, and so is the direct match."""

import numpy as np
import pytest
import torch
import toys

from flowhelpers.core.features import Site
from flowhelpers.flow.far import far_matches
from flowhelpers.matching.null import null_cosines, null_threshold
from flowhelpers.matching.table import match_table


def test_the_chain_and_the_direct_match_are_those_that_were_planted():
    suite = toys.bare_suite()
    far = far_matches(suite, match_table(suite, k=1), 0, 2)
    assert far["chain_end"].tolist() == toys.COORDINATE[2]
    assert far["direct"].tolist() == toys.COORDINATE[2]
    assert far["chain_cosine"].to_numpy() == pytest.approx(np.full(toys.RES, 0.28), abs=1e-6)
    assert far["direct_cosine"].to_numpy() == pytest.approx(np.full(toys.RES, 0.28), abs=1e-6)
    assert far["product"].to_numpy() == pytest.approx(np.full(toys.RES, 0.8**2), abs=1e-6)


def test_where_steps_lead_elsewhere_both_ends_are_told_with_their_own_lines():
    axes = torch.eye(8)
    turned = 0.8 * axes[0] + 0.6 * axes[1]
    rows = {  # feature 0 of layer 2 comes from 0 of layer 0 by steps, and is nearest to 1 there
        Site(0, "res"): axes[:2],
        Site(1, "res"): torch.stack([turned, axes[5]]),
        Site(2, "res"): torch.stack([0.6 * axes[0] + 0.8 * axes[1], axes[5]]),
    }
    suite = toys.bare_suite(rows)
    far = far_matches(suite, match_table(suite, k=1), 0, 2).iloc[0]
    assert (far["chain_end"], far["direct"]) == (0, 1)
    assert (far["chain_cosine"], far["direct_cosine"]) == pytest.approx((0.6, 0.8), abs=1e-6)
    assert far["product"] == pytest.approx(0.8 * 0.96, abs=1e-6)
    chance = null_cosines(rows[Site(0, "res")]), null_cosines(rows[Site(0, "res")][:1])
    lines = [null_threshold(each) for each in chance]
    assert [far["direct_null"], far["chain_null"]] == pytest.approx(lines)
    assert lines[0] > lines[1]


def test_a_chain_that_breaks_has_no_end():
    rows = {Site(at, "res"): torch.eye(8)[at : at + 2] * (-1.0) ** at for at in range(3)}
    rows[Site(1, "res")][1] = -rows[Site(0, "res")][0]  # its best match back is none
    suite = toys.bare_suite(rows)
    far = far_matches(suite, match_table(suite, k=1), 0, 2)
    assert (far.loc[far["chain_end"] == -1, ["chain_cosine", "product"]] == 0).all(axis=None)
    assert (far["chain_end"] == -1).any()
    assert not far.loc[far["chain_end"] == -1, "steps_above"].any()
