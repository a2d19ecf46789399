from . import submodule as submodule
from .passes import source_of as source_of
from .submodule import Whole as Whole, reach as reach
from .tracing import (
    evaluating as evaluating,
    module_of as module_of,
    trace as trace,
    validate_inputs as validate_inputs,
)
