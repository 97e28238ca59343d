"""See how features flow through a language model, and steer with what you saw."""

__version__ = "0.1.0"
