"""What each edit does to the stream, and what is refused."""

from collections.abc import Callable

import pytest
import torch
import toys
from torch import Tensor

from flowhelpers.core.features import FeatureId, Site
from flowhelpers.interventions import edits
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Edit, Model, logits_of, run_model, tokenize
from flowhelpers.suites.saes import SAE, make_sae

SITE, D, ONE = Site(1, "res"), toys.D_MODEL, torch.tensor([0])


@pytest.fixture(scope="module")
def ids(toy: Model) -> Tensor:
    return tokenize(toy, toys.TEXTS[:3]).ids


@pytest.fixture(scope="module")
def at_z(toy: Model) -> SAE:
    return toys.sae_at_z(toy)


def feature(index: int, module: str = "res") -> FeatureId:
    return FeatureId(1, module, index)


def stream(model: Model, ids: Tensor, *made: Edit, site: Site = SITE) -> Tensor:
    return run_model(model, ids, read=[site], edits=made)[1][site]


@pytest.mark.parametrize("module", ["res", "att"])  # at attention, the SAE reads and writes z
def test_rescaling_changes_the_code_and_keeps_the_error(
    planted: Suite, at_z: SAE, ids: Tensor, module: str
):  # Trap 13.
    sae = at_z if module == "att" else planted.sae(SITE)
    x = stream(planted.model, ids, site=sae.input_site)
    codes, clean = sae.encode(x), stream(planted.model, ids, site=sae.site)
    chosen = int((codes > 0).sum((0, 1)).argmax())
    for r in (0.0, -1.5, 3.0):
        edit = edits.rescale(sae, [feature(chosen, module)], r)
        assert edit.site == sae.input_site
        changed = codes.clone()
        changed[..., chosen] *= r
        expected = sae.decode(changed) + (x - sae.decode(codes))
        assert torch.allclose(stream(planted.model, ids, edit, site=edit.site), expected, atol=1e-5)
        moved = stream(planted.model, ids, edit, site=sae.site) - clean
        assert moved.abs().max() > 1e-4


# Trap 12.
def test_r_of_one_changes_nothing_to_the_bit(planted: Suite, at_z: SAE, ids: Tensor):
    clean = logits_of(planted.model, ids)
    for sae in (planted.sae(SITE), at_z):
        features = [feature(i, sae.site.module) for i in range(sae.width)]
        edit = edits.rescale(sae, features, 1.0)
        assert torch.equal(logits_of(planted.model, ids, [edit]), clean)


def test_what_is_added_moves_the_rows_and_positions_that_are_named(toy: Model, ids: Tensor):
    batch = ids[:1].expand(4, -1)
    vectors = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    everywhere = edits.add(SITE, vectors[0], -2.5, [2, -1])
    per_row = edits.add_per_row(SITE, torch.tensor([2, 0, 2, 3]), vectors, [4])
    expected = torch.zeros(2, *batch.shape, D)
    expected[0][:, [2, -1]] = -2.5 * vectors[0]
    expected[1][[0, 3], 4] = vectors[[1, 3]]
    expected[1][2, 4] = vectors[0] + vectors[2]
    for edit, step in zip((everywhere, per_row), expected, strict=True):
        moved = stream(toy, batch, edit) - stream(toy, batch)
        assert torch.allclose(moved, step, atol=1e-5)
        assert torch.equal(moved[:, 1], torch.zeros_like(moved[:, 1]))
    assert torch.equal(moved[1], torch.zeros_like(moved[1]))


@pytest.mark.parametrize("where", ["res", "z"])
def test_each_row_is_rescaled_by_its_own_factors(
    planted: Suite, at_z: SAE, ids: Tensor, where: str
):
    sae = planted.sae(SITE) if where == "res" else at_z
    site, position = sae.input_site, 3
    codes = sae.encode(stream(planted.model, ids, site=site))[:, position]
    chosen = codes[0].topk(2).indices
    assert (codes[0, chosen] > 0).all()
    rows, factors = torch.tensor([0, 2, 2]), torch.tensor([-1.0, 0.5, 3.0])
    features = torch.stack([chosen[0], chosen[0], chosen[1]])
    edit = edits.rescale_per_row(sae, rows, features, factors, [position])
    moved = stream(planted.model, ids, edit, site=site) - stream(planted.model, ids, site=site)
    steps = ((factors - 1) * codes[rows, features])[:, None] * sae.decoder_rows(features)
    expected = torch.zeros_like(moved)
    expected[:, position] = torch.zeros_like(moved[:, position]).index_add(0, rows, steps)
    assert torch.allclose(moved, expected, atol=1e-5)


def test_an_edit_lost_to_rounding_is_an_error(toy: Model, planted: Suite, ids: Tensor):
    faint = edits.add(SITE, torch.ones(D), 1e-12)
    with pytest.raises(ValueError, match=r"at 1/res leaves \d+ tokens as they were: its step of"):
        logits_of(toy, ids, [faint])
    vectors = torch.stack([torch.ones(D), torch.full((D,), 1e-12)])
    rows = edits.add_per_row(SITE, torch.tensor([0, 1]), vectors, [2])
    with pytest.raises(ValueError, match="at 1/res leaves 1 tokens as they were"):
        logits_of(toy, ids[:2], [rows])
    nothing = edits.add(SITE, torch.ones(D), 0.0)
    assert torch.equal(logits_of(toy, ids, [nothing]), logits_of(toy, ids))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: edits.rescale(d, [feature(3)], torch.nan), "1/res is given nan: expected fini"),
        (lambda d: edits.rescale(d, [FeatureId(0, "res", 3)], 0.0), "1/res, got .'0/res/3'"),
        (lambda d: edits.add(SITE, torch.ones(D), torch.nan), "is given nan"),
        (lambda d: edits.add(SITE, torch.zeros(D), 1.0), "the vector to add at 1/res is zero"),
        (lambda d: edits.add(SITE, torch.ones(D), 1.0, []), "at 1/res names no position"),
        (lambda d: edits.add_per_row(SITE, ONE, torch.full((1, D), torch.nan)), "res is given nan"),
        (lambda d: edits.rescale_per_row(d, ONE, ONE, torch.tensor([torch.inf])), "is given inf"),
        (lambda d: edits.add(SITE, torch.ones(1), 1.0), f"1/res has width 1: expected {D}"),
        (lambda d: edits.add(SITE, torch.ones(D), 1.0, [99]), r"names .99.: the text has \d+"),
        (lambda d: edits.add_per_row(SITE, ONE, torch.ones(1, D), [-99]), "names .-99."),
    ],
)
def test_edits_that_make_no_sense_or_miss_the_stream_are_errors(
    planted: Suite, ids: Tensor, make: Callable[[SAE], Edit], message: str
):
    with pytest.raises(ValueError, match=message):
        logits_of(planted.model, ids, [make(planted.sae(SITE))])


def test_a_feature_without_direction_cannot_be_rescaled():
    rows = torch.eye(3, D)
    rows[1] = 0
    with pytest.warns(UserWarning, match="1 of 3 decoder rows"):
        holed = make_sae(SITE, toys.write_lens_sae(rows, SITE), D, "holed")
    with pytest.raises(ValueError, match="1/res/1 has no direction"):
        edits.rescale(holed, [feature(1)], 0.0)
