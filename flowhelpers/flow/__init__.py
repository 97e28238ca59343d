"""Flow graphs: a feature through the layers (paper 3.3, Figures 1 and 2)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
