"""Sparse feature activations at every site, in one pass of the model over the texts."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock

from flowhelpers.activations.preflight import preflight_once
from flowhelpers.activations.sampling import Sample
from flowhelpers.core.features import MODULES, FeatureId, Site, parse_site
from flowhelpers.core.files import writable_folder, write_whole
from flowhelpers.core.machine import check_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import Tokens, run_model, tokenize

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

ENCODED_TOGETHER = 1024  # tokens
PASS_TENSORS = 48  # of the stream's width, that a pass holds beside the sites
OVERHEAD = 64 * 2**20


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
    texts: Sequence[str],
    sites: Iterable[Site] | None = None,
    max_tokens: int = 128,
    batch: int = 16,
) -> FeatureActivations:
    """Read the features of texts at all sites. BOS and other special tokens are left out.

    Args:
        suite: The suite.
        texts: The texts.
        sites: The sites; by default all that have an SAE.
        max_tokens: Each text is cut to so many tokens, BOS included.
        batch: Texts in one forward pass.

    Raises:
        ValueError: If no token is left to read.
    """
    return collect_tokens(suite, tokenize(suite.model, texts, max_tokens), sites, batch)


def collect_tokens(
    suite: "Suite",
    tokens: Tokens,
    sites: Iterable[Site] | None = None,
    batch: int = 16,
) -> FeatureActivations:
    """As `collect`, of texts that are tokens already."""
    import pandas as pd
    from scipy.sparse import vstack

    batches = list(read_batches(suite, tokens, sites, batch))
    text, position = torch.nonzero(tokens.is_text, as_tuple=True)
    frame = pd.DataFrame(
        {
            "text": text.cpu().numpy(),
            "position": position.cpu().numpy(),
            "token": tokens.ids[text, position].cpu().numpy(),
        }
    )
    by_site = {site: vstack([read[site] for read in batches], format="csr") for site in batches[0]}
    return FeatureActivations(frame, by_site)


def read_batches(
    suite: "Suite",
    tokens: Tokens,
    sites: Iterable[Site] | None = None,
    batch: int = 16,
) -> "Iterator[dict[Site, csr_matrix]]":
    """The activations of texts batch by batch, for each site `[tokens of the batch, features]`.

    Args:
        suite: The suite.
        tokens: The texts.
        sites: The sites; by default all that have an SAE.
        batch: Texts in one forward pass.

    Raises:
        ValueError: If no token is left to read.
    """
    from scipy.sparse import csr_matrix

    if not tokens.is_text.any():
        raise ValueError("no token is left to read: the texts hold special tokens only")
    sites = list(sites or suite.saes)
    preflight_once(suite, sites)
    reads = [suite.sae(site).input_site for site in sites]
    for rows in progress(torch.arange(len(tokens.ids)).split(batch), "activations"):
        length = 1 + max(tokens.is_text[rows].any(0).nonzero().flatten().tolist(), default=0)
        ids, is_text = tokens.ids[rows, :length], tokens.is_text[rows, :length]
        _, read = run_model(suite.model, ids, reads, stop_after=max(site.layer for site in reads))
        yield {
            site: csr_matrix(suite.sae(site).encode(read[at][is_text]).float().cpu().numpy())
            for site, at in zip(sites, reads, strict=True)
        }


@dataclass(frozen=True)
class Needs:
    """What reading a sample takes, in bytes, beside what the suite takes once it is loaded.

    Attributes:
        memory: The most at a time, of the pass and of encoding.
        disk: For the activations of the model, until all sites are encoded.
    """

    memory: int
    disk: int

    def __str__(self) -> str:
        return f"{self.memory / 2**20:,.0f} MiB of memory, {self.disk / 2**20:,.0f} MiB of disk"


def reading_needs(
    tokens: int,
    sites: int,
    d_model: int,
    width: int,
    batch_tokens: int = 16 * 128,
    active_share: float = 0.02,
    element: int = 4,
) -> Needs:
    """An estimate of what `read_sample` takes.

    Args:
        tokens: Chosen tokens.
        sites: SAEs.
        d_model: Width of the stream.
        width: Features of an SAE.
        batch_tokens: Tokens in one forward pass, padding included.
        active_share: The share of an SAE's features that is active on a token.
        element: Bytes of one activation of the model.
    """
    of_pass = batch_tokens * d_model * element * (2 * sites + PASS_TENSORS)
    of_encoding = tokens * d_model * (element + 4) + 3 * ENCODED_TOGETHER * width * 4
    of_result = int(tokens * width * active_share) * 8 * sites
    return Needs(
        max(of_pass, of_encoding) + of_result + OVERHEAD, tokens * d_model * element * sites
    )


def texts_at_once(suite: "Suite", sample: Sample) -> int:
    """How many texts a pass takes together: 16, or as few as keep it within a GiB."""
    of_token = suite.model.d_model * suite.model.unembedding.element_size()
    of_text = sample.ids.ids.shape[1] * of_token * (2 * len(suite.saes) + PASS_TENSORS)
    return int(np.clip(2**30 // of_text, 1, 16))


def needs_of(suite: "Suite", sample: Sample) -> Needs:
    """`reading_needs` of a suite and a sample, by the SAEs of its first layer."""
    width = max(suite.sae(site).width for site in list(suite.saes)[:3])
    length = sample.ids.ids.shape[1]
    element = suite.model.unembedding.element_size()
    shape = len(sample.tokens), len(suite.saes), suite.model.d_model, width
    batch_tokens = texts_at_once(suite, sample) * length
    return reading_needs(*shape, batch_tokens=batch_tokens, element=element)


def read_sample(
    suite: "Suite", sample: Sample, folder: Path, batch: int | None = None
) -> FeatureActivations:
    """The features of all sites at a sample's tokens: the model runs once over the texts.

    First the model's own activations at the chosen tokens are written, batch by batch; then each
    site's are encoded, one SAE at a time, so that no more than one has to be in memory. What
    is written is used again: a pass that was interrupted goes on where it was. Of several processes
    with the same sample, one does the work.

    Args:
        suite: The suite.
        sample: The texts and their chosen tokens.
        folder: Where files are kept, in a folder of their own by what they depend on.
        batch: Texts in one forward pass; `texts_at_once` unless given.

    Raises:
        MemoryError: If there is not enough, by `needs_of`.
        OSError: If the folder cannot be written to, or has no room.
    """
    batch = batch or texts_at_once(suite, sample)
    needs = needs_of(suite, sample)
    check_memory(needs.memory, "reading the sample", str(suite.model.device))
    folder = writable_folder(folder / _digest(suite, sample, batch))
    if needs.disk > (free := disk_usage(folder).free):
        raise OSError(f"reading the sample needs {needs}; {folder} has {free / 2**20:,.0f} MiB")
    by_site = {}
    parts: list[Path] = []
    with FileLock(folder / "lock"):  # who comes second waits, and finds everything done
        for site in progress(list(suite.saes), "encoding"):
            sae = suite.sae(site)
            path = folder / f"{site.layer}-{site.module}-{sae.fingerprint[:16]}.npz"
            codes = _kept(path)
            if codes is None:
                parts = parts or _run_over(suite, sample, folder, batch)
                codes = _encoded(sae, parts)
                _write_sparse(path, codes)
            by_site[site] = codes
        rmtree(folder / "model", ignore_errors=True)
    return FeatureActivations(sample.tokens, by_site)


def save_activations(found: FeatureActivations, folder: Path) -> None:
    """Write activations to a folder: `tokens.parquet`, and a sparse matrix a site.

    Raises:
        OSError: If the folder cannot be written to.
    """
    folder = writable_folder(folder)
    for old in folder.glob("*-*.npz"):
        old.unlink()
    for site, codes in found.by_site.items():
        _write_sparse(folder / f"{site.layer}-{site.module}.npz", codes)
    write_whole(folder / "tokens.parquet", lambda file: found.tokens.to_parquet(file, index=False))


def load_activations(folder: Path) -> FeatureActivations:
    """Read what `save_activations` wrote.

    Raises:
        FileNotFoundError: If there is nothing of the kind.
        ValueError: If a file is truncated, or the tokens of two files differ in number.
    """
    import pandas as pd

    if not (folder / "tokens.parquet").is_file():
        raise FileNotFoundError(f"no tokens.parquet in {folder}: expected saved activations")
    tokens = pd.read_parquet(folder / "tokens.parquet")
    by_site = {}
    for path in folder.glob("*-*.npz"):
        site = parse_site(path.stem.replace("-", "/"))
        by_site[site] = _read_sparse(path)
        if by_site[site].shape[0] != len(tokens):
            raise ValueError(
                f"{path} has {by_site[site].shape[0]} tokens: expected {len(tokens)}, as the table"
            )
    if not by_site:
        raise FileNotFoundError(f"no sites in {folder}: expected files such as 4-res.npz")
    order = sorted(by_site, key=lambda site: (site.layer, MODULES.index(site.module)))
    return FeatureActivations(tokens, {site: by_site[site] for site in order})


def _write_sparse(path: Path, codes: "csr_matrix") -> None:
    from scipy.sparse import save_npz

    def write(file: Path) -> None:
        with file.open("wb") as stream:
            save_npz(stream, codes)

    write_whole(path, write)


def _read_sparse(path: Path) -> "csr_matrix":
    from scipy.sparse import load_npz

    try:
        return load_npz(path)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error


def _kept(path: Path) -> "csr_matrix | None":
    if not path.exists():
        return None
    try:
        return _read_sparse(path)
    except ValueError as error:
        warnings.warn(f"it is made again: {error}", stacklevel=3)
        return None


def _holds(path: Path, names: set[str]) -> bool:
    """Whether a file of the model's activations is whole and has all of these sites."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return names <= set(file.keys())
    except (SafetensorError, OSError):
        return False


