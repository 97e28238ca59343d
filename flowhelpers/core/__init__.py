"""What every part needs: names of features, files, caches, machines, bars, intervals, figures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
