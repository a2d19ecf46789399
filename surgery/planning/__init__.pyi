from . import profiling as profiling
from .allocation import allocate as allocate
from .choice import HIGHEST as HIGHEST, Choice as Choice, RefinementLog as RefinementLog, with_dead as with_dead
from .decision import (
    Decision as Decision,
    as_planned as as_planned,
    choice_of as choice_of,
    decide as decide,
    refined as refined,
    repeat as repeat,
    traced as traced,
)
from .latency_planner import LatencyPlanner as LatencyPlanner, WidthSearch as WidthSearch
from .latency_search import (
    Forecast as Forecast,
    ImportanceLoss as ImportanceLoss,
    State as State,
    predicted_ms as predicted_ms,
    search as search,
)
from .lowering import lower as lower
from .refinement import LatencyBench as LatencyBench, int8_of as int8_of
