"""The program of a pack: fills a latency table on a device, and times a compact model against the dense one there.

``python PACK.zip`` writes the table, ``python PACK.zip accept compact.onnx`` the latency of that file relative to the
dense model in the pack. Copied to devices unchanged: Python 3.8, numpy and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import onnxruntime

from surgery.core import Kernel, explained, replacing
from surgery.errors import InvalidInput, SurgeryError
from surgery.latency import fill, probe, ratio
from surgery.latency.fill import Timer

REQUEST = "request.json"
DENSE = "dense.onnx"
SCHEMA = 1
INTERRUPTED = 130


def main(archive: str, arguments: Optional[Sequence[str]] = None) -> int:
    """Run the pack at this path with arguments of the command line, by default the process's; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["time"]:
        return ratio.serve(ratio.answer, given[1])
    try:
        if given[:1] == ["accept"]:
            _accept(archive, _options(given[1:], accept=True))
        else:
            _table(archive, _options(given, accept=False))
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return InvalidInput.exit_code
    except KeyboardInterrupt:
        print("interrupted before the end; nothing was written, run the same command again", file=sys.stderr)
        return INTERRUPTED
    return 0


def _options(arguments: Sequence[str], *, accept: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python PACK.zip accept" if accept else "python PACK.zip",
        description="Time a compact model against the pack's dense one on this device."
        if accept
        else "Measure the pack's kernels on this device and write its latency table.",
        epilog="`python PACK.zip accept compact.onnx` times a compact model against the dense one; see its --help.",
    )
    if accept:
        parser.add_argument("compact", help="the compact.onnx that `surgery shrink` wrote")
    out = "acceptance.json" if accept else "table.json"
    parser.add_argument("--out", default=out, help="the file to write (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of ONNX Runtime (default: as the pack was made)")
    rounds = f"blocks of runs per model and process (default: {ratio.ROUNDS})"
    parser.add_argument("--rounds", type=int, help=rounds if accept else "how often each kernel is measured")
    options = parser.parse_args(arguments)
    for name in ("threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InvalidInput(f"--{name} {value}: give a whole number of 1 or more")
    if Path(options.out).is_dir() or not Path(options.out).resolve().parent.is_dir():
        raise InvalidInput(f"--out {options.out}: no file can be written there; name one in a folder that exists")
    return options


def _conditions(options: argparse.Namespace, request: Mapping[str, Any]) -> probe.Conditions:
    threads = int(options.threads or request["threads"])
    probe.require_cores(threads, f"--threads {threads}")
    return probe.Conditions(threads, int(request["flush_mib"]), str(request["precision"]))


def _request(archive: str) -> Dict[str, Any]:
    try:
        with zipfile.ZipFile(archive) as pack:
            request: Dict[str, Any] = json.loads(pack.read(REQUEST))
        return request
    except (OSError, KeyError, ValueError, RecursionError, zipfile.BadZipFile) as error:
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
    points = [(Kernel.from_key(key), tuple(w)) for key, widths in request["kernels"].items() for w in widths]
    timer = Timer(_conditions(options, request), rounds=options.rounds, progress=_Progress())
    with explained(f"ONNX Runtime {onnxruntime.__version__} cannot run the kernels (1.17 and later can)"):
        table = fill.refine(fill.fill(fill.new_table(timer), points, timer), points, timer)
    table.save(options.out)
    print(f"{options.out}: {len(table.entries)} kernels; plan with: surgery shrink MODEL --latency-table {options.out}")


# The acceptance. -----------------------------------------------------------------------------------------------------


def _accept(archive: str, options: argparse.Namespace) -> None:
    request = _request(archive)
    conditions = _conditions(options, request)
    if request["part"]:
        raise InvalidInput(
            f"the pack was made for part '{request['part']}' alone, and {options.compact} holds the whole model; "
            "its table is of use, its dense model is not"
        )
    origin = _origin(options.compact, request, conditions.threads)
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        with zipfile.ZipFile(archive) as pack:
            pack.extractall(folder, [name for name in pack.namelist() if name.startswith(DENSE)])  # and .data, if large
        dense, compact, threads = Path(folder, DENSE), Path(options.compact), conditions.threads
        seeds, rounds = range(request["seed"], request["seed"] + ratio.PROCESSES), options.rounds or ratio.ROUNDS
        time = partial(ratio.measure, seeds=seeds, rounds=rounds, program=(archive, "time"), progress=_Progress())
        measured = time(dense, compact, request["shapes"], threads=threads)
    figures = {"ratio": measured.value, "dense_ms": measured.dense_ms, "compact_ms": measured.compact_ms}
    where = {"device": probe.describe(conditions), "batch": request["batch"]}
    acceptance = {"schema": SCHEMA, **figures, "ratios": list(measured.ratios), **where, **origin}
    with replacing(options.out) as file:
        file.write_text(json.dumps(acceptance, sort_keys=True, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: the compact model takes {acceptance['ratio']:.4f} of the dense one's time on this device")


def _origin(compact: str, request: Mapping[str, Any], threads: int) -> Dict[str, Any]:
    """Return the plan's metadata in the compact model's file; raises for a model of another architecture."""
    says = probe.open_session(compact, threads).get_modelmeta().custom_metadata_map
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
