"""Whatever kind of SAE sae-lens saves: what it encodes, writes and loses is what sae-lens says."""

import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from sae_lens import SAE as LensSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from flowhelpers.activations.sparse import collect
from flowhelpers.core.features import FeatureId, Site
from flowhelpers.interventions.edits import rescale
from flowhelpers.suites.attention import attention_output
from flowhelpers.suites.bridge import load_model
from flowhelpers.suites.load import Suite, load_suite
from flowhelpers.suites.model import Model, run_model, tokenize
from flowhelpers.suites.registry import SuiteRow
from flowhelpers.suites.sae_files import hook_names
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
        return of_memory(tmp_path)

    if "transcoder" in kind or norm == "covariance_whitening":
        with pytest.raises(ValueError, match=r"is a transcoder|is of whitened activations"):
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


def test_what_decodes_otherwise_is_refused_with_the_figure():
    lens_sae = toys.write_lens_sae(torch.randn(6, D), SITE, b_dec=100.0)
    sae, decode = make_sae(SITE, lens_sae, D, "planted"), lens_sae.decode
    lens_sae.decode = lambda codes: 2 * decode(codes)
    words = r"the SAE for 1/res \(planted\), architecture jumprelu, .* decode that is off by 50.00%"
    with pytest.raises(ValueError, match=words):
        sae.encode(torch.ones(D))
    lens_sae.decode = decode
    assert sae.encode(torch.ones(D)).shape == (6,)


def test_a_decoder_of_the_file_that_sae_lens_does_not_have_is_refused(tmp_path: Path):
    lens_sae = toys.write_lens_sae(torch.randn(6, D), SITE)
    lens_sae.save_model(tmp_path)
    sae = toys.load_folder(tmp_path, SITE)
    with torch.no_grad():
        lens_sae.W_dec[0] *= 1.25
    with pytest.raises(ValueError, match=r"off by 20.00% \(allowed 0.01%\); it can be matched"):
        replace(sae, loader=lambda: lens_sae).encode(torch.ones(D))


def test_saes_of_equal_weights_and_other_configurations_are_kept_apart():
    sae_class, config_class = SAE_CLASS_REGISTRY["topk"]
    rows, digests = torch.randn(FEATURES, D), set()
    for k in (3, 10):
        lens_sae = sae_class(config_class(d_in=D, d_sae=FEATURES, k=k))
        lens_sae.cfg.metadata.hook_name = HOOK
        lens_sae.load_state_dict({**lens_sae.state_dict(), "W_dec": rows, "W_enc": rows.T})
        digests.add(make_sae(SITE, lens_sae, D, "planted").fingerprint)
    assert len(digests) == 2


@torch.no_grad()
def test_a_file_written_anew_before_it_encodes_is_not_taken_for_the_old_one(
    toy: Model, tmp_path: Path
):
    lens_sae = toys.write_lens_sae(torch.randn(FEATURES, D), SITE)
    suite = load_suite(toys.write_suite(tmp_path, {SITE: lens_sae}, toy.name))
    lens_sae.b_enc += 1
    lens_sae.save_model(tmp_path / "1-res")
    with pytest.raises(ValueError, match=r"the SAE for 1/res .* written anew since its suite was"):
        suite.sae(SITE).encode(torch.ones(D))
    assert load_suite(tmp_path).sae(SITE).encode(torch.ones(D)).any()


@pytest.mark.parametrize("kind", ["gated", "topk", "matching_pursuit"])
@pytest.mark.parametrize("width", [FEATURES, D])
@torch.no_grad()
def test_rows_that_are_not_finite_are_silent_in_every_kind(kind: str, width: int, tmp_path: Path):
    sae_class, config_class = SAE_CLASS_REGISTRY[kind]
    given = {"k": width, "rescale_acts_by_decoder_norm": True} if kind == "topk" else {}
    config = config_class(d_in=D, d_sae=width, metadata=SAEMetadata(hook_name=HOOK), **given)
    lens_sae = sae_class(config)
    deaf = {"gated": "b_mag", "topk": "W_enc"}.get(kind)
    lens_sae.W_dec[3, 5], lens_sae.W_dec[7], lens_sae.b_dec[:] = torch.nan, 0, 0.25
    if deaf:
        getattr(lens_sae, deaf)[..., 9] = torch.inf
        getattr(lens_sae, "b_gate" if kind == "gated" else "b_enc").fill_(2.0)
    lens_sae.save_model(tmp_path)
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="not finite") as told:
        codes = [sae.encode(x) for sae in (toys.load_folder(tmp_path, SITE), of_memory(tmp_path))]
    assert len(told) == (4 if deaf else 2)
    silent = {3, 7, 9} if deaf else {3, 7}
    for found in codes:
        assert torch.isfinite(found).all()
        never = set((found == 0).all(dim=0).nonzero().flatten().tolist())
        assert silent <= never
        assert len(never) < width / 2
    assert near(*codes)


