from .block_ablation import BlockAblation as BlockAblation, block_losses as block_losses
from .contractions import (
    Contraction as Contraction,
    Layer as Layer,
    drawn as drawn,
    find_contractions as find_contractions,
    value_rows as value_rows,
)
from .head_selection import arrange as arrange, settled as settled
from .least_squares import Moments as Moments, Solution as Solution, folds_for as folds_for, solve as solve
from .scoring import (
    Evidence as Evidence,
    criterion as criterion,
    measures_losses as measures_losses,
    score as score,
    weights_of as weights_of,
)
from .signal import Consumer as Consumer, Signal as Signal, loss_of as loss_of, signal_of as signal_of
