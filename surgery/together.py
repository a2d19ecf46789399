"""Several processes of one run: the first decides, exports, times and writes; all of them train."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from surgery.ir import Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(hours=24)
"""The others wait for the first as long as this: it may measure kernels and reconstruct meanwhile."""


def processes() -> int:
    """Return how many processes there are, as `torchrun` and `accelerate launch` tell."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number; 0 is the first."""
    return int(os.environ.get("RANK", "0"))


def meet() -> None:
    """Set up communication between the processes: to be called by all of them."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def send(plan: Plan, module: torch.nn.Module) -> None:
    """From the first process: send the others a plan, and the compact model's tensors."""
    import torch
    from safetensors.torch import save

    state = {name: x.detach().cpu().contiguous().clone() for name, x in module.state_dict().items()}
    torch.distributed.broadcast_object_list([plan.to_json(), save(state)], src=0)


def receive() -> tuple[Plan, dict[str, Tensor]]:
    """In the other processes: wait for the plan and the tensors."""
    import torch
    from safetensors.torch import load

    parcel: list[object] = [None, None]
    torch.distributed.broadcast_object_list(parcel, src=0)
    text, content = parcel
    assert isinstance(text, str) and isinstance(content, bytes), "what `send` packs"
    return Plan.from_json(text), load(content)


def part() -> None:
    """Take communication down, if it was set up."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
