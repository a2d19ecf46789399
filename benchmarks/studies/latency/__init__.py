"""The latency study: latency budgets compared with other tools, measured in ONNX Runtime."""
