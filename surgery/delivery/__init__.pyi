from .artifacts import (
    NAMES as NAMES,
    PLAN as PLAN,
    RECIPE as RECIPE,
    output_set as output_set,
    prepare as prepare,
)
from .files import weights_bytes as weights_bytes
from .saving import load as load, save as save, validate_output as validate_output
from .standings import Standing as Standing, dominating as dominating, standing as standing
