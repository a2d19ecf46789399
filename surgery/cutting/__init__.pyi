from . import submodule as submodule
from .comparison import outputs_of as outputs_of, relative_error as relative_error
from .rewrite import masked as masked
from .submodule import Whole as Whole, reach as reach
from .tracers import Tracer as Tracer, check as check, cut as cut, tracer_of as tracer_of
