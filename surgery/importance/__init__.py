"""Importance of units and blocks: criteria, and the statistics they use from weights and images."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
