"""See how features flow through a language model, and steer with what you saw.

    from flowhelpers import flow_graph, load_suite, match_table
    suite = load_suite("flowlet")
    graph = flow_graph(suite, "5/res/0", match_table(suite))

Each folder is one step of the method: `flowhelpers.matching`, `flowhelpers.flow` and so on.
"""

import os
import sys

import lazy_loader

__version__ = "0.1.0"

# Threads of torch that wait for each other spin only briefly, and then leave the core to other
# programs. OpenMP reads this once, when torch is loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
