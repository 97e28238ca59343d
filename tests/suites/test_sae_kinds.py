"""Whatever kind of SAE sae-lens saves: what it encodes, writes and loses is what sae-lens says."""

from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from sae_lens import SAE as LensSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from flowhelpers.core.features import FeatureId, Site
from flowhelpers.interventions.edits import rescale
from flowhelpers.suites.saes import SAE, make_sae

SITE, D, FEATURES, TOKENS = Site(1, "res"), toys.D_MODEL, 48, 12
HOOK = "blocks.1.hook_resid_post"
NORMS = (
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "constant_scalar_rescale",
    "expected_average_only_in",
    "covariance_whitening",
)
OF_KIND: dict[str, dict[str, Any]] = {
    "topk": {"k": 6},
    "abstopk": {"k": 6},
    "batchtopk": {"k": 6},
    "matryoshka_batchtopk": {"k": 6, "matryoshka_widths": [16, FEATURES]},
    "matching_pursuit": {"max_iterations": 6},
    "temporal": {"n_heads": 2, "bottleneck_factor": 8, "activation_normalization_factor": 0.3},
}


def configurations() -> list[Any]:
    """Every configuration that sae-lens accepts: of SAEs, and of those in training."""
    found = []
    registries = [SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY]
    for registry, norm, *on in product(registries, NORMS, [True, False], [True, False]):
        for kind, (_, config_class) in registry.items():
            given = {
                "normalize_activations": norm,
                "apply_b_dec_to_input": on[0],
                "rescale_acts_by_decoder_norm": on[1],
                "d_out": D,
                "decoder_init_norm": 1.0,
                **OF_KIND.get(kind, {}),
            }
            known = config_class.__dataclass_fields__
            if on[1] and "rescale_acts_by_decoder_norm" not in known:
                continue
            given = {key: value for key, value in given.items() if key in known}
            with suppress(ValueError):  # sae-lens has no such SAE
                config = config_class(d_in=D, d_sae=FEATURES, **given)
                config.metadata = SAEMetadata(hook_name=HOOK)
                train = "-train" if registry is registries[1] else ""
                name = f"{kind}{train}-{norm}{'-b_dec' * on[0]}{'-rescaled' * on[1]}"
                found.append(pytest.param(registry[kind][0], config, id=name))
    return found


def save_random(sae_class: Any, config: Any, folder: Path) -> Any:
    """Saves an SAE of random weights, as sae-lens saves it for inference; rows of many norms."""
    lens_sae = sae_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weights in lens_sae.named_parameters():
            weights.copy_(0.3 * torch.randn(weights.shape, generator=generator))
            if name == "threshold":
                weights.abs_()
        sizes = torch.empty(FEATURES).uniform_(-1, 1, generator=generator).exp()
        if config.architecture() == "matching_pursuit":  # its steps are those of unit rows
            sizes = 1 / lens_sae.W_dec.norm(dim=1)
        lens_sae.W_dec.mul_(sizes[:, None])
        if hasattr(lens_sae, "topk_threshold"):
            lens_sae.topk_threshold.fill_(0.5)
    getattr(lens_sae, "save_inference_model", lens_sae.save_model)(folder)
    return LensSAE.load_from_disk(folder)


def scale_of(config: Any, x: torch.Tensor) -> torch.Tensor:
    """What each token was divided by before it was encoded."""
    by_kind = {
        "layer_norm": x.std(dim=-1, keepdim=True),
        "constant_norm_rescale": x.norm(dim=-1, keepdim=True) / D**0.5,
    }
    return by_kind.get(config.normalize_activations, torch.ones(len(x), 1))


def rebuilt(lens_sae: Any, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    lens_sae.encode(x)  # it keeps what its way out needs
    return lens_sae.decode(codes)


def near(this: torch.Tensor, that: torch.Tensor) -> bool:
    return bool((this - that).abs().max() <= 1e-4 * that.abs().max().clamp(min=1))


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize(("sae_class", "config"), configurations())
@torch.no_grad()
def test_every_kind_is_as_sae_lens_has_it_or_refused(
    sae_class: Any, config: Any, is_stored: bool, tmp_path: Path
):
    plain = save_random(sae_class, config, tmp_path)
    kind, norm = config.architecture(), config.normalize_activations

    def load() -> SAE:
        if is_stored:
            return toys.load_folder(tmp_path, SITE)
        return make_sae(SITE, LensSAE.load_from_disk(tmp_path), D, "planted")

    if "transcoder" in kind or norm == "covariance_whitening":
        with pytest.raises(ValueError, match=r"is a transcoder|directions of whitened activations"):
            load()
        return
    sae, rows = load(), plain.W_dec
    assert torch.allclose(sae.directions, rows / rows.norm(dim=1, keepdim=True), atol=1e-6)
    x = 3 * torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1)) + 0.5
    if kind == "temporal" or norm == "expected_average_only_in":
        words = rf"the SAE for 1/res \(.*cannot encode tokens one by one|trained on .* {norm}"
        with pytest.raises(ValueError, match=words):
            sae.encode(x)
        return

    in_own_units, scale = plain.encode(x), scale_of(config, x)
    codes, whole = sae.encode(x), rebuilt(plain, x, in_own_units)
    assert (codes != 0).any(dim=1).all()
    assert near(codes, in_own_units * scale)
    assert near(sae.decode(codes, x), whole)
    for token in range(0, TOKENS, 3):
        f = int(codes[token].abs().argmax())
        without = in_own_units.clone()
        without[:, f] = 0
        truth = (whole - rebuilt(plain, x, without))[token]
        feature = FeatureId(1, "res", f)
        assert near(sae.contribution(feature, codes[token, f]), truth)
        assert near(codes[token, f] * sae.decoder_rows(torch.tensor([f]))[0], truth)
        edit = rescale(sae, [feature], 0.0)
        assert near((x - edit.change(x[None])[0])[token], truth)
    check_weights(sae, plain, x, in_own_units, whole)


def check_weights(
    sae: SAE, plain: Any, x: torch.Tensor, in_own_units: torch.Tensor, whole: torch.Tensor
) -> None:
    """Weights, folded or not, give what sae-lens gives; or what is lacking is said."""
    kind = plain.cfg.architecture()
    if kind in ("gated", "matching_pursuit"):
        lacking = "b_enc: it can" if kind == "gated" else "W_enc and no b_enc: it can"
        with pytest.raises(ValueError, match=rf"\(architecture {kind}, norm.* has no {lacking}"):
            sae.weights()
        return
    folds = [False, True] if kind == "jumprelu" and not sae.normalises_tokens else [False]
    if len(folds) == 1:
        with pytest.raises(
            ValueError, match=rf"\(architecture {kind}, norm.* has no thresholds to fold"
        ):
            sae.weights(folded=True)
    for folded in folds:
        weights = sae.weights(folded)
        before = plain.run_time_activation_norm_fn_in(x) @ weights.encoder.T + weights.bias
        codes = before * (before > weights.threshold)
        if kind == "topk":
            codes = before.relu() * (before >= before.topk(6).values[:, -1:])
        if kind == "abstopk":
            codes = before * (before.abs() >= before.abs().topk(6).values[:, -1:])
        assert near(
            plain.run_time_activation_norm_fn_out(codes @ weights.decoder + plain.b_dec), whole
        )
        assert near(codes * plain.threshold if folded else codes, in_own_units)
