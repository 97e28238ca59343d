"""Keys and values of texts that were read, after which passes go on."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


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

    def of_rows(
        self, rows: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]
    ) -> "PromptCache | None":
        """For each row of a batch first tokens of one of the texts; None where all have none."""
        if not lengths.any():
            return None
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
