"""Sparse feature activations at every site, in one pass of the model over the texts."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock

from flowhelpers.activations.preflight import preflight_once
from flowhelpers.activations.sampling import MAX_TOKENS, Sample
from flowhelpers.core.features import FeatureId, Site, parse_site
from flowhelpers.core.files import writable_folder, write_whole
from flowhelpers.core.machine import check_memory, free_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import Tokens, is_edited, run_model, tokenize

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

    from flowhelpers.suites.load import Suite

READ_TOGETHER = 16  # texts
ENCODED_TOGETHER = 1024  # tokens
CSR = ("data", "indices", "indptr", "shape")  # what is stored of a sparse matrix
PASS_TENSORS = 48  # of the stream's width, that a pass holds beside the sites
VERSION = 2  # of how activations are made, part of the key of what is kept
HELD = 5 * 2**30  # bytes of the stream that wait in main memory for SAEs that do not all fit


@dataclass(frozen=True)
class FeatureActivations:
    """Which features are active at which tokens.

    Attributes:
        tokens: One row a token: `text` (its number), `position` (0 is BOS), `token` (its id); of a
            sample also its `dataset`.
        by_site: At each site the activations, `[tokens, features]`, sparse.
    """

    tokens: "pd.DataFrame"
    by_site: "Mapping[Site, csr_matrix]"

    def of(self, feature: FeatureId) -> np.ndarray:
        """The activation of one feature at every token."""
        return self.by_site[feature.site][:, [feature.index]].toarray()[:, 0]


def collect(
    suite: "Suite",
    texts: Sequence[str] | Tokens,
    sites: Iterable[Site | str] | None = None,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 16,
) -> FeatureActivations:
    """Read the features of texts, at all sites unless some are given.

    Each text is cut to `max_tokens`, BOS included; one that is then longer than the model's context
    is an error. What is tokens already is read as it is. BOS and other special tokens are left out;
    no token left is an error. SAEs from the hub get a `run_preflight` first, once.

    Example:
        >>> from flowhelpers import collect, load_suite
        >>> suite = load_suite("flowlet")
        >>> activations = collect(suite, ["Once there was a ship."])
        >>> activations.of(suite.feature("4/res/17")).shape == (len(activations.tokens),)
        True
    """
    import pandas as pd

    tokens = texts if isinstance(texts, Tokens) else tokenize(suite.model, texts, max_tokens)
    chosen = None if sites is None else [parse_site(str(site)) for site in sites]
    by_site = _stacked(read_batches(suite, tokens, chosen, batch_size))
    text, position = tokens.is_text.cpu().numpy().nonzero()
    token = tokens.ids.cpu().numpy()[text, position]
    table = pd.DataFrame({"text": text, "position": position, "token": token})
    return FeatureActivations(table, by_site)


def read_sample(suite: "Suite", sample: Sample, folder: Path) -> FeatureActivations:
    """The features of all sites at a sample's tokens, kept in `folder`, batch by batch.

    What was interrupted goes on after the last batch that was finished. Of several processes with
    the same sample, one does the work. A pass has 16 texts, or as few as fit a GiB, and a batch is
    several (`read_batches`); what has no room in memory is an error before the first. Of a model
    that is being edited nothing is kept, and nothing that was kept is taken.
    """
    places = torch.tensor(sample.tokens[["text", "position"]].to_numpy())
    is_chosen = torch.zeros_like(sample.ids.is_text)
    is_chosen[places[:, 0], places[:, 1]] = True
    tokens = replace(sample.ids, is_text=is_chosen)
    of_token = suite.model.d_model * suite.model.unembedding.element_size()
    of_text = tokens.ids.shape[1] * of_token * (2 * len(suite.saes) + PASS_TENSORS)
    batch_size = int(np.clip(2**30 // of_text, 1, READ_TOGETHER))
    widest = max(suite.about(site, "width") for site in list(suite.saes)[:3])
    result = 8 * len(suite.saes) * int(0.02 * widest * len(places))  # 2 % active
    needed = batch_size * of_text + 12 * ENCODED_TOGETHER * widest + result
    check_memory(needed, "reading the sample", str(suite.model.device))
    together = max(1, ENCODED_TOGETHER // (int(is_chosen.sum(1).max()) * batch_size))
    together = max(together, _passes_held(suite, tokens, len(suite.saes), batch_size))
    key = "" if is_edited(suite.model) else _digest(suite, tokens, batch_size, together)
    kept = writable_folder(folder / key) if key else None
    # who comes second waits, and finds everything done
    with FileLock(kept / "lock") if kept else nullcontext():
        batches = read_batches(suite, tokens, None, batch_size, together, kept)
        return FeatureActivations(sample.tokens, _stacked(batches))


def read_batches(
    suite: "Suite",
    tokens: Tokens,
    sites: Iterable[Site] | None = None,
    batch_size: int = 16,
    together: int | None = None,
    folder: Path | None = None,
) -> "Iterator[dict[Site, csr_matrix]]":
    """The activations of texts batch by batch, for each site `[tokens of the batch, features]`.

    Where only a few SAEs have room in memory, each is loaded once a batch, and once before for what
    it reads: a batch then has as many passes as keep `HELD` bytes of the stream, or half of what is
    free. Of Gemma 2 2B 100,000 tokens at 78 sites are 36 GB in bfloat16: 8 batches, 9 loads.

    Args:
        together: Passes whose tokens each SAE encodes together; by default one where all SAEs fit.
        folder: Where batches are kept, for tokens and SAEs that are always the same.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    if not tokens.is_text.any():
        raise ValueError("no token is left to read: the texts hold special tokens only")
    sites = list(sites or suite.saes)
    together = together or _passes_held(suite, tokens, len(sites), batch_size)
    texts = torch.arange(len(tokens.ids)).split(batch_size * together)
    for rows in progress(texts, "activations"):
        path = folder / f"{int(rows[0]):06}.npz" if folder else None
        batch = _load(path, sites) if path and path.exists() else None
        if batch is None:
            passes = [Tokens(tokens.ids[r], tokens.is_text[r]) for r in rows.split(batch_size)]
            batch = _encoded(suite, passes, sites)
            if path:
                _save(path, batch)
        yield batch


