from . import across as across
from . import activations as activations
from . import core as core
from . import deactivation as deactivation
from . import flow as flow
from . import groups as groups
from . import interventions as interventions
from . import labels as labels
from . import matching as matching
from . import neighbours as neighbours
from . import paper as paper
from . import runs as runs
from . import steering as steering
from . import suites as suites
from . import training as training
from .activations import collect as collect
from .explorer import explore as explore
from .flow import flow_graph as flow_graph
from .matching import match_table as match_table
from .steering import make_plan as make_plan
from .steering import steer as steer
from .suites import load_suite as load_suite

__version__: str
