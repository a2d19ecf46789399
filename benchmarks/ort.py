"""Latency of ONNX models in ONNX Runtime: the timer of `surgery.latency`, which needs no torch."""

from surgery.latency import Limits, Settings, Timing, time

__all__ = ["Limits", "Settings", "Timing", "time"]
