"""One job, in this process: ``python -m benchmarks.studies.latency.worker REQUEST`` writes its row as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.studies.coverage.tools import plain
from benchmarks.studies.latency.accuracy import accuracy
from benchmarks.studies.latency.coldwarm import profile
from benchmarks.studies.latency.jobs import Job
from benchmarks.studies.latency.options import Options
from benchmarks.studies.latency.speed import channels, speed

WORK: Mapping[str, Callable[[Job, Options, Path], dict[str, Any]]] = MappingProxyType(
    {"speed": speed, "channels": channels, "accuracy": accuracy, "profile": profile}
)


def main(request: str) -> int:
    """Do the job; what goes wrong with it is its row. Returns the exit code."""
    fields = json.loads(request)
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["options"].items()}
    job, options = Job(**fields["job"]), Options(**given)
    torch.set_num_threads(options.torch_threads)
    warnings.simplefilter("ignore")
    try:
        with tempfile.TemporaryDirectory() as folder:
            row = WORK[job.part](job, options, Path(folder))
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        row = {"failed": type(error).__name__, "message": plain(text[0])[:300]}
    Path(fields["answer"]).write_text(json.dumps(row), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
