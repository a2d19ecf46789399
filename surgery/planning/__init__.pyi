from . import profiling as profiling
from .allocation import allocate as allocate
from .choice import Choice as Choice, RefinementLog as RefinementLog
from .decision import (
    Decision as Decision,
    as_planned as as_planned,
    decide as decide,
    repeat as repeat,
    traced as traced,
)
from .forecast import Forecast as Forecast, State as State, predicted_ms as predicted_ms, widths_of as widths_of
from .latency_bench import LatencyBench as LatencyBench, int8_of as int8_of
from .latency_planner import LatencyPlanner as LatencyPlanner, WidthSearch as WidthSearch
from .latency_search import ImportanceLoss as ImportanceLoss, search as search
from .lowering import lower as lower
from .refinement import refined as refined
