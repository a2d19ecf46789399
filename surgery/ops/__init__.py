"""Operator rules, one file per family: the only code specific to individual operators."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
