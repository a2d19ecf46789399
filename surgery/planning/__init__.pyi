from . import profiling as profiling, refinement as refinement
from .allocation import SCOPES as SCOPES, allocate as allocate
from .decision import Choice as Choice, Decision as Decision, decide as decide
from .forecast import Forecast as Forecast
from .latency_planner import Planner as Planner
from .latency_search import State as State, Worth as Worth, spend as spend
from .lowering import lower as lower
from .refinement import int8_of as int8_of
from .repetition import as_planned as as_planned, repeat as repeat, traced as traced
