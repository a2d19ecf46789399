from . import comparison as comparison, device as device, ort as ort, ratio as ratio
from .blocks import Limits as Limits
from .cache import (
    VARIABLE as VARIABLE,
    Given as Given,
    Measured as Measured,
    Source as Source,
    table_source as table_source,
)
from .child import TimerFailed as TimerFailed, environment as environment
from .fill import Point as Point
from .machine import describe as describe
from .micro import FP32 as FP32, INT8 as INT8
from .operators import by_operator as by_operator
from .ort import Timing as Timing, time as time
from .probe import Conditions as Conditions, available_cores as available_cores
from .session import Settings as Settings
from .tables import LatencyTable as LatencyTable, Stairs as Stairs, kind_of as kind_of
from .worker import peak_bytes as peak_bytes
