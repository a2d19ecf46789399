from .api import compare as compare, recover as recover, shrink as shrink
from .capture import trace as trace
from .config import Budget as Budget, Recipe as Recipe, recipe as recipe
from .core import Plan as Plan
from .coupling import couple as couple
from .cutting import check as check, cut as cut
from .delivery import load as load, save as save
from .errors import (
    BudgetUnreachable as BudgetUnreachable,
    CheckFailed as CheckFailed,
    IllegalCut as IllegalCut,
    InvalidInput as InvalidInput,
    PlanMismatch as PlanMismatch,
    SurgeryError as SurgeryError,
    UnsupportedModel as UnsupportedModel,
)
from .importance import criterion as criterion, score as score
from .inputs import load_model as load_model
from .pipeline import Result as Result, apply as apply
from .planning import allocate as allocate
from .recovery import recovery_method as recovery_method

__version__: str
