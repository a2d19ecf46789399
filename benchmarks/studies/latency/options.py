"""What can be made cheaper, or dearer, about a row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """The same for all rows of a call.

    Attributes:
        seconds: target duration of a row's timing; twelve rounds are made if they take up to four times as long.
        equal_latency: targets at which rivals are brought to our latency too; one thread only.
        equal_latency_of: which rivals.
        onnxsim: whether onnxsim's structured pruning is among them.
        criteria: of torch-pruning, on trained CIFAR networks.
        criteria_imagenet: the same on those of ImageNet, whose images take a hundred times as long to judge by.
        evaluations: networks that a rival may try to find a latency, on trained networks.
        torch_threads: with which images are judged; more than one crawls on a machine that is not idle.
        data_root: of the checkpoints and images; None: `SURGERY_DATA`, or `shared/data` next to the checkout.
    """

    seconds: float = 12.0
    equal_latency: tuple[float, ...] = (0.5,)
    equal_latency_of: tuple[str, ...] = ("torch-pruning", "torch-pruning, round_to 16", "uniform")
    onnxsim: bool = True
    criteria: tuple[str, ...] = ("l1", "lamp", "fpgm", "bn-scale")
    criteria_imagenet: tuple[str, ...] = ("l1", "lamp")
    evaluations: int = 6
    torch_threads: int = 1
    data_root: str | None = None
