"""The one door through which torchvision and timm are imported.

torchvision's wheels carry C++ operators built for one exact build of torch; next to another build (a CPU torch beside a
CUDA torchvision, say) the operators do not load and `import torchvision` stops at the missing schema of `nms`. Every
classification and segmentation model works without those operators, and detectors need them only in post-processing,
so the two schemas are declared here when, and only when, they are missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType

import torch

from surgery.errors import InvalidInput

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its C++ operators do not load; a matching pair is left as it is.

    Returns:
        The module `torchvision`. Where the operators are missing, detectors build, but cannot post-process.

    Raises:
        InvalidInput: torchvision is not installed, or does not import for another reason.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise InvalidInput("torchvision is not installed; install it with `pip install torchvision`")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise _broken("torchvision", error) from error
    except (ImportError, OSError, AttributeError) as error:
        raise _broken("torchvision", error) from error
    _declare_operators()
    _forget("torchvision")
    try:
        return importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        raise _broken("torchvision", error) from error


def import_timm() -> ModuleType:
    """Import timm, which itself needs torchvision.

    Returns:
        The module `timm`.

    Raises:
        InvalidInput: timm or torchvision is not installed, or does not import.
    """
    if importlib.util.find_spec("timm") is None:
        raise InvalidInput("timm is not installed; install it with `pip install 'model-surgery[timm]'`")
    import_torchvision()
    try:
        return importlib.import_module("timm")
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        raise _broken("timm", error) from error


@functools.cache
def _declare_operators() -> torch.library.Library:
    """Declare the schemas that are missing; the cache keeps the library, and with it the declarations, alive."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)  # type: ignore[no-untyped-call]
    return library


def _forget(package: str) -> None:
    """Drop what a failed import left in `sys.modules`, so that the next one starts afresh."""
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]


def _broken(package: str, error: Exception) -> InvalidInput:
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InvalidInput(
        f"{package} is installed but does not import with torch {torch.__version__}: {cause}; "
        f"install a {package} that matches this torch"
    )
