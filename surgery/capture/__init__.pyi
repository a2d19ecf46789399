from . import submodule as submodule
from .submodule import Whole as Whole, reach as reach
from .tracing import (
    evaluating as evaluating,
    module_of as module_of,
    require_finite as require_finite,
    source_of as source_of,
    trace as trace,
    validate_inputs as validate_inputs,
)
