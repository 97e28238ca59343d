from .card import (
    measured_bars as measured_bars,
    stored_bars as stored_bars,
)
from .recipe import (
    train_suite as train_suite,
)
