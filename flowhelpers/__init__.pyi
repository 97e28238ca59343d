from . import (
    across as across,
    activations as activations,
    core as core,
    deactivation as deactivation,
    flow as flow,
    groups as groups,
    interventions as interventions,
    labels as labels,
    matching as matching,
    paper as paper,
    runs as runs,
    steering as steering,
    suites as suites,
    training as training,
)
from .activations import collect as collect
from .flow import flow_graph as flow_graph
from .matching import match_table as match_table
from .steering import make_plan as make_plan, steer as steer
from .suites import load_suite as load_suite

__version__: str
