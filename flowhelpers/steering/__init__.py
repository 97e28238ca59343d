"""Texts steered by features of many layers, and judged (paper 5.3)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
