from .blocks import dead_blocks as dead_blocks, find_blocks as find_blocks, in_float64 as in_float64, spread as spread
from .compact_graph import CompactGraph as CompactGraph, hold as hold
from .cost import (
    Sizes as Sizes,
    cost_functions as cost_functions,
    flush_mib as flush_mib,
    kept_costs as kept_costs,
    priced as priced,
)
from .coupler import (
    ALONE as ALONE,
    couple as couple,
    frozen_axes as frozen_axes,
    groups_of as groups_of,
    index_table as index_table,
    kept_names as kept_names,
    propagate_labels as propagate_labels,
)
from .dropping import BranchConstants as BranchConstants, branch_constants as branch_constants, drop as drop
from .masking import batch_size as batch_size, called as called, masked_run as masked_run, values_in as values_in
from .plans import (
    NO_SETTINGS as NO_SETTINGS,
    Cut as Cut,
    Places as Places,
    plan_from_dead as plan_from_dead,
    positions as positions,
    reordered as reordered,
    reorderings as reorderings,
    require_own_cuts as require_own_cuts,
)