def _digest(suite: "Suite", sample: Sample, batch: int) -> str:
    digest = hashlib.blake2b(f"{suite.model.fingerprint} {batch}".encode(), digest_size=16)
    digest.update(sample.ids.ids.cpu().numpy().tobytes())
    digest.update(sample.tokens[["text", "position"]].to_numpy(np.int64).tobytes())
    return digest.hexdigest()


def _run_over(suite: "Suite", sample: Sample, folder: Path, batch: int) -> list[Path]:
    """Files of the model's activations at the chosen tokens, a file for each batch of texts."""
    from safetensors.torch import save_file

    preflight_once(suite, suite.saes)
    sites = list(dict.fromkeys(suite.sae(site).input_site for site in suite.saes))
    text, position = (torch.tensor(sample.tokens[c].to_numpy()) for c in ("text", "position"))
    paths = []
    parts = writable_folder(folder / "model")
    for rows in progress(torch.arange(len(sample.ids.ids)).split(batch), "activations"):
        first, last = int(rows[0]), int(rows[-1])
        here = (text >= first) & (text <= last)
        if not here.any():
            continue
        paths.append(parts / f"{first:06}.safetensors")
        if _holds(paths[-1], {str(site) for site in sites}):
            continue
        length = int(position[here].max()) + 1
        ids = sample.ids.ids[rows, :length]
        _, read = run_model(suite.model, ids, sites, stop_after=max(site.layer for site in sites))
        at = (text[here] - first).to(ids.device), position[here].to(ids.device)
        tensors = {str(site): read[site][at].contiguous().cpu() for site in sites}
        write_whole(paths[-1], lambda file, tensors=tensors: save_file(tensors, file))
    return paths


def _encoded(sae: "SAE", parts: Sequence[Path]) -> "csr_matrix":
    from safetensors import safe_open
    from scipy.sparse import csr_matrix, vstack

    inputs = []
    for path in parts:
        with safe_open(path, "pt") as file:
            inputs.append(file.get_tensor(str(sae.input_site)))
    codes = [
        csr_matrix(sae.encode(some.to(sae.norms.device)).float().cpu().numpy())
        for some in torch.cat(inputs).split(ENCODED_TOGETHER)
    ]
    return vstack(codes, format="csr")
