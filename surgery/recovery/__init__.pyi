from . import reconstruction as reconstruction, run as run
from .evaluation import (
    Agreement as Agreement,
    Evaluate as Evaluate,
    Reference as Reference,
    open_metric as open_metric,
    paired_drop as paired_drop,
    points_lost as points_lost,
)
from .run import (
    Recovery as Recovery,
    Step as Step,
    Subject as Subject,
    copy_of as copy_of,
    evaluated_again as evaluated_again,
    recovered as recovered,
    recovery_method as recovery_method,
    validate_dense as validate_dense,
    validate_training as validate_training,
    verdict_on as verdict_on,
    with_recovery as with_recovery,
)
from .training import History as History, TrainingRun as TrainingRun, train as train, validate_batch as validate_batch
