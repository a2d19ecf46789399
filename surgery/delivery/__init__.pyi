from .saving import (
    NAMES as NAMES,
    dominating as dominating,
    load as load,
    prepare as prepare,
    save as save,
    validate_output as validate_output,
    weights_bytes as weights_bytes,
)
