"""State dicts from files: wrappers, prefixes, class counts, and files that are not what they seem."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from surgery.core import require_finite
from surgery.errors import InvalidInput
from surgery.inputs.checkpoints import class_counts, compare, fit, read_checkpoint
from surgery.inputs.models import load_model


def net(classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


class Marker:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.path,))


def saved(data: object, path: Path) -> Path:
    torch.save(data, path)
    return path


def load_into(module: nn.Module, path: Path) -> nn.Module:
    fit(module, read_checkpoint(path), label="net")
    return module


@pytest.mark.parametrize(
    "wrapper", [[], ["state_dict"], ["model"], ["model_state_dict"], ["ema"], ["state_dict_ema"], ["ema", "module"]]
)
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "model.module.", "net."]
)
def test_wrappers_and_prefixes_are_undone(tmp_path: Path, wrapper: list[str], prefix: str) -> None:
    donor = net()
    data: object = {prefix + key: value for key, value in donor.state_dict().items()}
    for name in reversed(wrapper):
        data = {name: data, "epoch": 3}
    module = load_into(net(), saved(data, tmp_path / "a.pth"))
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in module.state_dict().items())


def test_safetensors_and_absent_batch_counters(tmp_path: Path) -> None:
    donor = net()
    save_file({k: v for k, v in donor.state_dict().items() if "num_batches" not in k}, tmp_path / "a.safetensors")
    module = load_into(net(), tmp_path / "a.safetensors")
    assert torch.equal(module[0].weight, donor[0].weight)


def test_a_prefix_that_belongs_to_the_model_stays(tmp_path: Path) -> None:
    module = nn.ModuleDict({"model": net()})
    donor = nn.ModuleDict({"model": net()})
    load_into(module, saved(donor.state_dict(), tmp_path / "a.pth"))
    assert torch.equal(module["model"][0].weight, donor["model"][0].weight)


def test_averaged_weights_are_preferred_and_said(tmp_path: Path) -> None:
    plain, averaged = net(), net()
    data = {"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict()}
    checkpoint = read_checkpoint(saved(data, tmp_path / "a.pth"))
    assert torch.equal(checkpoint.tensors["0.weight"], averaged[0].weight)
    assert "state_dict_ema" in checkpoint.notes[0]


def test_a_training_scripts_arguments_and_scores_do_no_harm(tmp_path: Path) -> None:
    data = {"state_dict": net().state_dict(), "args": argparse.Namespace(lr=0.1), "best": np.float64(0.9)}
    assert "0.weight" in read_checkpoint(saved(data, tmp_path / "a.pth")).tensors


def test_a_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"pickled objects \(torch.nn.modules.*FILE\.py:CALLABLE"):
        read_checkpoint(saved(net(), tmp_path / "a.pth"))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, writer: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "a.pth"
    if writer == "torch":
        torch.save({"state_dict": Marker(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Marker(marker)))
    with pytest.raises(InvalidInput, match=r"a\.pth"):
        read_checkpoint(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Marker(marker)))
    assert marker.exists(), "the crafted object is harmless: this test proves nothing"


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.2, 0.9])
def test_truncated_files(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    save_file(net().state_dict(), path) if name.endswith("s") else torch.save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(InvalidInput, match="truncated"):
        read_checkpoint(path)


def test_missing_file_and_file_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no checkpoint file .*gone\.pth"):
        read_checkpoint(tmp_path / "gone.pth")
    with pytest.raises(InvalidInput, match=r"holds no state dict.*epoch"):
        read_checkpoint(saved({"epoch": 3}, tmp_path / "a.pth"))


def test_mismatching_keys_are_counted_and_listed_up_to_three(tmp_path: Path) -> None:
    other = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    with pytest.raises(InvalidInput, match=r"does not fit net: .* missing .* unexpected \(.*\.\.\.\)"):
        load_into(net(), saved({f"blocks.{k}": v for k, v in other.state_dict().items()}, tmp_path / "a.pth"))


def test_tensors_of_losses_and_teachers_are_left_out_on_request(tmp_path: Path) -> None:
    donor, teacher = net(), net()
    data = {f"net.{key}": value for key, value in donor.state_dict().items()}
    data |= {f"teacher.{key}": value for key, value in teacher.state_dict().items()} | {"loss.weight": torch.ones(3)}
    path = saved(data, tmp_path / "a.ckpt")
    with pytest.raises(InvalidInput, match="--ignore-extra leaves these tensors out"):
        load_into(net(), path)
    file = tmp_path / "nets.py"
    layers = "nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)"
    file.write_text(f"from torch import nn\n\n\ndef make():\n    return nn.Sequential({layers})\n")
    loaded = load_model(f"{file}:make", weights=str(path), ignore_extra=True)
    assert torch.equal(loaded.module.state_dict()["0.weight"], donor[0].weight)
    assert any("ignored 10 tensors of a.ckpt" in note for note in loaded.notes)
    assert any("1 x 3 x 224 x 224" in note for note in loaded.notes)
    assert any("random unless it loads some" in note for note in load_model(f"{file}:make").notes)


def test_mismatching_shapes_name_expected_and_found(tmp_path: Path) -> None:
    path = saved(net(7).state_dict(), tmp_path / "a.pth")
    with pytest.raises(InvalidInput, match=r"4\.weight: expected \(10, 4\), found \(7, 4\)"):
        load_into(net(10), path)
    assert class_counts(compare(net(10), read_checkpoint(path).tensors)) == (7,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_nan_and_infinite_weights_are_named(tmp_path: Path, name: str, value: float) -> None:
    state = net().state_dict()
    state[name].view(-1)[0] = value
    with pytest.raises(InvalidInput, match=rf"a\.pth: {name} holds 1 NaN or infinite"):
        load_into(net(), saved(state, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, 2, dtype=torch.int8), "int8"),
        (torch.ones(2, 2, dtype=torch.bool), "bool"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.ones(2, 2, device="meta"), "meta"),
    ],
)
def test_tensors_that_are_no_floating_point_weights_are_refused_not_cast(
    tmp_path: Path, weight: torch.Tensor, kind: str
) -> None:
    torch.save({"weight": weight, "bias": torch.zeros(2)}, tmp_path / "c.pt")
    with pytest.raises(InvalidInput, match=rf"c\.pt: weight is a tensor of kind {kind}"):
        fit(nn.Linear(2, 2), read_checkpoint(tmp_path / "c.pt"), label="a layer")


def test_an_attention_mask_of_minus_infinity_is_no_fault() -> None:
    module = net()
    module.register_buffer("mask", torch.full((2, 2), float("-inf")))
    require_finite(module.state_dict(keep_vars=True), "net")
    module.mask[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match="mask"):
        require_finite(module.state_dict(keep_vars=True), "net")
