"""Physical model surgery for PyTorch vision networks: smaller tensors, verified, measured in ONNX Runtime.

    import surgery
    result = surgery.shrink(model, example_inputs, budget=surgery.Budget(macs=0.5))
    result.model                        # the compact nn.Module, trainable
    surgery.save(result, "shrunk/net")  # ONNX files, weights, plan and report with measured times

The names below are loaded on first use (PEP 562): `import surgery` alone imports neither torch nor any stage.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.allocate import allocate
    from surgery.check import check
    from surgery.couple import couple
    from surgery.cut import cut
    from surgery.deliver import load, save
    from surgery.errors import SurgeryError
    from surgery.ir import Budget, Plan
    from surgery.pipeline import Result, apply, recover, shrink
    from surgery.recover.teaching import Training
    from surgery.score import score
    from surgery.trace import trace

__all__ = [
    "Budget",
    "Plan",
    "Result",
    "SurgeryError",
    "Training",
    "allocate",
    "apply",
    "check",
    "couple",
    "cut",
    "load",
    "recover",
    "save",
    "score",
    "shrink",
    "trace",
]

__version__ = "0.1.0"

_HOME = {
    "Budget": "ir",
    "Plan": "ir",
    "Result": "pipeline",
    "SurgeryError": "errors",
    "Training": "recover.teaching",
    "allocate": "allocate",
    "apply": "pipeline",
    "check": "check",
    "couple": "couple",
    "cut": "cut",
    "load": "deliver",
    "recover": "pipeline",
    "save": "deliver",
    "score": "score",
    "shrink": "pipeline",
    "trace": "trace",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'surgery' has no attribute '{name}'")
    value = getattr(import_module(f"surgery.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `surgery.trace` the function: importing the submodule of that name would otherwise overwrite it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
