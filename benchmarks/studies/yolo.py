"""Detectors of ultralytics, pruned as a whole and trained again by ultralytics itself.

Each is built without weights from its definition, pruned with `own_class`, exported, compared in ONNX Runtime, and
trained and validated for a few steps on synthetic squares, in a process of its own. ultralytics is AGPL-3.0 and not a
dependency of this package: ``pip install ultralytics`` to run this.

Run: ``python -m benchmarks.studies.yolo``; writes ``results/yolo.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.studies import record

NETWORKS = ("yolov8n", "yolov10n", "yolo11n", "yolo12n", "yolo26n")
SIDE = 128
MACS = 0.5
_IMAGES, _BATCH = 16, 4


def measure(network: str, folder: Path) -> dict[str, Any]:
    """Prune, export, train and validate one network in this process.

    Args:
        network: an ultralytics model definition, without `.yaml`.
        folder: for the data set, the ONNX file and what the trainer writes.
    """
    from surgery.inputs import import_torchvision

    import_torchvision()
    import ultralytics

    import surgery
    from exporters import onnx

    torch.manual_seed(0)
    detector: Any = ultralytics.YOLO(f"{network}.yaml")
    dense: Any = detector.model.eval()
    example = torch.randn(1, 3, SIDE, SIDE)
    result = surgery.shrink(dense, example, surgery.recipe(macs=MACS, own_class=True))
    exported = onnx.export(result.model, (example,), folder / "compact.onnx")
    macs = result.report["models"][0]["macs"], result.report["models"][2]["macs"]
    row = {
        "network": network,
        "ultralytics": ultralytics.__version__,
        "macs_kept": macs[1] / macs[0],
        "parameters_kept": _sizes(result.model, dense.yaml),
        "parameters": _sizes(dense, dense.yaml),
        "kind": result.kind,
        "kept_whole": list(result.plan.settings["keep"]),
        "error_float64": result.check.error_float64,
        "error_real": result.check.error_real,
        "stages_s": dict(result.report["stages_s"]),
        "onnx_error": exported.error,
        "notes": [*result.report["notes"], *exported.notes],
    }
    return row | _trained(detector, result.model, folder)


def _sizes(model: Any, definition: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the backbone, of the neck, and of the head, which is the last layer."""
    layers = list(model.model)
    neck = len(definition["backbone"])
    parts = {"backbone": layers[:neck], "neck": layers[neck:-1], "head": layers[-1:]}
    return {name: sum(p.numel() for layer in part for p in layer.parameters()) for name, part in parts.items()}


def _trained(detector: Any, compact: torch.nn.Module, folder: Path) -> dict[str, Any]:
    """Put the compact model into the detector, train it for an epoch, and validate the saved model."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):  # type: ignore[misc]
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> torch.nn.Module:
            """Return the compact model instead of one built from the definition."""
            return compact

    _provide_nms()
    for parameter in compact.parameters():
        parameter.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in compact.named_parameters()}
    settings = {"data": str(_squares(folder)), "imgsz": SIDE, "batch": _BATCH, "device": "cpu", "workers": 0}
    detector.model = compact
    detector.train(
        trainer=Trainer, epochs=1, amp=False, plots=False, project=str(folder), name="run", optimizer="SGD", **settings
    )
    after = dict(detector.model.named_parameters())
    metrics = detector.val(plots=False, project=str(folder), name="val", **settings)
    return {
        "losses": {name: float(loss) for name, loss in dict(detector.trainer.loss_items).items()},
        "moved": sum(not torch.equal(before[name], p.float()) for name, p in after.items()) / len(after),
        "same_shapes": {n: p.shape for n, p in before.items()} == {n: p.shape for n, p in after.items()},
        "map50": float(metrics.box.map50),
    }


def _squares(folder: Path) -> Path:
    """Write grey images with one bright square each, in ultralytics' layout; returns the data set's description."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / "data" / kind).mkdir(parents=True)
    for k in range(_IMAGES):
        pixels = generator.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8)
        size, (left, top) = int(generator.integers(24, 64)), generator.integers(0, SIDE - 64, 2)
        pixels[top : top + size, left : left + size] += 150
        Image.fromarray(pixels).save(folder / "data" / "images" / f"{k}.png")
        box = [(left + size / 2) / SIDE, (top + size / 2) / SIDE, size / SIDE, size / SIDE]
        (folder / "data" / "labels" / f"{k}.txt").write_text("0 " + " ".join(f"{x:.5f}" for x in box) + "\n")
    path = folder / "data.yaml"
    names = [f"class {k}" for k in range(80)]
    path.write_text(json.dumps({"path": str(folder / "data"), "train": "images", "val": "images", "names": names}))
    return path


def _provide_nms() -> None:
    """A torchvision without compiled operators has no non-maximum suppression; ultralytics has one in Python."""
    from ultralytics.utils.nms import TorchNMS

    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        library = torch.library.Library("torchvision", "IMPL")  # type: ignore[no-untyped-call]
        library.impl("nms", TorchNMS.nms, "CPU")  # type: ignore[no-untyped-call]
        _LIBRARIES.append(library)


_LIBRARIES: list[Any] = []
"""Kept: an implementation goes when its library goes."""


def in_fresh_process(network: str) -> dict[str, Any]:
    """Return what `measure` returns, in a new process whose ultralytics settings are its own; or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "YOLO_CONFIG_DIR": folder, "YOLO_OFFLINE": "true", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "benchmarks.studies.yolo", "--only", network, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        if done.returncode:
            return {"network": network, "failed": lines[-1] if lines else f"exit {done.returncode}"}
        row: dict[str, Any] = json.loads(lines[-1])
        return row


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the rows."""
    table = Table(title=f"Half of the MACs, {SIDE} x {SIDE}")
    for heading in ("network", "MACs", "parameters", "class", "float64", "ONNX", "trained", "kept whole"):
        table.add_column(heading)
    for row in rows:
        if "failed" in row:
            table.add_row(row["network"], f"failed: {row['failed']}")
            continue
        kept = sum(row["parameters_kept"].values()) / sum(row["parameters"].values())
        table.add_row(
            row["network"],
            f"{row['macs_kept']:.3f}",
            f"{kept:.3f}",
            row["kind"],
            f"{row['error_float64']:.0e}",
            f"{row['onnx_error']:.0e}",
            f"{row['moved']:.0%} moved",
            ", ".join(row["kept_whole"]),
        )
    console.print(table)


@click.command()
@click.argument("networks", nargs=-1)
@click.option("--only", hidden=True)
@click.option("--folder", hidden=True, type=click.Path(path_type=Path))
def main(networks: tuple[str, ...], only: str | None, folder: Path | None) -> None:
    """Run NETWORKS (all by default)."""
    if only is not None and folder is not None:
        row = measure(only, folder)
        click.echo("\n" + json.dumps(row))
        return
    rows = [in_fresh_process(network) for network in networks or NETWORKS]
    show(rows, Console())
    if not networks:
        command = record.command("benchmarks.studies.yolo")
        record.write("yolo", {"command": command, "machine": record.machine(torch.get_num_threads()), "rows": rows})


if __name__ == "__main__":
    main()
