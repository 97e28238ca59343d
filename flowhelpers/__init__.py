"""See how features flow through a language model, and steer with what you saw."""

import os
import sys

__version__ = "0.1.0"

# A thread of torch that waits for another leaves its core to other programs, after the microseconds
# that it would take to be woken. OpenMP reads this once, when torch is loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
