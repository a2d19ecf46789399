"""The latency study: what budgets of time come to against other tools, on the clock of ONNX Runtime."""
