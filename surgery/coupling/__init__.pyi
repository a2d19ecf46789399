from .blocks import (
    blocks_within as blocks_within,
    branch_constants as branch_constants,
    drop as drop,
    find_blocks as find_blocks,
)
from .compact_graph import CompactGraph as CompactGraph, hold as hold
from .constants import BranchConstants as BranchConstants, spread as spread
from .cost import (
    Sizes as Sizes,
    batch_size as batch_size,
    cost_functions as cost_functions,
    flush_mib as flush_mib,
    kept_costs as kept_costs,
    priced as priced,
)
from .coupler import couple as couple, frozen_axes as frozen_axes, groups_of as groups_of, kept_names as kept_names
from .dead import dead_blocks as dead_blocks
from .depthwise import input_correlation as input_correlation
from .head_order import (
    Held as Held,
    Layout as Layout,
    Places as Places,
    Reordering as Reordering,
    layouts as layouts,
    positions as positions,
    reorder as reorder,
    reordered as reordered,
    reorderings as reorderings,
)
from .labelled_graph import (
    index_table as index_table,
    propagate_labels as propagate_labels,
    rewrite_view as rewrite_view,
)
from .masking import InDouble as InDouble, masked_run as masked_run
from .plans import (
    NO_SETTINGS as NO_SETTINGS,
    Cut as Cut,
    plan_from_dead as plan_from_dead,
    require_own_cuts as require_own_cuts,
)
