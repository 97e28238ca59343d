from .card import measured_bars as measured_bars
from .card import stored_bars as stored_bars
from .recipe import train_suite as train_suite
