"""Data types passed between stages, and shared helpers: labels, execution, progress, tolerances, error locations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
