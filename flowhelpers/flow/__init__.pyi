from .files import (
    load_graph as load_graph,
    save_graph as save_graph,
    to_attribution_graph as to_attribution_graph,
)
from .graph import (
    FlowGraph as FlowGraph,
    ancestors as ancestors,
    descendants as descendants,
    flow_graph as flow_graph,
    keep_nodes as keep_nodes,
    labelled as labelled,
    layer_by_layer as layer_by_layer,
    path as path,
    turns as turns,
)
from .lifespans import (
    feature_lifespans as feature_lifespans,
    flow_by_layer as flow_by_layer,
    funnels as funnels,
)
from .plots import (
    before_after as before_after,
    births_and_deaths as births_and_deaths,
    flow_picture as flow_picture,
    lifespan_map as lifespan_map,
    schematic as schematic,
)
from .svg import flow_svg as flow_svg
