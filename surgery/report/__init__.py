"""Reports: data of a run, and sections rendered on a terminal, in Markdown and in HTML."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
