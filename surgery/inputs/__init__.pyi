from .batches import (
    alike as alike,
    classes_of as classes_of,
    fitting as fitting,
    mixed as mixed,
    one as one,
    parted as parted,
    read as read,
    unknown as unknown,
)
from .compat import import_torchvision as import_torchvision
from .datasets import (
    UNKNOWN as UNKNOWN,
    Images as Images,
    as_dataset as as_dataset,
    as_loader as as_loader,
    open_images as open_images,
    spaced as spaced,
)
from .images import Calibration as Calibration, seen_by as seen_by
from .models import LoadedModel as LoadedModel, load_model as load_model
from .usercode import user_object as user_object
