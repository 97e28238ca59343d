"""A language model behind named sites, hook points: tokenize, run, read and edit."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from flowhelpers.core.features import Site, check_choice
from flowhelpers.core.machine import fitting_threads, in_threads
from flowhelpers.suites.prompt_cache import PromptCache

HOOKS = {
    "pre": "blocks.{layer}.hook_resid_pre",
    "res": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",  # after the norm behind the MLP, where there is one
    "att": "blocks.{layer}.hook_attn_out",
    "z": "blocks.{layer}.attn.hook_z",  # the heads' outputs, side by side, before W_O
    "normed": "blocks.{layer}.ln2.hook_normalized",  # before the MLP: normed, without the gain
    "mlp_in": "blocks.{layer}.mlp.hook_in",  # and with it, as the MLP reads it
}
OWN_HOOKS = ("transformer_lens", "transformers", "flowhelpers")  # whose stay on for good
CACHE = "past_key_values"  # what keys and values are called; from transformers 5.24 on, "cache"

Activations = Float[Tensor, "batch position d_model"]


@dataclass(frozen=True)
class Edit:
    """A change of the activations at one site."""

    site: Site
    change: Callable[[Activations], Activations]


@dataclass(frozen=True)
class Model:
    """A language model behind named sites, of which `bridge` is TransformerLens's view.

    `tokenizer` is that of Hugging Face; `prepend_bos` says whether the texts begin with BOS on
    which its SAEs were trained.
    """

    name: str
    bridge: Any
    tokenizer: Any
    layers: int
    d_model: int
    prepend_bos: bool = True

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.bridge.W_E.device

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}  # by configurations, where weights lie, and how often each was changed in place

    @property
    def fingerprint(self) -> str:
        """A digest of all that activations and texts depend on, as it is now.

        That is every weight, the configurations, the tokenizer, and the versions of what computes.
        Changes of weights past torch's count of them, through `.data` or NumPy, are not seen.
        """
        computes = self.bridge.original_model
        weights = [*computes.named_parameters(), *computes.named_buffers()]
        configs = (computes.config, getattr(computes, "generation_config", None))
        settings = [self.prepend_bos, *(each and each.to_json_string() for each in configs)]
        state = str([*settings, *((each.data_ptr(), each._version) for _, each in weights)])
        if state in self._digests:
            return self._digests[state]

        def digest_of(named: tuple[str, Tensor]) -> str:
            name, weights = named
            held = weights.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            about = f"{name} {weights.dtype} {tuple(weights.shape)} ".encode()
            return hashlib.blake2b(held, key=hashlib.blake2b(about).digest()).hexdigest()

        told = [version(name) for name in ("torch", "transformers", "transformer-lens", "sae-lens")]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        told += [backend.to_str() if backend else repr(self.tokenizer)]
        told += map(str, [*settings, self.tokenizer.special_tokens_map])
        told += in_threads(digest_of, weights)
        digest = hashlib.blake2b("\n".join(told).encode(), digest_size=16).hexdigest()
        return self._digests.setdefault(state, digest)

    @property
    def unembedding(self) -> Float[Tensor, "d_model vocabulary"]:
        """The matrix from the final norm's output to logits."""
        return self.bridge.W_U

    def sites(self) -> list[Site]:
        """Every site, in the order in which the stream passes them."""
        return [Site(i, module) for i in range(self.layers) for module in ("att", "mlp", "res")]


@dataclass(frozen=True)
class Tokens:
    """A batch of texts as token ids, `<bos>` first, padded on the right.

    `is_text` is True at tokens of the text, False at BOS, padding and other special tokens.
    """

    ids: Int[Tensor, "batch position"]
    is_text: Bool[Tensor, "batch position"]


def hook_name(model: Model, site: Site) -> str:
    """The name of the hook at a site; a ValueError if the model has no such layer or module."""
    check_choice("module", site.module, HOOKS)
    if not 0 <= site.layer < model.layers:
        raise ValueError(f"no layer {site.layer} in {model.name}: expected 0 to {model.layers - 1}")
    return HOOKS[site.module].format(layer=site.layer)