def of_memory(folder: Path) -> SAE:
    return make_sae(SITE, LensSAE.load_from_disk(folder), D, "planted")


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_in_half_precision_a_feature_writes_what_it_should(norm: str, tmp_path: Path):
    sae_class, config_class = SAE_CLASS_REGISTRY["topk"]
    given = {"rescale_acts_by_decoder_norm": True, "normalize_activations": norm}
    config = config_class(d_in=D, d_sae=FEATURES, k=6, **given)
    config.metadata = SAEMetadata(hook_name=HOOK)
    plain = save_random(sae_class, config, tmp_path)
    x = 3 * torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1)) + 0.5
    own = plain.encode(x)
    f = int(own.sum(0).argmax())
    without = own.index_fill(1, torch.tensor([f]), 0)
    truth = rebuilt(plain, x, own) - rebuilt(plain, x, without)
    for dtype in ("bfloat16", "float16"):
        sae = toys.load_folder(tmp_path, SITE, dtype=dtype)
        step = x - rescale(sae, [FeatureId(1, "res", f)], 0.0).change(x[None])[0]
        both = (own[:, f] > 0) & (sae.encode(x)[:, f] > 0)
        assert both.any()
        assert (step - truth)[both].norm() <= 2e-2 * truth[both].norm()
        assert sae.encode(x.to(sae.lens_sae.dtype)).dtype == sae.lens_sae.dtype


@torch.no_grad()
def test_a_negative_activation_is_written_and_not_active(toy: Model):
    sae_class, config_class = SAE_CLASS_REGISTRY["abstopk"]
    lens_sae = sae_class(config_class(d_in=D, d_sae=FEATURES, k=6))
    saes = {SITE: make_sae(SITE, lens_sae, D, "planted")}
    suite = Suite(SuiteRow("signed", "none", {SITE: ""}), toy, saes)
    tokens = tokenize(toy, toys.TEXTS[:2])
    x = run_model(toy, tokens.ids, [SITE])[1][SITE][tokens.is_text]
    codes = lens_sae.encode(x)
    assert (codes < 0).any()
    found = collect(suite, tokens).by_site[SITE]
    assert torch.equal(torch.from_numpy(found.toarray()), codes.relu())
    assert found.nnz == int((codes > 0).sum())


# Files, and where an SAE reads.


def folder_of(tmp_path: Path, **changed: Any) -> Path:
    """A folder of a plain SAE, with other keys in its cfg.json."""
    toys.write_lens_sae(torch.randn(6, D), SITE).save_model(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"d_out": D + 1}, rf"the SAE in .* is a transcoder, .* \(d_out: {D + 1}\)"),
        ({"metadata": {"hook_name_out": HOOK}}, r"is a transcoder, .* \(hook_name_out: blocks.1"),
        ({"architecture": "crosscoder"}, r"is a transcoder, .* \(crosscoder\)"),
        (
            {"architecture": "batchtopk"},
            r"the SAE in .* as sae-lens's save_inference_model saves them: KeyError: 'batchtopk'",
        ),
        (
            {"metadata": {"hook_layer": 2}},
            r"1/res .* was trained at blocks\.2\.: expected blocks\.1",
        ),
        ({"activation_fn_str": "tanh-relu"}, "the SAE in .* function tanh-relu: expected relu or"),
        ({"d_sae": 7}, r"the SAE in .*size mismatch for W_dec"),
        ({"architecture": "topk", "k": 7}, r"cannot encode tokens one by one: .* out of range"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told(
    changed: dict[str, Any], words: str, tmp_path: Path
):
    folder = folder_of(tmp_path, **changed)
    if "k" in changed:
        weights = load_file(folder / "sae_weights.safetensors")
        del weights["threshold"]
        save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=f"(?s){words}"):
        toys.load_folder(folder, SITE).encode(torch.ones(D))


def test_a_layer_without_a_hook_point_is_where_it_was_trained(tmp_path: Path):
    folder = folder_of(tmp_path, metadata={"hook_layer": 1})
    assert toys.load_folder(folder, SITE).input_site == SITE


def test_other_names_and_shapes_of_tensors_are_told(tmp_path: Path):
    folder, rows = folder_of(tmp_path), torch.randn(6, D)
    for tensors, words in (
        (
            {"decoder.weight": rows, "bias": torch.ones(D)},
            "as sae-lens's save_inference_model saves them: .* tensor W_dec",
        ),
        ({"W_dec": rows.to(torch.int8)}, r"SAE for 1/res \(.* a decoder in torch\.int8: save"),
        ({"W_dec": rows.to(torch.float8_e4m3fn)}, r"decoder in torch\.float8_e4m3fn: save"),
        ({"W_dec": rows.T.contiguous()}, f"has width 6: expected {D}, as its model"),
        ({"W_dec": rows.expand(2, 6, D).clone()}, f"has width 6 × {D}: expected {D}, as its model"),
    ):
        save_file(tensors, folder / "sae_weights.safetensors")
        with pytest.raises(ValueError, match=words):
            toys.load_folder(folder, SITE)


