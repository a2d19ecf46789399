"""Imported once, by the server that every process of the study is forked from: libraries, and their slow first calls.

One thread: a process with a pool of threads cannot be forked safely.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")

import surgery  # noqa: E402
from benchmarks.studies.coverage import tools  # noqa: E402, F401
from exporters import onnx  # noqa: E402
from surgery.inputs import import_torchvision  # noqa: E402

import_torchvision()

import timm  # noqa: E402, F401
import torch_pruning  # noqa: E402, F401

_tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3)).eval()
_result = surgery.shrink(_tiny, torch.zeros(1, 3, 8, 8), surgery.recipe(macs=0.7))
with tempfile.TemporaryDirectory() as _folder:
    onnx.export(_result.model, (torch.zeros(1, 3, 8, 8),), Path(_folder, "tiny.onnx"), onnx.ExportSettings(check=False))
