"""Imported once, by the server that the study's and the tests' processes are forked from: libraries, after a first run.

The first capture and the first export in a process take seconds more than later ones: torch builds its tables of
operators then. One thread: a process with a pool of threads cannot be forked safely.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import matplotlib.backends.backend_svg  # noqa: F401
import torch

import surgery
import surgery.pipeline
from benchmarks.studies.coverage import tools  # noqa: F401
from exporters import onnx
from surgery.delivery import save  # noqa: F401
from surgery.inputs import import_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_torchvision()
    import timm  # noqa: F401
    import torch_pruning  # noqa: F401

    torch.set_num_threads(1)
    _tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3)).eval()
    _result = surgery.shrink(_tiny, torch.zeros(1, 3, 8, 8), surgery.recipe(macs=0.7))
    with tempfile.TemporaryDirectory() as _folder:
        _file = Path(_folder, "tiny.onnx")
        onnx.export(_result.model, (torch.zeros(1, 3, 8, 8),), _file, onnx.ExportSettings(check=False))
