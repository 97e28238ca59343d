"""Features matched across layers and modules by decoder cosine (paper 3.2 and 3.3)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
