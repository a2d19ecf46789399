"""Models that cannot be captured are refused with what they are, where, and what to pass instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization

import surgery
from surgery.capture import trace
from surgery.delivery.saving import _save_program
from surgery.errors import InvalidInput, UnsupportedModel


class Net(nn.Module):
    """A convolution and what follows it."""

    def __init__(self, after: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.last, self.after = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), after

    def forward(self, *images: Tensor) -> Tensor:
        x = self.first(sum(images)).mean((2, 3))
        return self.last(x if self.after is None else self.after(x))  # type: ignore[no-any-return]


def prepared() -> nn.Module:
    net = Net().train()
    net.qconfig = quantization.get_default_qat_qconfig()  # type: ignore[no-untyped-call]
    return quantization.prepare_qat(net).eval()  # type: ignore[no-any-return]


def scripted() -> nn.Module:
    net = Net()
    net.last = torch.jit.script(net.last)  # type: ignore[assignment]
    return net


def branching(x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > 0 else x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quantized": (lambda: quantization.quantize_dynamic(Net(), {nn.Linear}), "submodule 'last' is quantized"),
    "prepared": (prepared, "submodule 'first' is prepared for quantization"),
    "scripted": (scripted, "submodule 'last' is a TorchScript module"),
    "dropout": (lambda: Net(lambda x: F.dropout(x, training=True)), "draws random numbers in evaluation mode"),
    "noise": (lambda: Net(lambda x: x + torch.randn_like(x)), "draws random numbers in evaluation mode"),
    "branch": (lambda: Net(branching), "depends on the values of a tensor"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_for_what_it_is(name: str) -> None:
    made, said = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=said) as caught:
        trace(made().eval(), torch.randn(2, 3, 6, 6))
    assert "u0" not in str(caught.value) and "report" not in str(caught.value)
    if name in ("dropout", "noise", "branch"):
        assert Path(__file__).name in str(caught.value)


def test_a_default_device_without_values_is_refused() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    with torch.device("meta"), pytest.raises(InvalidInput, match="default device is meta"):
        trace(model, x)


def test_a_program_with_any_number_of_inputs_is_saved(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 6)
    result = surgery.shrink(Net().eval(), (x, x), surgery.recipe(channels=0.6, recover="none"))
    assert _save_program(result, tmp_path / "compact.pt2") == []
    again = torch.export.load(tmp_path / "compact.pt2").module()
    torch.testing.assert_close(again(x, x), result.model(x, x))
