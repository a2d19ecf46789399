"""Timing in the study: networks as ONNX files, quick ratios while searching, all files together at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
from torch import nn

from benchmarks.studies.latency.rivals import Subject
from benchmarks.studies.latency.search import Point, reach
from exporters import onnx
from surgery.latency import Limits, Settings, ort

_QUICK_S = 2.0
_RACE_BLOCK_MS = 60.0
MET = 0.92, 1.03
"""The measured ratio over the target: between these a budget of time is met."""
NEAR = 0.02
"""Ratios that differ by no more than this are one latency."""


def tell(words: str) -> None:
    """Print progress to stderr."""
    print(f"    {words}", file=sys.stderr, flush=True)


@dataclass(frozen=True, eq=False)
class Bench:
    """Files of one row, in a folder, and how they are timed."""

    subject: Subject
    folder: Path
    threads: int
    seconds: float
    _files: dict[str, Path] = field(default_factory=dict)

    def add(self, name: str, module: nn.Module, *, quick: bool = False) -> Path:
        """Export a network under a name; `quick` by the TorchScript exporter, which is good for a search."""
        path = self.folder / f"{len(self._files)}.onnx"
        onnx.export(module, self.subject.inputs, path, onnx.ExportSettings(check=False, dynamo=not quick))
        return self.enter(name, path)

    def enter(self, name: str, path: Path) -> Path:
        """Take a file that is there already, and runs; returns it."""
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), self.subject.inputs, strict=True)})
        self._files[name] = path
        return path

    def quick(self, module: nn.Module) -> float:
        """Return a network's latency relative to the dense one's, in this process, to a percent or two."""
        if "dense, quick" not in self._files:
            self.add("dense, quick", self.subject.module, quick=True)
        candidate = self.add("candidate", module, quick=True)
        timing = ort.time(
            {"dense": self._files["dense, quick"], "candidate": candidate},
            Settings(threads=self.threads),
            Limits(max_seconds=_QUICK_S, block_ms=40.0, width=0.02),
            aa=False,
            fresh=False,
        )
        candidate.unlink()
        del self._files["candidate"]
        return timing.row("candidate").ratio.value

    def to_latency(
        self, cut: Callable[[float], nn.Module], wanted: float, *, most: int = 4, start: float | None = None
    ) -> Point:
        """Return the share at which a tool's network takes about this fraction of the dense latency.

        Args:
            cut: share that goes → network.
            wanted: measured by `quick`, as those that are tried are.
            most: networks to try.
            start: share of the first one.
        """
        return reach(lambda share: self.quick(cut(share)), wanted, tolerance=0.01, most=most, start=start)

    def measure(self) -> dict[str, Any]:
        """Time every file against the dense one in one run; returns figures by name, and what the timer says of them.

        The dense file must be the first that was added. A second copy of it runs along: the A/A control.
        """
        files = {name: path for name, path in self._files.items() if name != "dense, quick"}
        tell(f"time {len(files)} files")
        timing = ort.time(
            files,
            Settings(threads=self.threads),
            Limits(max_seconds=self.seconds, block_ms=_RACE_BLOCK_MS, width=0.02),
            baseline="dense",
            fresh=False,
        )
        return {
            "latency": {row.name: {**asdict(row.ratio), "p50_ms": row.p50_ms} for row in timing.rows},
            "timer": {
                "aa": asdict(timing.aa) if timing.aa else None,
                "reliable": timing.reliable,
                "why": timing.why,
                "rounds": timing.rounds,
                "other_processes": timing.environment["other_processes"],
            },
        }


def told(macs: float, latency: Mapping[str, float]) -> dict[str, Any]:
    """Return what the study says of one network: both ratios, and compact GMAC/s over dense GMAC/s."""
    return {"macs": round(macs, 4), "latency": dict(latency), "efficiency": round(macs / latency["value"], 3)}


def loop_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a report on a budget of time what the study keeps: rounds, with milliseconds, and the verdict."""
    loop = report["latency"]
    rounds = [
        {
            "aim": r["aim"],
            "predicted_ms": r["predicted"] * loop["predicted_dense_ms"],
            "measured": r["measured"],
            "measured_ms": r["measured"] * loop["dense_ms"],
            "processes": len(r["ratios"]),
        }
        for r in loop["rounds"]
    ]
    kept = {key: loop[key] for key in ("target", "dense_ms", "predicted_dense_ms", "taken", "verdict", "met")}
    return {
        **kept,
        "rounds": rounds,
        "measured": rounds[loop["taken"]]["measured"],
        "dropped": [block["name"] for block in report["dropped"]],
        "stages_s": report["stages_s"],
    }