def tokenize(model: Model, texts: str | Sequence[str], max_tokens: int | None = None) -> Tokens:
    """Texts to token ids with exactly one BOS in front, padded on the right.

    A text that begins with BOS gets no second; EOS serves where there is no BOS. Models whose SAEs
    were trained without (`prepend_bos`) get none. Each text is cut to `max_tokens`, BOS included.

    Raises:
        ValueError: If there is no text, `max_tokens` leaves none of it, a text is longer than the
            model's context, or the tokenizer is of another model.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected 1 or more, BOS included")
    tokenizer = model.tokenizer
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is None and model.prepend_bos:
        told = f"{model.name}: its tokenizer has neither BOS nor EOS for a text to begin with"
        raise ValueError(f"{told}; SAEs trained without say `prepend_bos: false` in their cfg.json")
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    if model.prepend_bos:
        rows = [[bos, *row[row[:1] == [bos] :]] for row in rows]
    rows = [row[:max_tokens] for row in rows]
    longest, context = max(map(len, rows), default=0), model.bridge.cfg.n_ctx
    if not longest:
        raise ValueError(f"no text given: no token in {''.join(texts)!r}, expected some text")
    if longest > context:
        told = f"a text of {longest} tokens: {model.name} has a context of {context}"
        raise ValueError(f"{told}; give max_tokens={context} or fewer")
    pad = next((i for i in (tokenizer.pad_token_id, bos) if i is not None), 0)
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    if (highest := int(ids.max())) >= (known := model.bridge.W_E.shape[0]):
        told = f"token {highest} ({tokenizer.decode([highest])!r}), and {known} embeddings"
        raise ValueError(f"{model.name}: {told}: the tokenizer is of another model")
    place, lengths = torch.arange(ids.shape[1]), torch.tensor([len(row) for row in rows])
    is_text = (place >= model.prepend_bos) & (place < lengths[:, None])
    is_text &= ~torch.isin(ids, special_ids(tokenizer))
    return Tokens(ids.to(model.device), is_text.to(model.device))


def special_ids(tokenizer: Any) -> Int[Tensor, "special"]:
    """The ids of special tokens, those too that have no name, such as the headers of a chat."""
    unnamed = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return torch.tensor(sorted({*tokenizer.all_special_ids, *unnamed}), dtype=torch.long)


def token_strings(model: Model, ids: Iterable[int]) -> list[str]:
    """Each token id as the text it stands for."""
    return [model.tokenizer.decode([int(i)]) for i in ids]


@torch.no_grad()
def run_model(
    model: Model,
    ids: Int[Tensor, "batch position"],
    read: Iterable[Site] = (),
    edits: Sequence[Edit] = (),
    stop_after: int | None = None,
    prefix: PromptCache | None = None,
) -> tuple[Float[Tensor, "batch position vocabulary"] | None, dict[Site, Activations]]:
    """One forward pass: edits applied in order, sites read after their edits.

    It ends once the layer `stop_after` is done, without logits. `prefix` are the tokens before
    `ids`; positions are counted after them. An edit or a reading that was never reached is a
    RuntimeError.
    """
    kept: dict[Site, Activations] = {}

    def keep(site: Site) -> Edit:
        def change(activations: Activations) -> Activations:
            kept[site] = activations.detach().clone()
            return activations

        return Edit(site, change)

    changes = [*edits, *(keep(site) for site in read)]
    layers = None if stop_after is None else stop_after + 1
    if stop_after is not None:
        if late := [edit.site for edit in changes if edit.site.layer > stop_after]:
            raise ValueError(f"{late[0]} lies after layer {stop_after}, where the pass stops")
        changes.append(Edit(Site(stop_after, "res"), _stop))
    cache = None if prefix is None else prefix.cache(len(ids), layers)
    padding: dict[str, Any] = {} if prefix is None else prefix.padding(ids.shape[1])
    logits = None
    with editing(model, changes), suppress(_Stopped):
        logits = forward(model, ids, cache, **padding)
    return logits, kept


class _Stopped(Exception):
    """A pass has come as far as it was to go."""


def _stop(activations: Activations) -> Activations:
    raise _Stopped


@torch.no_grad()
def cache_prompt(
    model: Model, ids: Int[Tensor, "1 position"]
) -> tuple[Float[Tensor, "1 position vocabulary"], PromptCache]:
    """One pass over a text: its logits, and what later passes need so as to go on after it."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    logits = forward(model, ids, cache)
    return logits, PromptCache(tuple((layer.keys, layer.values) for layer in cache.layers))


