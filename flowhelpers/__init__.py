"""See how features flow through a language model, and steer with what you saw.

    from flowhelpers import flow_graph, load_suite, match_table
    graph = flow_graph(load_suite("flowlet"), "5/res/0", match_table(load_suite("flowlet")))

Each folder is one step of the method: `flowhelpers.matching`, `flowhelpers.flow` and so on.
"""

import os
import sys

import lazy_loader

__version__ = "0.1.0"

# A thread of torch that waits for another leaves its core to other programs, after the microseconds
# that it would take to be woken. OpenMP reads this once, when torch is loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
