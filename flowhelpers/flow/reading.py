"""Tables and a sentence that read a flow graph, and the features where chains meet."""

from typing import TYPE_CHECKING

from flowhelpers.core.features import MODULES
from flowhelpers.flow.graph import FlowGraph
from flowhelpers.matching.scores import dominant_module

if TYPE_CHECKING:
    import pandas as pd


def layer_by_layer(graph: FlowGraph) -> "pd.DataFrame":
    """The chain of a graph as the paper's appendix E reads it, one row a residual node.

    Returns:
        `feature`, `label`, `step` (the score of the step into it), `s_res`, `s_mlp`, `s_att`,
        `class`, `high above` (the thresholds that it goes by, for stream / MLP / attention) and
        `adds`: the modules' matches that are high, with their labels.
    """
    chain, labels = graph.chain, graph.nodes.set_index("feature")["label"].str.replace("\n", "; ")
    steps = graph.edges[graph.edges["module"] == "res"].groupby("target")["score"].max()
    story = chain[["feature", *(f"s_{module}" for module in MODULES), "class"]]
    story.insert(1, "label", chain["feature"].map(labels))
    story.insert(2, "step", chain["feature"].map(steps).astype(float))
    limits = chain[[f"high_{module}" for module in MODULES]].map("{:.3f}".format)
    story["high above"] = limits.replace("nan", "–").agg(" / ".join, axis=1)
    high = [
        [node[f"from_{m}"] for m in MODULES[1:] if node[f"s_{m}"] > node[f"high_{m}"]]
        for node in chain.to_dict("records")
    ]
    adds = [" | ".join(f"{source}: {labels[source]}" for source in sources) for sources in high]
    return story.assign(adds=adds)


def turns(graph: FlowGraph) -> "pd.DataFrame":
    """The residual nodes where the meaning turns: a module lies nearer than the stream before.

    These have an s(M) or s(A) that is high and above s(R) (paper 3.3, class C and those of class B
    that lean on the module). Layer 0, which has no s(R), is left out.

    Returns:
        Rows of `nodes`, with the module as `turned_by` (`matching.dominant_module`).
    """
    chain = graph.chain
    chain["turned_by"] = dominant_module(chain)
    near = chain["s_mlp"].where(chain["turned_by"] == "mlp", chain["s_att"])
    return chain[chain["turned_by"].notna() & (near > chain["s_res"])]


def in_words(graph: FlowGraph) -> str:
    """A sentence: steps above chance, classes after layer 0, and where a module lies nearer."""
    steps, chain = graph.edges[graph.edges["module"] == "res"], graph.chain
    above = int((steps["score"] > steps["null"]).sum())
    counts = chain.loc[chain["layer"] > 0, "class"].value_counts()
    classes = ", ".join(f"{count} {name}" for name, count in counts.items())
    turned = [f"{row['feature']} ({row['turned_by']})" for row in turns(graph).to_dict("records")]
    return (
        f"{above} of {len(steps)} steps of the chain are above chance; after layer 0: {classes};"
        f" a module lies nearer than the stream at {', '.join(turned) or 'no layer'}"
    )
