"""Whether tensors of two devices meet: a second device that is no more than a mark on tensors.

No GPU is needed. Inside `Marked` every tensor made for `cuda` lies on the CPU and bears a mark; an
operation that a GPU would refuse, as its operands lie in two places, is refused here as well.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from flowhelpers import deactivation, steering
from flowhelpers.activations import preflight
from flowhelpers.activations.sampling import draw_sample
from flowhelpers.activations.sparse import collect, read_sample
from flowhelpers.core import directions, machine
from flowhelpers.core.features import FeatureId, Site
from flowhelpers.groups.occurrences import find_occurrences
from flowhelpers.interventions import generation
from flowhelpers.interventions.edits import add, add_per_row, rescale
from flowhelpers.labels import describe as labels
from flowhelpers.matching import cosine
from flowhelpers.matching.scores import transition
from flowhelpers.matching.table import match_table
from flowhelpers.steering import controls, themes
from flowhelpers.steering.judge_embedded import mean_losses
from flowhelpers.suites.load import Suite, load_suite
from flowhelpers.suites.model import final_norm, logits_of, tokenize
from flowhelpers.training import measures

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# What takes only the shape or the type of a second tensor, or copies from one device to another.
LIKE = {"view_as", "expand_as", "reshape_as", "type_as", "zeros_like", "full_like", "ones_like"}
ACROSS = {"copy_", "__get__", "__set__", "_copy_from"} | (LIKE - {"type_as"})
INDEXING = {"__getitem__", "__setitem__", "index_put_", "index_put"}
TO_HOST = {"numpy", "__array__", "tolist", "item"}


def is_marked(tensor: Tensor) -> bool:
    """Whether a tensor is said to lie on the GPU."""
    return vars(tensor).get("on_gpu", False)


def place(tensor: Tensor, on_gpu: bool = True) -> None:
    """A tensor is said to lie on the GPU."""
    vars(tensor)["on_gpu"] = on_gpu


class Marked(TorchFunctionMode):
    """Torch as it is with a GPU, in what it refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        first: Any = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__":
            return self._property(func, args, first)
        if name in ("numpy", "__array__") and first is not None and is_marked(first):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        marked = self._place(func, name, args, kwargs, inputs, first)
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        if marked and name == "mm" and "out_dtype" in kwargs:  # which a CPU does not have
            args = tuple(each.to(kwargs["out_dtype"]) for each in args)
            del kwargs["out_dtype"]
        if marked and kwargs.get("generator") is not None:
            raise RuntimeError("expected a 'cuda' device type for generator but found 'cpu'")
        found = func(*args, **kwargs)
        if (
            first is not None
            and found is first
            and name in ("to", "cpu")
            and marked != is_marked(first)
        ):
            found = func(first.view_as(first), *args[1:], **kwargs)  # a copy on another device
        if name not in TO_HOST:
            for leaf in tree_leaves(found):
                if isinstance(leaf, Tensor) and (marked or leaf is not first):
                    place(leaf, marked)
        return found

    def _property(self, func: Any, args: Any, tensor: Tensor) -> Any:
        of = getattr(func, "__self__", None)
        if of is Tensor.device:
            return GPU if is_marked(tensor) else CPU
        if of is Tensor.is_cuda:
            return is_marked(tensor)
        found = func(*args)
        if isinstance(found, Tensor):
            place(found, is_marked(tensor))
        return found

    def _place(
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], first: Any
    ) -> bool:
        """Whether the result lies on the GPU."""
        if name == "cpu":
            return False
        asked = [each for each in (*args, *kwargs.values()) if _is_device(each)]
        if asked:
            return torch.device(asked[0]).type == "cuda"
        if name in ("to", "type_as") and len(inputs) > 1:
            return is_marked(inputs[1])
        if name in ACROSS or (first is not None and name in LIKE):
            return is_marked(first)
        if first is not None and name in INDEXING:
            return self._indexed(name, args, inputs, first)
        places = {is_marked(each) for each in inputs if each.dim() or is_marked(each)}
        if len(places) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        return bool(places) and places.pop()

    def _indexed(self, name: str, args: Any, inputs: list[Tensor], first: Tensor) -> bool:
        indices = [each for each in tree_leaves(args[1]) if isinstance(each, Tensor)]
        if not is_marked(first) and any(is_marked(each) and each.dim() for each in indices):
            raise RuntimeError(f"{name}: indices should be on cpu, as the indexed tensor is")
        values = [each for each in args[2:3] if isinstance(each, Tensor)]
        for value in values:
            if indices and value.dim() and is_marked(value) != is_marked(first):
                raise RuntimeError(f"{name}: expected values on the device of the tensor")
        return is_marked(first)


