from . import artifacts as artifacts, saving as saving
from .precisions import (
    Precisions as Precisions,
    dominating as dominating,
    refuse_too_few as refuse_too_few,
    standing as standing,
    with_deployed as with_deployed,
)
from .saving import Measurement as Measurement, load as load, save as save, validate_output as validate_output