def _passes_held(suite: "Suite", tokens: Tokens, n_sites: int, batch_size: int) -> int:
    """For how many passes the stream has room in memory; one where all SAEs have, too."""
    if getattr(suite.saes, "all_fit", True):
        return 1
    of_token = n_sites * suite.model.d_model * suite.model.unembedding.element_size()
    of_pass = batch_size * int(tokens.is_text.sum(1).max()) * of_token
    there = -(-len(tokens.ids) // batch_size)
    return int(np.clip(min(HELD, free_memory() // 2) // of_pass, 1, there))


def _encoded(
    suite: "Suite", passes: Sequence[Tokens], sites: Sequence[Site]
) -> "dict[Site, csr_matrix]":
    from scipy.sparse import vstack

    preflight_once(suite, sites)
    inputs = {site: suite.about(site, "input_site") for site in sites}
    stop = max(site.layer for site in inputs.values())
    read: dict[Site, list[torch.Tensor]] = {site: [] for site in inputs.values()}
    for tokens in passes:
        length = 1 + max(tokens.is_text.any(0).nonzero().flatten().tolist(), default=0)
        is_text = tokens.is_text[:, :length]
        _, stream = run_model(suite.model, tokens.ids[:, :length], list(read), stop_after=stop)
        for site, chunks in read.items():
            chunks.append(stream[site][is_text].to("cpu" if passes[1:] else suite.device))
    codes = {}
    for site, at in inputs.items():
        sae = suite.sae(site)
        chunks = torch.cat(read[at]).split(ENCODED_TOGETHER)
        rows = [_sparse(sae.encode(chunk.to(suite.device)).relu_()) for chunk in chunks]
        codes[site] = vstack(rows, format="csr")
    return codes


def _sparse(codes: torch.Tensor) -> "csr_matrix":
    from scipy.sparse import csr_matrix

    if not codes.is_cuda:
        return csr_matrix(codes.float().cpu().numpy())
    row, feature = codes.nonzero(as_tuple=True)  # what is zero stays on the GPU
    active = codes[row, feature].float().cpu().numpy()
    return csr_matrix((active, (row.cpu().numpy(), feature.cpu().numpy())), tuple(codes.shape))


def _stacked(batches: "Iterable[dict[Site, csr_matrix]]") -> "dict[Site, csr_matrix]":
    from scipy.sparse import vstack

    read = list(batches)
    return {site: vstack([batch[site] for batch in read], format="csr") for site in read[0]}


def _save(path: Path, batch: "Mapping[Site, csr_matrix]") -> None:
    arrays = {f"{site} {name}": getattr(batch[site], name) for site in batch for name in CSR}
    stream = BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    write_whole(path, lambda file: file.write_bytes(stream.getbuffer()))


def _load(path: Path, sites: Sequence[Site]) -> "dict[Site, csr_matrix] | None":
    from scipy.sparse import csr_matrix

    batch = {}
    try:
        with np.load(path) as arrays:
            for site in sites:
                *stored, shape = (arrays[f"{site} {name}"] for name in CSR)
                batch[site] = csr_matrix(tuple(stored), shape=tuple(shape))
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        warnings.warn(f"{path} is made again, it is truncated or corrupt: {error}", stacklevel=3)
        return None
    return batch


def _digest(suite: "Suite", tokens: Tokens, batch_size: int, together: int) -> str:
    told = ("input_site", "fingerprint")  # both while an SAE is there
    saes = [f"{site} {suite.about(site, name)}" for site in suite.saes for name in told]
    parts = [VERSION, suite.model.fingerprint, batch_size, together, *tokens.ids.shape, *saes]
    text = " ".join(map(str, parts)).encode()
    arrays = (tokens.ids.cpu().numpy(), tokens.is_text.cpu().numpy())
    content = text + b"".join(array.tobytes() for array in arrays)
    return hashlib.blake2b(content, digest_size=16).hexdigest()