def few_tokens(embeddings: Float[Tensor, "vocabulary d_model"]) -> Int[Tensor, "1 8"]:
    """Eight tokens from all over the vocabulary, on which a model is tried."""
    return torch.arange(1, 9, device=embeddings.device)[None] * (len(embeddings) // 10)


def takes_padding(model: Model) -> bool:
    """Whether rows that go on after unlike lengths give what whole texts give, on a few tokens."""
    if "position_ids" not in signature(model.bridge.original_model.forward).parameters:
        return False
    ids = few_tokens(model.bridge.W_E)
    at = torch.tensor([2, 6, 4], device=model.device)
    whole, prefix = cache_prompt(model, ids)
    padded, _ = run_model(model, ids[0, at][:, None], prefix=prefix.of_rows(at * 0, at))
    assert padded is not None
    off, size = (padded[:, 0] - whole[0, at]).abs().max(), whole[0, at].abs().max()
    return bool(off <= size * (1e-4 if whole.dtype == torch.float32 else 3e-2))


def forward(
    model: Model,
    ids: Int[Tensor, "batch position"],
    cache: Any = None,
    *,
    last: bool = False,
    **given: Any,
) -> Float[Tensor, "batch kept vocabulary"]:
    """The logits of one pass, which goes on after the keys and values of a cache and extends it.

    With `last` those of the last token alone, where the model can leave out the others; `given` is
    handed on to the model.
    """
    expected = ids.shape[1]
    if cache is not None:
        accepted = signature(model.bridge.original_model.forward).parameters
        given |= {"cache" if "cache" in accepted else CACHE: cache, "use_cache": True}
        given |= {"logits_to_keep": 1} if last and "logits_to_keep" in accepted else {}
        expected += cache.get_seq_length()
    with fitting_threads(ids.numel(), model.d_model):
        logits = model.bridge(ids, return_type="logits", **given)
    if cache is not None and (held := cache.get_seq_length()) != expected:
        told = f"{model.name} has {held} tokens in its cache after a pass, not {expected}"
        raise ValueError(f"{told}: no pass can go on after a prompt")
    return logits


def logits_of(
    model: Model, ids: Int[Tensor, "batch position"], edits: Sequence[Edit] = ()
) -> Float[Tensor, "batch position vocabulary"]:
    """The logits of one forward pass, with edits applied."""
    logits, _ = run_model(model, ids, edits=edits)
    assert logits is not None  # run gives none only where it stops early
    return logits


def token_losses(
    logits: Float[Tensor, "batch position vocabulary"], ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch position"]:
    """Cross-entropy in nats, each token under the logits of its own place: shift `ids` by one."""
    # Flat: over an axis that is not the last, torch sums the vocabulary less exactly (1e-5 nats).
    losses = cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
    return losses.view(ids.shape)


@torch.no_grad()
def final_norm(
    model: Model, activations: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """The norm before the unembedding, applied to any vectors of the stream."""
    return model.bridge.ln_final(activations.reshape(1, -1, model.d_model)).view_as(activations)


@contextmanager
def editing(model: Model, edits: Sequence[Edit]) -> Iterator[None]:
    """Apply edits to every pass inside the block; one that was never reached is a RuntimeError."""
    missed = dict(enumerate(edits))

    def hook_of(place: int, edit: Edit) -> Callable[..., Tensor | None]:
        def hook(activations: Tensor, hook: Any = None) -> Tensor | None:
            missed.pop(place, None)
            # Where the heads stand on an axis of their own, they are laid side by side.
            flat = activations.flatten(2)
            changed = edit.change(flat)
            if changed is flat:  # read alone: what follows is as without a hook, to the last bit
                return None
            if changed.shape != flat.shape:
                shapes = f"{tuple(changed.shape)}: expected {tuple(flat.shape)}"
                raise ValueError(f"the edit at {edit.site} gave shape {shapes}")
            return changed.view_as(activations)

        return hook

    hooks = [(hook_name(model, edit.site), hook_of(i, edit)) for i, edit in enumerate(edits)]
    with model.bridge.hooks(fwd_hooks=hooks):
        yield
    if missed:
        sites = ", ".join(str(edit.site) for edit in missed.values())
        raise RuntimeError(f"{model.name}: the edit at {sites} was never reached by a forward pass")


def is_edited(model: Model) -> bool:
    """Whether hooks act on the model's passes now: of `editing`, of TransformerLens or torch's."""
    points = model.bridge.hook_dict.values()
    modules = [*model.bridge.modules(), *model.bridge.original_model.modules()]
    hooks = (hook for m in modules for hook in (m._forward_hooks | m._forward_pre_hooks).values())
    of_torch = any(hook.__module__.split(".")[0] not in OWN_HOOKS for hook in hooks)
    return of_torch or any(point.has_hooks(including_permanent=False) for point in points)
