"""Export torch models to ONNX and other formats, verified against the model before they are written."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)  # a user's own folder of this name: see `surgery/__init__.py`
