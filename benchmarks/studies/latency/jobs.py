"""Which rows the study has, in the order in which they matter, and which of them a call asks for.

A row is one job: a network, a target, and a number of threads. Its key is its name in the results file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from types import MappingProxyType

PARTS = ("speed", "channels", "accuracy", "prediction", "profile")
TARGETS = (0.5, 0.7, 0.35)
NETWORKS = ("resnet18", "mobilenet_v2", "resnet50", "vgg16_bn", "efficientnet_b0", "densenet121", "convnext_tiny")
TWO_THREADS = ("resnet18", "mobilenet_v2")
PREDICTED = ("resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "efficientnet_b0")
CHANNELS = ("resnet18", "resnet50", "mobilenet_v2", "vgg16_bn")
SHARES = (0.1, 0.3)
"""Of the channels, that torch-pruning takes away."""
TRAINED: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "resnet20": (0.7, 0.5, 0.35),
        "resnet56": (0.7, 0.5, 0.35),
        "mobilenet_v2": (0.85, 0.7, 0.5),
        "squeezenet": (0.85, 0.7, 0.5),
    }
)
"""Networks with real weights, and the latencies that are asked of them."""

LIMIT_S: Mapping[str, float] = MappingProxyType({"speed": 900, "channels": 600, "accuracy": 1200, "profile": 1500})


@dataclass(frozen=True, slots=True)
class Job:
    """One row. `amount` is the target latency, or of `channels` the share that goes; 0 where there is none."""

    part: str
    network: str
    amount: float = 0.0
    threads: int = 1

    @property
    def key(self) -> str:
        """The row's name."""
        return f"{self.part} {self.network} {self.amount:g} {self.threads}"


def every_job() -> list[Job]:
    """Every row of the study, those first that are needed most."""
    channels = [Job("channels", name, share) for name in CHANNELS for share in SHARES]
    trained = [Job("accuracy", name, t) for t in (0.7, 0.5, 0.35, 0.85) for name, ts in TRAINED.items() if t in ts]
    one = {target: [Job("speed", name, target) for name in NETWORKS] for target in TARGETS}
    two = {target: [Job("speed", name, target, 2) for name in TWO_THREADS] for target in TARGETS}
    needed = [Job("profile", "resnet18"), *trained[:8], *channels, *one[0.5], *two[0.5]]
    return [*needed, *one[0.7], *one[0.35], *trained[8:], *two[0.7], *two[0.35]]


def chosen(parts: Sequence[str], patterns: Iterable[str], jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs of these parts, all without any, whose key or network fits one of the patterns, if there are any.

    The table of predictions uses rows of `speed`: those are the jobs of `prediction`.
    """
    wanted = tuple(patterns)

    def fits(job: Job) -> bool:
        own = {job.part}
        if job.part == "speed" and job.threads == 1 and job.network in PREDICTED:
            own.add("prediction")
        named = not wanted or any(fnmatch(job.key, f"*{p}*") or fnmatch(job.network, p) for p in wanted)
        return named and (not parts or not own.isdisjoint(parts))

    return [job for job in jobs if fits(job)]
