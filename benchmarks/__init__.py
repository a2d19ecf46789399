"""Latency of ONNX models in ONNX Runtime, measured as in service; `benchmarks.ort.time` stands alone, without torch."""
