from . import submodule as submodule
from .comparison import outputs_of as outputs_of, relative_error as relative_error
from .rewrite import cut as cut, masked as masked, masks_of as masks_of
from .submodule import Whole as Whole, reach as reach
from .tracers import Stages as Stages, stages_of as stages_of
from .verify import check as check
from .verify_dropped import check_dropped as check_dropped
