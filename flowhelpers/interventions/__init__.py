"""Changing the residual stream: edits, batched one-token edits, generation under edits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
