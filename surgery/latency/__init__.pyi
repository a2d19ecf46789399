from . import device as device, ort as ort, ratio as ratio
from .cache import Measured as Measured, Source as Source, table_source as table_source
from .fill import Point as Point
from .micro import FP32 as FP32, INT8 as INT8
from .ort import Limits as Limits, Timing as Timing, time as time
from .probe import Conditions as Conditions, available_cores as available_cores
from .ratio import TimerFailed as TimerFailed, environment as environment
from .session import Settings as Settings, by_operator as by_operator, describe as describe, peak_bytes as peak_bytes
from .tables import LatencyTable as LatencyTable, Stairs as Stairs, kind_of as kind_of