def _is_device(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith(("cuda", "cpu"))
    return isinstance(value, torch.device)


def _on_cpu(value: Any) -> Any:
    return CPU if _is_device(value) else value


def mark(module: torch.nn.Module) -> None:
    """All weights of a module are said to lie on the GPU."""
    for tensor in (*module.parameters(), *module.buffers()):
        place(tensor)
    for part in module.modules():  # what is no buffer, as of rotary embeddings
        for value in vars(part).values():
            if isinstance(value, Tensor):
                place(value)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def suite(request: pytest.FixtureRequest, planted_folder: Any) -> Iterator[Suite]:
    """The planted suite on the marked device, of which a pass may take half a GiB."""
    found = load_suite(planted_folder, dtype=request.param)
    mark(found.model.bridge)
    mark(found.model.bridge.original_model)
    found.model.bridge.cfg.device = str(GPU)
    for sae in found.saes.values():
        mark(sae.lens_sae)
        for tensor in (sae.decoder, sae.norms, sae.excluded):
            place(tensor)
    with pytest.MonkeyPatch.context() as patch, Marked():
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
        for module in (cosine, directions):
            patch.setattr(module, "quick_dtype", lambda device: torch.bfloat16)
        assert found.model.device == GPU
        yield replace(found, device="cuda")


def test_the_mark_refuses_what_a_gpu_refuses() -> None:
    with Marked():
        there, here = torch.ones(3, 2, device="cuda"), torch.ones(3, 2)
        assert there.is_cuda
        assert (there + 1).is_cuda
        assert there.T.device == GPU
        assert not there.cpu().is_cuda
        assert there.is_cuda
        assert here.to(there).is_cuda
        assert (there[torch.tensor([0])] + there.new_zeros(2) * torch.tensor(2.0)).is_cuda
        for refused in (
            lambda: there + here,
            lambda: here[there[:, 0] > 0],
            lambda: torch.cat([there, here]),
            lambda: torch.isin(there, here),
            lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError):
                refused()
        with pytest.raises(TypeError):
            there.numpy()
        with pytest.raises(TypeError):
            np.asarray(there)


def test_matching(suite: Suite, tmp_path: Any) -> None:
    for method in ("cosine", "random", "permutation"):
        assert len(match_table(suite, k=2, method=method, cache=tmp_path))
    folded = match_table(
        suite, k=1, method="permutation", weights="all", folded=True, cache=tmp_path
    )
    assert len(folded)
    assert len(match_table(suite, k=2, method="pearson", texts=toys.TEXTS * 4, cache=tmp_path))
    later, earlier = (suite.sae(f"{layer}/res").directions for layer in (1, 0))
    found = cosine.top_k_cosine(later, earlier, 2)
    assert found.indices.is_cuda
    assert transition(found, len(earlier)).is_cuda
    long = torch.nn.functional.normalize(torch.randn(300, 32, device="cuda"), dim=1)
    assert cosine.top_k_cosine(long, long, 1).indices[:, 0].tolist() == [*range(300)]


def test_features_of_texts(suite: Suite, tmp_path: Any) -> None:
    activations = collect(suite, toys.TEXTS[:2])
    sample = draw_sample(suite.model, {"here": toys.TEXTS[:2]}, 3)
    read = read_sample(suite, sample, tmp_path)
    assert len(read.tokens)
    assert len(activations.tokens)
    matches = match_table(suite, k=1, cache=tmp_path)
    assert len(find_occurrences(matches, activations).table)
    assert len(labels.describe_features(suite, ["1/res/3"], activations))
    assert len(preflight.run_preflight(suite, toys.TEXTS[:2]))
    tokens = tokenize(suite.model, toys.TEXTS[:2])
    assert len(measures.measure_saes(suite, tokens))
    assert measures.bits_per_byte(suite, tokens)[0] > 0
    assert np.isfinite(mean_losses(suite.model, toys.TEXTS[:2])).all()
    assert len(labels.top_logit_tokens(suite, "1/res/3"))
    assert len(themes.output_scores(suite, ["1/res/3", "2/mlp/1"], "The cat sat", batch_size=2))


def test_deactivation(suite: Suite, tmp_path: Any) -> None:
    matches = match_table(suite, k=1, cache=tmp_path)
    sample = draw_sample(suite.model, {"here": toys.TEXTS[:2]}, 2)
    activations = read_sample(suite, sample, tmp_path)
    targets = deactivation.draw_targets(activations, [1, 2], 1)
    sources = deactivation.sources_of(targets, matches, activations)
    for activation in ("clean", "live"):
        cases, edits = deactivation.ablation_cases(
            targets, deactivation.active_predecessors(sources), activation=activation
        )
        table = deactivation.deactivate(
            suite, sample.ids, targets, cases, edits, sources, loss=True
        )
        assert len(table)
    assert len(deactivation.downstream_effects(suite, sample.ids, targets, cases, edits, matches))
    deactivation.equal_norm(suite, targets, sources, activations)
    found = deactivation.table_1(suite, sample.ids, targets, {"top-1": sources}, activations)
    assert len(found)


def test_edits_and_steering(suite: Suite) -> None:
    sae = suite.sae("1/res")
    features = [FeatureId(1, "res", 3), FeatureId(1, "res", 5)]
    direction = sae.direction(features[0])
    ids = tokenize(suite.model, toys.TEXTS).ids
    for edit in (
        add(Site(1, "res"), direction, 20.0),
        rescale(sae, features, 3.0, [1]),
        rescale(sae, features, 0.0),
        add_per_row(Site(1, "res"), torch.arange(2), 20 * direction.expand(2, -1)),
    ):
        assert logits_of(suite.model, ids, [edit]).is_cuda
    broken = torch.stack([direction, direction / 0])
    with pytest.raises(ValueError, match="is given nan"):
        add_per_row(Site(1, "res"), torch.arange(2), broken)
    assert sae.contribution(features[0], torch.tensor(1.5)).shape == direction.shape
    assert final_norm(suite.model, direction[None].to(suite.model.unembedding)).is_cuda
    plans = {
        "none": None,
        "add": steering.make_plan(suite, ["1/res/3", "2/res/2"], 2.0),
        "two": steering.make_plan(suite, ["1/res/3", "1/mlp/2"], 2.0, unit="unit"),
        "rescale": steering.make_plan(suite, ["1/res/3", "2/res/2"], 0.0, "rescale"),
    }
    means = controls.difference_of_means(
        suite.model, Site(1, "res"), toys.TEXTS[:2], toys.TEXTS[2:]
    )
    plans["means"] = {Site(1, "res"): means}
    texts = steering.steer(suite, plans, "The cat", 3, 5, show_progress=False)
    assert len(texts) == 3 * len(plans)
    assert len(controls.side_effects(suite, plans, toys.TEXTS)) == len(plans)
    assert controls.total_norm(suite, plans["add"]) > 0
    twin = controls.random_feature_control(suite, plans["add"], collect(suite, toys.TEXTS))
    assert len(twin.steps) == 2
    with plans["rescale"].on(suite):
        assert len(generation.generate(suite.model, "The cat", 4)) == 1


def test_free_memory_counts_what_torch_keeps_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"mem_get_info": (5, 9), "memory_reserved": 3, "memory_allocated": 1}
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert machine.free_memory("cuda:0") == 7
