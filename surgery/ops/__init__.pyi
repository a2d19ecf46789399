from .examples import between_convs as between_convs
from .moments import Moments as Moments, compressed as compressed, through as through
from .registry import (
    Call as Call,
    Dead as Dead,
    Macs as Macs,
    Replacement as Replacement,
    Rewrite as Rewrite,
    Rule as Rule,
    Scaled as Scaled,
    Shape as Shape,
    register as register,
    rules as rules,
)
