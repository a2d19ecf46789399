"""Physical model surgery for PyTorch vision networks: smaller tensors, verified, measured in ONNX Runtime.

    import surgery
    result = surgery.shrink(model, example_inputs, surgery.recipe(macs=0.5))
    result.model                        # the compact nn.Module, trainable
    surgery.save(result, "shrunk/net")  # ONNX files, weights, plan and report with measured times

The public names are listed in `__init__.pyi` and loaded on first use: `import surgery` alone imports neither torch nor
any stage.
"""

import importlib as _importlib
import importlib.util as _importing
import sys as _sys
import warnings as _warnings
from pathlib import Path as _Path

import lazy_loader

__version__ = "0.1.0"


def _bind_exporters() -> None:
    """Bind the name `exporters` to the package that lies beside this one: in a checkout, a wheel, editable or not.

    A script's own folder comes first in `sys.path`, and may hold a folder `exporters` too. What lies in that one can
    still be imported, since our package looks for its modules there as well.
    """
    file = _Path(__file__).resolve().parent.with_name("exporters") / "__init__.py"
    found = getattr(_sys.modules.get("exporters"), "__file__", None)
    if found is not None and _Path(found).resolve() == file:
        return
    for name in [name for name in _sys.modules if name.partition(".")[0] == "exporters"]:
        del _sys.modules[name]
    spec = _importing.spec_from_file_location("exporters", file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None
    _sys.modules["exporters"] = _importing.module_from_spec(spec)
    spec.loader.exec_module(_sys.modules["exporters"])


_bind_exporters()
_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "Training":  # a public name of earlier versions
        _warnings.warn("surgery.Training: its fields are options of surgery.recipe now", DeprecationWarning, 2)
        return _importlib.import_module("surgery.api").training_options
    return _public(name)
