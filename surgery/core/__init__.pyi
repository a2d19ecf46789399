from .batch_norms import BatchStatistics as BatchStatistics, conditioned_copy as conditioned_copy
from .blame import (
    UNKNOWN as UNKNOWN,
    explained as explained,
    first_line as first_line,
    last_own_line as last_own_line,
    user_line as user_line,
    visible as visible,
    where_raised as where_raised,
)
from .cache import VARIABLE as VARIABLE, cache_folder as cache_folder, remembered as remembered
from .callee import (
    Callee as Callee,
    buffers_kept as buffers_kept,
    copied as copied,
    digest_of as digest_of,
    empty_caches as empty_caches,
    fresh as fresh,
    require_finite as require_finite,
    traceable as traceable,
)
from .conditioning import (
    BLIND as BLIND,
    ROUNDINGS as ROUNDINGS,
    TOLERANCE as TOLERANCE,
    elsewhere as elsewhere,
    narrowest as narrowest,
    sample_inputs as sample_inputs,
    well_conditioned as well_conditioned,
)
from .counting import count_macs as count_macs, count_params as count_params
from .files import file_bytes as file_bytes, replacing as replacing
from .graphs import (
    Compute as Compute,
    Executor as Executor,
    Frontier as Frontier,
    all_tensors as all_tensors,
    arguments_of as arguments_of,
    attribute as attribute,
    flat_outputs as flat_outputs,
    hint as hint,
    interpret as interpret,
    is_symbolic as is_symbolic,
    mutates as mutates,
    shapes_of as shapes_of,
    state_of as state_of,
    tensors_of as tensors_of,
)
from .ir import (
    KEPT as KEPT,
    Arrangement as Arrangement,
    AxisCut as AxisCut,
    Block as Block,
    CheckResult as CheckResult,
    CompactModel as CompactModel,
    CostFn as CostFn,
    Coupling as Coupling,
    Frozen as Frozen,
    Group as Group,
    InputSpec as InputSpec,
    Plan as Plan,
    Program as Program,
    Scores as Scores,
    Site as Site,
)
from .kernels import (
    Kernel as Kernel,
    Operand as Operand,
    Placed as Placed,
    Size as Size,
    Step as Step,
    Widths as Widths,
    resolved as resolved,
    step as step,
)
from .labels import (
    LabelledGraph as LabelledGraph,
    LabelMismatch as LabelMismatch,
    LabelSet as LabelSet,
    Layer as Layer,
    Layers as Layers,
    Mask as Mask,
    Masks as Masks,
    Value as Value,
    gather as gather,
    is_constant as is_constant,
)
from .scratch import (
    locked_folder as locked_folder,
    remove_abandoned as remove_abandoned,
    scratch_folder as scratch_folder,
)
from .stages import Clock as Clock, Progress as Progress, quiet as quiet
from .torch_speed import ONE_AT_A_TIME as ONE_AT_A_TIME, CaptureLimits as CaptureLimits, lean as lean
