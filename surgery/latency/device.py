"""The program of a pack: fills a latency table on a device, and times a compact model against the dense one there.

``python PACK.zip`` writes the table, ``python PACK.zip accept compact.onnx`` the latency of that file relative to the
dense model in the pack. Copied to devices unchanged: Python 3.8, numpy and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import onnxruntime

from surgery.core import Kernel, replacing
from surgery.errors import InvalidInput, SurgeryError
from surgery.latency import fill, probe
from surgery.latency.child import ask
from surgery.latency.probe import BLOCK_MS, MIN_BLOCK_RUNS, block_ms, first_line
from surgery.latency.tables import LatencyTable

REQUEST = "request.json"
REQUESTED = ("kernels", "threads", "flush_mib", "precision", "part", "shapes", "seed", "batch", "fingerprint", "model")
"""What that says."""
DENSE = "dense.onnx"
SCHEMA = 1
PROCESSES = 3
BLOCK_ROUNDS = 12
TIMEOUT_S = 3600.0
INTERRUPTED = 130


def main(archive: str, arguments: Optional[Sequence[str]] = None) -> int:
    """Run a pack and return the exit code.

    Args:
        archive: the pack's own path.
        arguments: command-line arguments; those of the process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["time"]:
            return _time(json.loads(given[1]))
        if given[:1] == ["accept"]:
            _accept(archive, _accept_options(given[1:]))
        else:
            _table(archive, _table_options(given))
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return InvalidInput.exit_code
    except KeyboardInterrupt:
        print("interrupted before the end; nothing was written, run the same command again", file=sys.stderr)
        return INTERRUPTED
    return 0


def _table_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python PACK.zip",
        description="Measure the pack's kernels on this device and write its latency table.",
        epilog="`python PACK.zip accept compact.onnx` times a compact model against the dense one; it has its --help.",
    )
    parser.add_argument("--out", default="table.json", help="the latency table to write (default: %(default)s)")
    return _parsed(parser, arguments, rounds="how often each kernel is measured")


def _accept_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python PACK.zip accept",
        description="Time a compact model against the pack's dense one on this device.",
    )
    parser.add_argument("compact", help="the compact.onnx that `surgery shrink` wrote")
    parser.add_argument("--out", default="acceptance.json", help="the file to write (default: %(default)s)")
    return _parsed(parser, arguments, rounds=f"blocks of runs per model and process (default: {BLOCK_ROUNDS})")


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str], *, rounds: str) -> argparse.Namespace:
    parser.add_argument("--threads", type=int, help="threads of ONNX Runtime (default: as the pack was made)")
    parser.add_argument("--rounds", type=int, help=rounds)
    options = parser.parse_args(arguments)
    for name in ("threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InvalidInput(f"--{name} {value}: give a whole number of 1 or more")
    folder = Path(options.out).resolve().parent
    if Path(options.out).is_dir() or not folder.is_dir():
        raise InvalidInput(f"--out {options.out}: no file can be written there; name one in a folder that exists")
    return options


def _threads(options: argparse.Namespace, request: Mapping[str, Any]) -> int:
    threads = int(options.threads or request["threads"])
    cores = probe.available_cores()
    if threads > cores:
        raise InvalidInput(
            f"--threads {threads}: this process may use {cores} cores, and threads that share one would measure "
            "waiting; ask for fewer"
        )
    return threads


def _conditions(options: argparse.Namespace, request: Mapping[str, Any]) -> probe.Conditions:
    return probe.Conditions(_threads(options, request), int(request["flush_mib"]), str(request["precision"]))


def _request(archive: str) -> Dict[str, Any]:
    try:
        with zipfile.ZipFile(archive) as pack:
            request: Dict[str, Any] = json.loads(pack.read(REQUEST))
        lacking = [name for name in REQUESTED if name not in request]
        if lacking:
            raise ValueError(f"{REQUEST} lacks '{lacking[0]}'")
        return request
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f"{archive}: not a pack, or a damaged one ({error}); `surgery profile MODEL --pack FILE` writes one"
        ) from error


