"""Exports of torch models to files that a runtime executes, each compared with its model before it is written."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)  # a user's own folder of this name: see `surgery/__init__.py`
