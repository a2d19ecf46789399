from .batches import (
    Calibration as Calibration,
    calibration_images as calibration_images,
    classes_of as classes_of,
    derived_seed as derived_seed,
    read_batches as read_batches,
    read_item as read_item,
    seeded as seeded,
    specs_of as specs_of,
    split_batch as split_batch,
    unlabelled as unlabelled,
    validated_input as validated_input,
)
from .checkpoints import validate_kinds as validate_kinds
from .datasets import (
    UNKNOWN as UNKNOWN,
    Images as Images,
    as_dataset as as_dataset,
    as_loader as as_loader,
    batch_size as batch_size,
    evenly_spaced as evenly_spaced,
    open_images as open_images,
)
from .libraries import import_torchvision as import_torchvision
from .models import LoadedModel as LoadedModel, load_model as load_model
from .usercode import user_object as user_object
