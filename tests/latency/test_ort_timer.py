"""The ONNX Runtime timer, on networks of a few convolutions that run in about a millisecond."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import surgery.latency.ort
from surgery.errors import InvalidInput
from surgery.latency import session
from surgery.latency.ort import Limits, Timing, block_order, paired_ratio
from surgery.latency.probe import available_cores
from surgery.latency.ratio import TimerFailed
from surgery.latency.session import Settings

ROOT = Path(surgery.latency.ort.__file__).resolve().parents[2]


def write_model(path: Path, *, depth: int = 4, shape: tuple[int | str, ...] = ("batch", 16, 28, 28)) -> Path:
    """Write `depth` 3x3 convolutions with 16 channels, each followed by a ReLU."""
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12 for _ in range(depth)]
    nodes = []
    for i in range(depth):
        nodes.append(helper.make_node("Conv", [f"r{i}", f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i + 1}"]))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("r0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"r{depth}", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(kernel, f"w{i}") for i, kernel in enumerate(kernels)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def quick(models: dict[str, Path], **options: object) -> Timing:
    """Time with three short rounds and no child process: enough for everything but the figures themselves."""
    return timed(models, **{"max_runs": 9, "fresh": False, **options})


def timed(models: dict[str, Path], **options: object) -> Timing:
    """Time with settings, limits and other arguments, each by its own name."""
    settings, limits = (
        kind(**{f.name: options.pop(f.name) for f in fields(kind) if f.name in options}) for kind in (Settings, Limits)
    )
    return surgery.latency.ort.time(models, settings, limits, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model.onnx")


@pytest.fixture(scope="module")
def timing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Timing:
    """A whole measurement: a model, and one with twice its convolutions."""
    double = write_model(tmp_path_factory.mktemp("models") / "double.onnx", depth=8)
    return timed({"model": model, "double": double}, batch=2, max_seconds=5.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_against_its_own_copy_comes_out_at_one(model: Path, tmp_path: Path, threads: int) -> None:
    if threads > available_cores():
        pytest.skip(f"{threads} threads need as many cores, this process may use {available_cores()}")
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(model.read_bytes())
    models = {"model": model, "copy": copy}
    limits = {"max_runs": 10_000, "max_seconds": 10.0, "block_ms": 20.0, "width": 0.02}
    for _ in range(3):  # an inconclusive measurement may be repeated; a conclusive one counts
        found = timed(models, threads=threads, fresh=False, **limits)
        settled = found.reliable and found.stopped.startswith("every interval")
        if settled:
            break
        if found.environment["disturbed_rounds"] > found.rounds / 10:
            pytest.skip(f"other processes disturbed it: {found.why}")
    assert found.aa is not None
    assert found.aa.value == pytest.approx(1.0, abs=0.02)
    assert found.row("copy").ratio.value == pytest.approx(1.0, abs=0.02)
    assert found.reliable, found.why


def test_twice_the_work_takes_about_twice_as_long(timing: Timing) -> None:
    ratio, speedup = timing.row("double").ratio, timing.row("double").speedup
    assert 1.5 < ratio.low <= ratio.value <= ratio.high < 2.6
    assert speedup.value == pytest.approx(1 / ratio.value)
    assert (speedup.low, speedup.high) == pytest.approx((1 / ratio.high, 1 / ratio.low))


def test_the_baseline_is_the_first_model_at_ratio_one(timing: Timing) -> None:
    assert timing.baseline == "model"
    assert timing.row("model").ratio.value == timing.row("model").speedup.value == 1.0


def test_latencies_and_throughput_fit_together(timing: Timing) -> None:
    row = timing.row("model")
    assert 0 < row.p50_ms <= row.p90_ms
    assert row.throughput_per_s < 2 * 1000 / row.p50_ms * 1.5
    assert row.runs <= 2000


def test_p99_needs_a_thousand_runs(model: Path) -> None:
    # Rounds that other processes disturbed may be left out, so more runs are asked for than are needed.
    many = timed({"m": model}, max_runs=1500, block_ms=50, width=1e-9, aa=False, fresh=False)
    assert quick({"m": model}).row("m").p99_ms is None
    row = many.row("m")
    assert (row.p99_ms is not None) == (row.runs >= 1000)
    assert row.p99_ms is None or row.p99_ms >= row.p90_ms


def test_fresh_process_reports_load_time_and_peak_memory(timing: Timing, model: Path) -> None:
    row = timing.row("model")
    assert row.load_ms is not None and row.load_ms > 0
    assert row.peak_memory_bytes is not None and row.floor_memory_bytes is not None
    assert 10_000_000 < row.floor_memory_bytes < row.peak_memory_bytes
    assert row.file_bytes == model.stat().st_size


def test_peak_memory_is_the_childs_own_not_inherited_from_a_large_parent(model: Path) -> None:
    large = np.ones(60_000_000)  # 480 MB resident here when the child starts
    row = quick({"m": model}, fresh=True).row("m")
    assert row.peak_memory_bytes is not None
    assert row.peak_memory_bytes < large.nbytes


def test_a_benchmarks_folder_of_the_users_own_does_not_get_in_the_way(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    assert quick({"m": model}, fresh=True).row("m").load_ms is not None


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script in the interpreter's place")
def test_a_child_process_that_dies_is_one_clear_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -9 $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(TimerFailed, match=r"model\.onnx.*ended with code -9"):
        quick({"m": model}, fresh=True)


def test_report_is_plain_json_and_names_runtime_processor_and_options(timing: Timing) -> None:
    data = json.loads(json.dumps(timing.to_dict()))
    environment = data["environment"]
    assert [row["name"] for row in data["rows"]] == ["model", "double"]
    assert environment["onnxruntime"] == onnxruntime.__version__
    assert environment["provider"] == "CPUExecutionProvider"
    assert environment["session_options"]["intra_op_num_threads"] == environment["threads"] == 1
    assert environment["cpu"] and isinstance(environment["instruction_sets"], list)
    assert data["aa"]["low"] <= data["aa"]["value"] <= data["aa"]["high"]
    assert data["settings"]["batch"] == 2


@pytest.mark.parametrize(
    ("system", "told", "found"),
    [
        (("AMD EPYC", ["avx2"]), {"brand_raw": "another"}, ("AMD EPYC", ["avx2"])),
        (("unknown", ["asimd", "asimddp"]), {"brand_raw": "Neoverse-N1"}, ("Neoverse-N1", ["neon", "dotprod"])),
        (("unknown", []), {"brand_raw": "Apple M2", "flags": ["neon"]}, ("Apple M2", ["neon"])),
        (("unknown", ["asimd"]), {}, ("unknown", ["neon"])),
    ],
)
def test_a_processor_that_the_system_does_not_name_is_looked_up(
    system: tuple[str, list[str]],
    told: dict[str, object],
    found: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "processor", lambda: system)
    monkeypatch.setattr(session.cpuinfo, "get_cpu_info", lambda: told)
    session._processor.cache_clear()
    environment = session.describe(1)
    session._processor.cache_clear()
    assert (environment["cpu"], environment["instruction_sets"]) == found


def test_too_few_rounds_are_marked_unreliable_with_the_reason(model: Path) -> None:
    found = quick({"m": model})
    assert not found.reliable
    assert "only 3 of the 12 required rounds" in found.why
    assert found.stopped == "9 runs of a model"


def test_without_its_copy_the_figures_are_marked_untested(model: Path) -> None:
    found = quick({"m": model}, aa=False)
    assert found.aa is None and not found.reliable
    assert "not tested" in found.why


def test_one_session_is_alive_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = [0]
    most: list[int] = [0]
    opened: list[int] = [0]

    class Counted(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            alive[0] += 1
            opened[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    quick({"a": model, "b": model})
    assert opened[0] >= 9
    assert (most[0], alive[0]) == (1, 0)


def test_order_of_blocks_is_shuffled_and_the_same_for_a_seed() -> None:
    orders = list(islice(block_order(4, seed=3), 20))
    assert orders == list(islice(block_order(4, seed=3), 20))
    assert orders != list(islice(block_order(4, seed=4), 20))
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len({tuple(order) for order in orders}) > 5


def test_disturbed_rounds_do_not_move_the_ratio() -> None:
    rng = np.random.default_rng(0)
    baseline = 10 + rng.normal(0, 0.1, 40)
    model = 5 + rng.normal(0, 0.05, 40)
    model[:8] *= 3
    found = paired_ratio(list(model), list(baseline), seed=0)
    assert found.value == pytest.approx(0.5, rel=0.02)
    assert found.low < found.value < found.high


def test_rounds_are_left_out_only_where_others_used_the_machine() -> None:
    rounds = surgery.latency.ort._Measurement({}, "", Settings(), Limits(), shares=[0.0, 0.3, 0.05, 0.9])
    assert rounds.undisturbed == [0, 2]
    assert rounds.used == [0, 1, 2, 3]  # the others are too few
    rounds.shares += [0.0] * 10
    assert rounds.used == [0, 2, *range(4, 14)]


def test_progress_ends_at_one(model: Path) -> None:
    seen: list[tuple[str, float]] = []
    quick({"m": model}, progress=lambda stage, fraction: seen.append((stage, fraction)))
    assert seen[-1] == ("timing", 1.0)
    assert all(0 <= fraction <= 1 for _, fraction in seen)


def test_dynamic_axes_take_batch_and_input_shapes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "dynamic.onnx", shape=("batch", 16, "height", "width"))
    with pytest.raises(InvalidInput, match=r"axis 2 of input 'r0' is dynamic \(height\); give shapes"):
        quick({"m": path})
    assert quick({"m": path}, batch=3, shapes={"r0": (1, 16, 12, 14)}).row("m").p50_ms > 0


def test_timing_needs_no_torch(model: Path) -> None:
    code = (
        "import sys; from surgery.latency import Limits, time\n"
        f"time({{'m': {str(model)!r}}}, limits=Limits(max_runs=3), fresh=False)\n"
        "print('torch' in sys.modules or 'onnx' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads=0"),
        ({"threads": 100_000}, "threads=100000: this process may use"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"max_runs": 2}, "max_runs=2"),
        ({"max_seconds": 0}, "max_seconds=0"),
        ({"width": -1.0}, "width=-1.0"),
        ({"baseline": "other"}, "baseline 'other' is none of the models: m"),
        ({"shapes": {"image": (1, 16, 28, 28)}}, "shapes name image, but the inputs are r0"),
        ({"shapes": {"r0": (1, 16, 28)}}, "has 4 axes"),
        ({"shapes": {"r0": (1, 3, 28, 28)}}, "axis 1 of input 'r0' is 16 in the model, 3 in the given shape"),
        ({"shapes": {"r0": (1, 16, 0, 28)}}, "every size must be a whole number above 0"),
    ],
)
def test_bad_arguments_are_one_sentence(model: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        quick({"m": model}, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is no protobuf at all" * 10)


def _static_batch(path: Path) -> None:
    write_model(path, shape=(2, 16, 8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "File doesn't exist"),
        (Path.mkdir, "cannot load"),
        (_empty, "cannot load"),
        (_garbage, "cannot load"),
        (_static_batch, "fixed shape (2, 16, 8, 8), so it cannot run at batch=1"),
    ],
    ids=["missing", "folder", "empty", "garbage", "static"],
)
def test_bad_files_are_one_sentence(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "bad.onnx"
    make(path)
    with pytest.raises(InvalidInput) as caught:
        quick({"m": path})
    assert message in str(caught.value)
    assert "bad.onnx" in str(caught.value)


def test_no_models_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="no models to time"):
        surgery.latency.ort.time({})
