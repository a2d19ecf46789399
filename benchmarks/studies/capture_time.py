"""What each of the package's changes to torch's internals saves: CPU seconds of `trace` and of an ONNX export.

Run: ``python -m benchmarks.studies.capture_time``; writes ``results/capture_time.json``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import click
import torch

import exporters.onnx
from benchmarks.studies import record
from surgery.capture import trace
from surgery.core import CaptureLimits, torch_speed
from surgery.inputs import load_model

ALL, NONE = "with all", "with none"


def cpu_seconds(run: Callable[[], object], without: str, repeats: int) -> float:
    """Return the least CPU seconds of several runs without one of the changes, or without all (`NONE`)."""
    patches, found = torch_speed._patches, []

    def kept(limits: CaptureLimits) -> Mapping[str, AbstractContextManager[None]]:
        return {} if without == NONE else {name: patch for name, patch in patches(limits).items() if name != without}

    with mock.patch.object(torch_speed, "_patches", kept):
        for _ in range(repeats):
            start = time.process_time()
            run()
            found.append(time.process_time() - start)
    return round(min(found), 2)


@click.command()
@click.option("--network", default="mobilenet_v2", show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(network: str, repeats: int) -> None:
    """Measure and write results/capture_time.json."""
    torch.set_num_threads(1)
    loaded = load_model(network, weights="random", input_shape=(1, 3, 224, 224))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        runs: dict[str, Callable[[], object]] = {
            "trace": lambda: trace(loaded.module, loaded.example_inputs),
            "export": lambda: exporters.onnx.export(loaded.module, loaded.example_inputs, file),
        }
        rows = {}
        for name in (ALL, *torch_speed._patches(CaptureLimits()), NONE):
            rows[name] = {kind: cpu_seconds(run, name, repeats) for kind, run in runs.items()}
            click.echo(f"{name}: {rows[name]}")
    command = record.command("benchmarks.studies.capture_time")
    click.echo(record.write("capture_time", {"command": command, "machine": record.machine(1), "cpu_s": rows}))


if __name__ == "__main__":
    main()
