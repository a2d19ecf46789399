"""Recover a compact model's accuracy, and evaluate it against the dense model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
