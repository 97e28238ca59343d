"""Methods beside the paper's: edges between features, and vectors to steer by."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
