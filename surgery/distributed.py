"""Distributed training: the first process decides, exports, times and writes; all of them train."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from surgery.core import Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(hours=24)
"""The others wait for the first as long as this: it may measure kernels and reconstruct meanwhile."""
GRACE = 3.0
"""Seconds for which the others leave the first to report: a launcher ends all processes as soon as one has failed."""

_WORD = "surgery: what went wrong"


def processes() -> int:
    """Return the number of processes, as set by `torchrun` or `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number; 0 is the first."""
    return int(os.environ.get("RANK", "0"))


def follows() -> bool:
    """Return whether this process runs on the first one's host, and would report the same errors."""
    return 0 < rank() == int(os.environ.get("LOCAL_RANK", rank()))


def connect() -> None:
    """Set up communication between the processes: to be called by all of them."""
    import torch  # saves start-up seconds
    from accelerate import PartialState  # saves start-up seconds

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def disconnect() -> None:
    """Take communication down, if it was set up."""
    if _store() is not None:
        sys.modules["torch"].distributed.destroy_process_group()


def send(plan: Plan, module: torch.nn.Module) -> None:
    """From the first process: send the others a plan, and the compact model's tensors."""
    import torch  # saves start-up seconds
    from safetensors.torch import save  # saves start-up seconds

    state = {name: x.detach().cpu().contiguous().clone() for name, x in module.state_dict().items()}
    torch.distributed.broadcast_object_list([plan.to_json(), save(state)], src=0)


def receive() -> tuple[Plan, dict[str, Tensor]]:
    """In the other processes: wait for the plan and the tensors."""
    import torch  # saves start-up seconds
    from safetensors.torch import load  # saves start-up seconds

    parcel: list[Any] = [None, None]
    torch.distributed.broadcast_object_list(parcel, src=0)
    return Plan.from_json(parcel[0]), load(parcel[1])


def lost(error: BaseException) -> bool:
    """Return whether an error says no more than that another process of the run has ended."""
    torch = sys.modules.get("torch")
    if processes() < 2 or torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))


def leave_word(sentence: str) -> bool:
    """In the other processes: report an error to the first one; return whether communication was set up."""
    try:
        store = _store()
        if store is not None:
            store.set(_WORD, f"process {rank()}: {sentence}")
    except RuntimeError:  # the store has ended, and the first process with it
        return False
    return store is not None


def word() -> str:
    """In the first process: return the error reported by another one, or an empty string."""
    try:
        store = _store()
        return str(store.get(_WORD).decode()) if store is not None and store.check([_WORD]) else ""
    except RuntimeError:  # the store has ended too
        return ""


def _store() -> Any:
    """The key-value store of all processes; None before communication is set up."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed.distributed_c10d._get_default_store()
