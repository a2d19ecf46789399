from .rewrite import masked as masked
from .tracers import Tracer as Tracer, check as check, cut as cut, tracer_of as tracer_of
from .verify import (
    check_whole as check_whole,
    describe_whole as describe_whole,
    outputs_of as outputs_of,
    relative_error as relative_error,
)
