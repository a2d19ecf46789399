"""Studies of this project; `benchmarks.ort` is the timer. Nothing here is installed."""
