from . import reconstruction as reconstruction, run as run
from .agreement import Agreement as Agreement, Reference as Reference, paired_drop as paired_drop
from .distillation import training_of as training_of
from .evaluation import (
    Evaluate as Evaluate,
    checked as checked,
    open_evaluation as open_evaluation,
    points_lost as points_lost,
)
from .run import (
    Recovery as Recovery,
    copy_of as copy_of,
    level_of as level_of,
    recovered as recovered,
    validate_training as validate_training,
    verdict_on as verdict_on,
    with_recovery as with_recovery,
)
from .steps import (
    Outcome as Outcome,
    Step as Step,
    Subject as Subject,
    Task as Task,
    recovery_method as recovery_method,
)
from .teaching import History as History, Training as Training
from .training import TrainingRun as TrainingRun, refuse_batch as refuse_batch, train as train