def test_an_sae_that_lays_heads_side_by_side_reads_z_without_a_name(toy: Model):
    output = attention_output(toy, 1)
    for reshape, width, words in (
        ("none", D, None),
        ("hook_z", D - 1, f"has width {D - 1}: expected {D}"),
        ("hook_z", len(output.weights), None),
    ):
        config_class = SAE_CLASS_REGISTRY["standard"][1]
        config = config_class(d_in=width, d_sae=6, reshape_activations=reshape)
        lens_sae = SAE_CLASS_REGISTRY["standard"][0](config)
        given = (Site(1, "att"), lens_sae, D, "planted", lambda: output)
        if words:
            with pytest.raises(ValueError, match=words):
                make_sae(*given)
        else:
            assert make_sae(*given).input_site.module == ("z" if reshape == "hook_z" else "att")


def write_plain(folder: Path, tokenizer: Path, model: Any) -> Path:
    """The folder of a tiny model of another architecture, with the toy's tokenizer."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=toys.VOCABULARY,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=toys.VOCABULARY, n_embd=D, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory, toy_folder: Path) -> Model:
    """A model without a norm after attention or MLP."""
    folder = tmp_path_factory.mktemp("llama")
    return load_model(str(write_plain(folder, toy_folder, tiny_llama())))


@pytest.mark.filterwarnings("ignore:.*non-empty model_from_pretrained_kwargs")  # sae-lens's own
@pytest.mark.parametrize(("make", "is_centred"), [(tiny_gpt2, True), (tiny_llama, False)])
@torch.no_grad()
def test_what_was_trained_on_a_centred_stream_gets_one(
    make: Callable[[], Any], is_centred: bool, toy_folder: Path, tmp_path: Path
):
    """Of models with LayerNorm alone: TransformerLens centres no other."""
    write_plain(tmp_path / "model", toy_folder, make())
    site, rows = Site(0, "res"), torch.randn(6, D, generator=torch.Generator().manual_seed(0))
    plain = toys.write_lens_sae(rows, site)
    plain.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    suite = load_suite(toys.write_suite(tmp_path, {site: plain}))
    sae, ids = suite.sae(site), torch.arange(5, 15)[None]
    x = run_model(suite.model, ids, [site])[1][site][0]
    codes = sae.encode(x)
    centred = load_model(suite.row.model)
    if is_centred:
        centred.bridge.enable_compatibility_mode(
            fold_ln=False, center_unembed=False, fold_value_biases=False, disable_warnings=True
        )
    seen = run_model(centred, ids, [site])[1][site][0]
    assert torch.allclose(seen, x, atol=1e-4) is not is_centred
    assert near(codes, plain.encode(seen))
    assert near(sae.decode(codes, x) - x, plain.decode(plain.encode(seen)) - seen)


@pytest.mark.filterwarnings("ignore:.*non-empty model_from_pretrained_kwargs")
@pytest.mark.parametrize(("make", "has_biases"), [(tiny_gpt2, True), (tiny_llama, False)])
def test_what_was_trained_on_z_without_value_biases_does_not_read_one_with_them(
    make: Callable[[], Any], has_biases: bool, toy_folder: Path, tmp_path: Path
):
    write_plain(tmp_path / "model", toy_folder, make())
    site = Site(0, "att")
    plain = toys.write_lens_sae(torch.randn(6, D), site, hook="blocks.0.attn.hook_z")
    plain.cfg.metadata.model_from_pretrained_kwargs = {"fold_value_biases": True}
    sae = load_suite(toys.write_suite(tmp_path, {site: plain})).sae(site)  # it can be matched
    words = r"suite .*: the SAE for 0/att .* \(fold_value_biases: true\), .* can be matched"
    with pytest.raises(ValueError, match=words) if has_biases else nullcontext():
        assert sae.encode(torch.ones(1, D)).shape == (1, 6)


@pytest.mark.parametrize("name", ["toy", "plain_model"])
def test_other_names_of_a_hook_point_are_of_the_same_place(
    name: str, request: pytest.FixtureRequest
):
    model: Model = request.getfixturevalue(name)
    ids, read = torch.arange(5, 15)[None], {}
    points = [Site(0, "res"), Site(1, "res"), Site(1, "z"), Site(2, "z")]
    names = {site: [hook for hook in hook_names(site) if hook != "hook_z"] for site in points}
    hooks = [
        (hook, lambda x, hook: read.update({hook.name: x.flatten(2).clone()}))
        for hooks in names.values()
        for hook in hooks
    ]
    for hook, keep in hooks:  # one at a time: two names may be one point
        read.clear()
        with torch.no_grad(), model.bridge.hooks(fwd_hooks=[(hook, keep)]):
            model.bridge(ids)
        (found,) = read.values()
        (site,) = [site for site in names if hook in names[site]]
        assert torch.equal(found, run_model(model, ids, [site])[1][site]), hook
    lens_sae = toys.write_lens_sae(torch.eye(3, D), SITE, hook="blocks.2.hook_resid_pre")
    assert make_sae(SITE, lens_sae, D, "planted").input_site == SITE