class _Progress:
    """Prints the progress of a stage to standard error, in steps of 10 %."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, stage: str, fraction: float) -> None:
        line = f"{stage}: {int(fraction * 10) * 10} %"
        if line != self._last:
            print(line, file=sys.stderr, flush=True)
        self._last = line


# The table. ----------------------------------------------------------------------------------------------------------


def _table(archive: str, options: argparse.Namespace) -> None:
    request = _request(archive)
    table = measured(request["kernels"], _conditions(options, request), rounds=options.rounds)
    table.save(options.out)
    print(f"{options.out}: {len(table.entries)} kernels; plan with: surgery shrink MODEL --latency-table {options.out}")


def measured(
    kernels: Mapping[str, Sequence[Sequence[int]]], conditions: probe.Conditions, *, rounds: Optional[int]
) -> LatencyTable:
    """Return this device's table of kernels, given as key → widths in the dense network.

    Raises:
        InvalidInput: ONNX Runtime cannot run them.
    """
    points = [(Kernel.from_key(key), tuple(w)) for key, widths in kernels.items() for w in widths]
    say = _Progress()
    often = rounds or fill.ROUNDS
    try:
        table = fill.new_table(
            conditions=conditions,
            rounds=rounds or fill.PROBE_ROUNDS,
            progress=lambda stage, fraction: say("find the steps of widths", fraction),
        )
        table = fill.fill(table, fill.wanted_of(points), conditions=conditions, rounds=often, progress=say)
        return fill.refine(
            table,
            points,
            conditions=conditions,
            rounds=often,
            progress=lambda stage, f: say("measure dense widths", f),
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise InvalidInput(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the kernels here: {first_line(error)}; "
            "onnxruntime 1.17 and later reads their operator set"
        ) from error


# The acceptance. -----------------------------------------------------------------------------------------------------


def _accept(archive: str, options: argparse.Namespace) -> None:
    request = _request(archive)
    threads = _threads(options, request)
    if request["part"]:
        raise InvalidInput(
            f"the pack was made for part '{request['part']}' alone, and {options.compact} holds the whole model; "
            "its table is of use, its dense model is not"
        )
    origin = _origin(options.compact, request, threads)
    say = _Progress()
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        with zipfile.ZipFile(archive) as pack:
            names = [name for name in pack.namelist() if name.startswith(DENSE)]  # with weights in .data, if large
            if DENSE not in names:
                raise InvalidInput(f"{archive}: a damaged pack, it lacks {DENSE}; make it again with surgery profile")
            pack.extractall(folder, names)
        asked = {
            "files": [os.path.join(folder, DENSE), os.path.abspath(options.compact)],
            "threads": threads,
            "shapes": request["shapes"],
            "rounds": options.rounds or BLOCK_ROUNDS,
        }
        found = []
        for k in range(PROCESSES):
            say("time compact against dense", k / PROCESSES)
            arguments = [archive, "time", json.dumps({**asked, "seed": request["seed"] + k})]
            found.append(ask(arguments, f"latency of {options.compact}", timeout_s=TIMEOUT_S))
    ratios = [answer["ratio"] for answer in found]
    acceptance = {
        "schema": SCHEMA,
        "ratio": median(ratios),
        "ratios": ratios,
        "dense_ms": median(answer["ms"][0] for answer in found),
        "compact_ms": median(answer["ms"][1] for answer in found),
        "device": probe.describe(_conditions(options, request)),
        "batch": request["batch"],
        **origin,
    }
    _write(options.out, acceptance)
    print(f"{options.out}: the compact model takes {acceptance['ratio']:.4f} of the dense one's time on this device")


def _origin(compact: str, request: Mapping[str, Any], threads: int) -> Dict[str, Any]:
    """Return the plan's metadata in the compact model's file; raises for a model of another architecture."""
    says = _session(compact, threads).get_modelmeta().custom_metadata_map
    fingerprint = says.get("dense_fingerprint")
    if fingerprint is not None and fingerprint != request["fingerprint"]:
        raise InvalidInput(
            f"{compact}: cut from another architecture than the pack's {request['model']}; make a pack of its model"
        )
    if says.get("model", "compact") != "compact":
        raise InvalidInput(f"{compact}: that is the {says['model']} model; give the compact one that lies beside it")
    if says.get("precision", "fp32") != request["precision"]:
        raise InvalidInput(
            f"{compact} is in {says.get('precision', 'fp32')} and the pack's dense model in {request['precision']}; "
            "give the compact file of that precision, or make a pack with the other --deploy"
        )
    predicted = says.get("predicted_latency_ratio")
    return {
        "plan_sha256": says.get("plan_sha256"),
        "predicted_latency_ratio": None if predicted is None else float(predicted),
        "dense_fingerprint": fingerprint,
    }


def _time(asked: Mapping[str, Any]) -> int:
    """Serve `_accept`: time blocks of both files in shuffled order, one session alive at a time, and print the result.

    This runs in a separate process, because times depend on the process's memory layout.
    """
    files, threads, shapes = asked["files"], asked["threads"], asked["shapes"]
    try:
        runs = [max(MIN_BLOCK_RUNS, math.ceil(BLOCK_MS / _block(f, threads, shapes, MIN_BLOCK_RUNS))) for f in files]
        rng = np.random.RandomState(asked["seed"])
        blocks: List[Tuple[float, float]] = []
        for _ in range(asked["rounds"]):
            times = {int(k): _block(files[k], threads, shapes, runs[k]) for k in rng.permutation(len(files))}
            blocks.append((times[0], times[1]))
    except InvalidInput as error:
        print(json.dumps({"error": str(error)}))
        return InvalidInput.exit_code
    dense, compact = zip(*blocks)
    print(json.dumps({"ratio": median(c / d for d, c in blocks), "ms": [median(dense), median(compact)]}))
    return 0


def _block(path: str, threads: int, shapes: Mapping[str, Sequence[int]], runs: int) -> float:
    """Return the median milliseconds of some runs, in a temporary session."""
    session = _session(path, threads)
    inputs = _inputs(session, path, shapes)
    try:
        return float(np.median(block_ms(session, inputs, runs)))
    except Exception as error:  # as above
        raise InvalidInput(f"{path} does not run here: {first_line(error)}; export it again") from error


def _session(path: str, threads: int) -> Any:
    if not os.path.isfile(path):
        raise InvalidInput(f"no file {path}; give the compact.onnx that `surgery shrink` wrote")
    try:
        return onnxruntime.InferenceSession(path, probe.session_options(threads), providers=[probe.PROVIDER])
    except Exception as error:  # as above
        raise InvalidInput(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {first_line(error)}; check the file, or "
            "export it for an older --opset"
        ) from error


def _inputs(session: Any, path: str, shapes: Mapping[str, Sequence[int]]) -> Dict[str, Any]:
    inputs = {}
    for item in session.get_inputs():
        if item.name not in shapes:
            raise InvalidInput(
                f"{path}: input '{item.name}' is none of the dense model's ({', '.join(shapes)}); give a file that "
                "was cut from this model"
            )
        try:
            inputs[item.name] = probe.random_values(item.name, item.type, shapes[item.name])
        except TypeError as error:
            raise InvalidInput(f"{path}: {error}") from error
    return inputs


def _write(path: str, data: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(data, sort_keys=True, indent=1) + "\n", encoding="utf-8")
