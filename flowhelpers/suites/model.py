"""A language model behind named sites, hook points: tokenize, run, read and edit."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from flowhelpers.core.features import Site, check_choice
from flowhelpers.core.machine import fitting_threads

HOOKS = {
    "pre": "blocks.{layer}.hook_resid_pre",
    "res": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",  # after the norm behind the MLP, where there is one
    "att": "blocks.{layer}.hook_attn_out",
    "z": "blocks.{layer}.attn.hook_z",  # the heads' outputs, side by side, before W_O
    "normed": "blocks.{layer}.ln2.hook_normalized",  # before the MLP: normed, without the gain
    "mlp_in": "blocks.{layer}.mlp.hook_in",  # and with it, as the MLP reads it
}
CACHE = "past_key_values"  # what keys and values are called; from transformers 5.24 on, "cache"

Activations = Float[Tensor, "batch position d_model"]


@dataclass(frozen=True)
class Edit:
    """A change of the activations at one site."""

    site: Site
    change: Callable[[Activations], Activations]


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of texts: for each layer both, `[text, heads, position, d_head]`.

    Each row of a batch goes on after so many tokens (`lengths`) of one text (`rows`); by default
    all after all of the first.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    rows: Int[Tensor, "batch"] | None = None
    lengths: Int[Tensor, "batch"] | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return self.layers[0][0].shape[2]

    def first(self, tokens: int) -> "PromptCache":
        """The same of fewer tokens."""
        if not 0 < tokens <= len(self):
            raise ValueError(f"{tokens} tokens of a prefix of {len(self)}")
        cut = ((keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in self.layers)
        return PromptCache(tuple(cut))

    def of_rows(self, rows: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]) -> "PromptCache":
        """For each row of a batch the first tokens of one of the texts."""
        alike = bool((lengths == lengths[0]).all())
        whole = self.first(int(lengths.max()))
        return replace(whole, rows=rows, lengths=None if alike else lengths)

    def padding(self, new: int) -> dict[str, Tensor]:
        """Attention mask, and positions of `new` tokens, after prefixes padded on the left."""
        if self.lengths is None:
            return {}
        lengths, at = self.lengths[:, None], torch.arange(len(self) + new).to(self.lengths)
        mask = at >= len(self) - lengths
        return {"attention_mask": mask.long(), "position_ids": lengths + at[:new]}

    def cache(self, batch: int, layers: int | None = None) -> Any:
        """The cache of transformers in which every row of a batch has its prefix."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        rows = torch.zeros(batch, dtype=torch.long) if self.rows is None else self.rows
        if self.lengths is not None:
            at = torch.arange(len(self)).to(rows) - len(self) + self.lengths[:, None]
            at = at.clamp(0)  # the mask leaves out what is before the text
        # Of layers with a sliding window all is kept as well, and the mask leaves out what is far.
        for layer, (keys, values) in enumerate(self.layers[:layers]):
            cache.update(keys[:, :, :1], values[:, :, :1], layer)  # which would copy all again
            held, rows = cache.layers[layer], rows.to(keys.device)
            if self.lengths is None:
                held.keys, held.values = keys[rows], values[rows]
            else:
                held.keys, held.values = (
                    each.transpose(1, 2)[rows[:, None], at].transpose(1, 2)
                    for each in (keys, values)
                )
        return cache


@dataclass(frozen=True)
class Model:
    """A language model behind named sites, of which `bridge` is TransformerLens's view."""

    name: str
    bridge: Any
    layers: int
    d_model: int

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        return self.bridge.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.bridge.W_E.device

    @cached_property
    def fingerprint(self) -> str:
        """A digest of a few thousand weights of every parameter, evenly spread."""
        digest = hashlib.blake2b(digest_size=16)
        for name, weights in self.bridge.original_model.named_parameters():
            flat = weights.detach().flatten()
            some = flat[:: max(1, len(flat) // 4096)].cpu().float()
            digest.update(f"{name} {tuple(weights.shape)} ".encode() + some.numpy().tobytes())
        return digest.hexdigest()

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

    A text that begins with BOS gets no second; EOS serves where there is no BOS. Each is cut to
    `max_tokens`, BOS included. No text at all is a ValueError, as is none left of it.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("no text given: expected a text or a list of texts")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected 1 or more, BOS included")
    tokenizer = model.tokenizer
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [[bos, *row[row[:1] == [bos] :]][:max_tokens] for row in rows]
    pad = bos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    place, lengths = torch.arange(ids.shape[1]), torch.tensor([len(row) for row in rows])
    is_special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    is_text = (place > 0) & (place < lengths[:, None]) & ~is_special
    return Tokens(ids.to(model.device), is_text.to(model.device))


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


def takes_padding(model: Model) -> bool:
    """Whether rows that go on after unlike lengths give what whole texts give, on a few tokens."""
    if "position_ids" not in signature(model.bridge.original_model.forward).parameters:
        return False
    ids = torch.arange(1, 9, device=model.device)[None] * (model.bridge.cfg.d_vocab // 10)
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
        raise ValueError(f"{model.name}: {held} tokens in the cache after a pass, not {expected}")
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
        raise RuntimeError(f"the edit at {sites} was never reached by a forward pass")


def is_edited(model: Model) -> bool:
    """Whether hooks act on the model's passes now, of `editing` or of TransformerLens."""
    points = model.bridge.hook_dict.values()
    return any(point.has_hooks(including_permanent=False) for point in points)
