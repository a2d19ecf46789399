from .artifacts import NAMES as NAMES, prepare as prepare
from .saving import (
    dominating as dominating,
    load as load,
    save as save,
    validate_output as validate_output,
    weights_bytes as weights_bytes,
)
