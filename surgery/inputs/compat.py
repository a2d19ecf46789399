"""Import torchvision and timm, even if torchvision's C++ operators do not load.

torchvision's wheels contain operators built for one exact build of torch; with another build (such as a CPU torch with
a CUDA torchvision) `import torchvision` fails at the missing schema of `nms`. Classification and segmentation models
work without these operators, and detectors need them only in post-processing, so the two schemas are declared here if
they are missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType

import torch

from surgery.core import first_line
from surgery.errors import InvalidInput

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision() -> ModuleType:
    """Return torchvision; if its operators do not load, detectors can be built, but not post-process.

    Raises:
        InvalidInput: torchvision is not installed, or its import fails for another reason.
    """
    try:
        return _imported("torchvision", "torchvision")
    except InvalidInput as error:
        if "torchvision::" not in str(error):
            raise
    _declare_operators()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # modules left by the failed import
    return _imported("torchvision", "torchvision")


def import_timm() -> ModuleType:
    """Return timm, which requires torchvision; errors as in `import_torchvision`."""
    import_torchvision()
    return _imported("timm", "'model-surgery[timm]'")


def _imported(package: str, requirement: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        raise InvalidInput(f"{package} is not installed; install it with `pip install {requirement}`")
    try:
        return importlib.import_module(package)
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        raise InvalidInput(
            f"{package} is installed but does not import with torch {torch.__version__}: {first_line(error)}; "
            f"install a {package} that matches this torch"
        ) from error


@functools.cache
def _declare_operators() -> torch.library.Library:
    """Declare the missing schemas; the cache keeps the library, and so the declarations, alive."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)  # type: ignore[no-untyped-call]
    return library
