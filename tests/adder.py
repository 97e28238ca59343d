"""A model whose layers only add constants, so that what an edit does can be counted by hand.

A GPT-2 of which attention and the MLP have zero weights and a bias: R_1 is the token's embedding
plus two constant vectors, whatever was edited before. SAEs lie along coordinates; decoder
rows have norm 2 (some of R_0 have 4) and encoder rows one over that, so that an activation is half
(a quarter) of the coordinate, and a feature that is removed leaves none of it. Layer 1 has
six features, named here by what they are made of:

    COPY   of R_0 alone: 1 at every second token
    SUM    of R_0, 1 at every third token, and the MLP, 1.5; active above 1.25
    MLP    of the MLP alone, 2
    OTHER  of a coordinate that no SAE at R_0 has, 3 at every fourth token; its match there
           is active at every token and has nothing to do with it
    ATT    of attention alone, 2.5
    ALL    of R_0, 1 at every fifth token, the MLP, 1, and attention, 1; active above 1.5

At layer 2 the MLP adds .5 to what COPY is there.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
import toys
from torch import Tensor

from flowhelpers.activations.sparse import collect
from flowhelpers.core.features import Site
from flowhelpers.suites.bridge import load_model
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Tokens
from flowhelpers.suites.registry import SuiteRow
from flowhelpers.suites.saes import make_sae

D = 32
COPY, SUM, MLP, OTHER, ATT, ALL = 3, 0, 5, 1, 4, 2  # features of layer 1, in an order of their own
# The coordinate along which each feature of a site lies.
AXES = {
    Site(0, "res"): [7, 6, 0, 1],
    Site(1, "mlp"): [4, 2, 7, 1],
    Site(1, "att"): [7, 9, 5],
    Site(1, "res"): [1, 3, 7, 0, 5, 2],
    Site(2, "res"): [2, 0, 1, 3],
}
NORMS = {Site(0, "res"): [2, 4, 2, 4]}
THRESHOLDS = {Site(1, "res"): [1.25, 0.5, 1.5, 0.5, 0.5, 0.5]}
# The match of each feature of layer 1 at each place; the rest have none.
MATCHES = {
    "res": {COPY: 2, SUM: 3, OTHER: 1, ALL: 0},
    "mlp": {SUM: 3, MLP: 1, ALL: 2},
    "att": {ATT: 2, ALL: 0},
}
FORWARD = {COPY: 1, SUM: 2, MLP: 0}  # of layer 1 to layer 2
SECOND = 3  # second best of all of them; at layer 2 active at every fourth token


def embeddings(vocabulary: int) -> Tensor:
    rows = torch.zeros(vocabulary, D)
    for token in range(vocabulary):
        rows[token, 0] = 2 * (token % 2 == 1)
        rows[token, 1] = 2 * (token % 3 == 0)
        rows[token, 3] = 6 * (token % 4 == 1)
        rows[token, 7] = 2 * (token % 5 == 0)
        rows[token, 6] = 4
        rows[token, 10 + token % 16] = 3  # so that logits tell tokens apart
    return rows


CONSTANTS = {  # coordinate: value, at each layer of the MLP and of attention
    "mlp": [{30: 0.5}, {1: 3, 2: 4, 4: 1, 7: 2}, {0: 1}],
    "att": [{31: 0.5}, {5: 5, 7: 2, 9: 1}, {29: 0.5}],
}


def load_adder(folder: Path) -> Suite:
    from transformers import GPT2Config, GPT2LMHeadModel

    from flowhelpers.training.language_model import train_tokenizer

    train_tokenizer(iter(toys.TEXTS * 20), toys.VOCABULARY).save_pretrained(folder)
    config = GPT2Config(
        vocab_size=toys.VOCABULARY, n_embd=D, n_layer=3, n_head=2, n_positions=32, n_inner=16
    )
    network = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.fill_(float("ln" in name and "weight" in name))
        network.transformer.wte.weight.copy_(embeddings(toys.VOCABULARY))
        blocks: Any = network.transformer.h
        for layer, block in enumerate(blocks):
            for module, part in (("mlp", block.mlp), ("att", block.attn)):
                constants = CONSTANTS[module][layer]
                part.c_proj.bias[[*constants]] = torch.tensor([*constants.values()]).float()
    network.save_pretrained(folder)
    saes = {}
    for site, axes in AXES.items():
        rows = torch.eye(D)[axes]
        threshold = torch.tensor(THRESHOLDS.get(site, [0.25] * len(axes)))
        norms = torch.tensor(NORMS.get(site, [2] * len(axes)))[:, None]
        lens_sae = toys.write_lens_sae(norms * rows, site, threshold, encoder=rows.T / norms.T)
        saes[site] = make_sae(site, lens_sae, D, "adder")
    row = SuiteRow("adder", "none", dict.fromkeys(saes, "adder"), parameters=0)
    return Suite(row, load_model(str(folder)), saes)


def matches() -> pd.DataFrame:
    """A match table that says what the features are made of; -1 where there is no match."""
    rows = [
        ("backward", 1, module, feature, 1 - (module == "res"), of.get(feature, -1), 1)
        for module, of in MATCHES.items()
        for feature in range(6)
    ]
    rows += [
        ("forward", 2, "res", feature, 1, source, rank)
        for source, best in FORWARD.items()
        for rank, feature in ((2, SECOND), (1, best))
    ]
    names = ["direction", "layer", "module", "feature", "source_layer", "source", "rank"]
    return pd.DataFrame(rows, columns=names)


def world(folder: Path) -> SimpleNamespace:
    """The suite, three texts whose tokens go through all remainders, and its match table."""
    suite = load_adder(folder)
    ids = torch.arange(60, 120).view(3, 20)
    is_text = torch.ones_like(ids, dtype=torch.bool)
    is_text[:, 0] = False
    is_text[2, 15:] = False
    tokens = Tokens(ids, is_text)
    activations = collect(suite, tokens)
    return SimpleNamespace(suite=suite, tokens=tokens, activations=activations, matches=matches())
