from .block_ablation import BlockAblation as BlockAblation, block_losses as block_losses
from .contractions import (
    CONVOLUTIONS as CONVOLUTIONS,
    LINEAR as LINEAR,
    NORM as NORM,
    Contraction as Contraction,
    find_contractions as find_contractions,
)
from .evidence import Evidence as Evidence, criterion as criterion
from .folding import Folded as Folded
from .head_selection import arrange as arrange, settled as settled
from .least_squares import Moments as Moments, Solution as Solution, folds_for as folds_for, solve as solve
from .rows import Window as Window, convolution_rows as convolution_rows, drawn as drawn, value_rows as value_rows
from .scoring import measures_losses as measures_losses, score as score, weights_of as weights_of
from .signal import (
    Consumer as Consumer,
    Signal as Signal,
    block_worth as block_worth,
    loss_of as loss_of,
    signal_of as signal_of,
)
