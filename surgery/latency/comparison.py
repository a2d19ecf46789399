"""ONNX files timed against each other: `surgery bench`. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from surgery.errors import InvalidInput
from surgery.latency import ort
from surgery.latency.blocks import Limits
from surgery.latency.fill import Progress
from surgery.latency.session import Settings, model_file, open_session
from surgery.report import Table, figure, print_parts, ratio, size

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = (
    *("file", "p50 ms", "p90 ms", "p99 ms", "items /s", "time, relative", "95% interval"),
    *("load ms", "peak memory", "size"),
)
_SUFFIX = "ExecutionProvider"


def _batch(batch: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the requested batch, or that of the shapes; raises InvalidInput if the two contradict each other."""
    given = {shape[0]: name for name, shape in shapes.items() if shape}
    if len(given) == 1 and batch == 1:
        return next(iter(given))
    wrong = next((size for size in given if size != batch), None)
    if wrong is not None:
        raise InvalidInput(
            f"input '{given[wrong]}' is given with a batch of {wrong}, and --batch {batch}: give one of them"
        )
    return batch


def settings_of(
    shapes: Mapping[str, tuple[int, ...]], *, batch: int = 1, threads: int = 1, seed: int = 0, provider: str = "cpu"
) -> Settings:
    """Return settings from command-line values.

    Args:
        shapes: input name → shape, for files that leave more than the batch open.
        batch: items per run; if it is 1, the batch of the shapes.
        threads: intra-op threads of ONNX Runtime.
        seed: seed of inputs and order.
        provider: execution provider, case-insensitive and with or without `ExecutionProvider`.
    """
    return Settings(_batch(batch, shapes), threads, seed, dict(shapes), _provider(provider))


def compare(
    paths: Sequence[Path],
    settings: Settings,
    limits: Limits,
    *,
    baseline: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time ONNX files with the same inputs by `surgery.latency.time`; return plain JSON values.

    Args:
        paths: paths of the files; rows are named after the file, or its path if two files share a name.
        settings: session settings.
        limits: limits on runs and seconds.
        baseline: the path that ratios refer to; None: the first.
        progress: called with the current stage and its completed fraction.

    Raises:
        InvalidInput: a file cannot be read or run, or the files' inputs differ.
    """
    names = _names(paths)
    _require_same_inputs(paths, settings)
    if baseline is not None and baseline not in paths:
        raise InvalidInput(f"--baseline {baseline} is none of the files: {', '.join(map(str, paths))}")
    base = None if baseline is None else names[list(paths).index(baseline)]
    timing = ort.time(dict(zip(names, paths, strict=True)), settings, limits, baseline=base, progress=progress)
    found = json.loads(json.dumps(timing.to_dict()))
    for row, path in zip(found["rows"], paths, strict=True):
        row["file"] = str(path)
    return {"schema": 1, **found}


def _names(paths: Sequence[Path]) -> list[str]:
    twice = next((path for k, path in enumerate(paths) if path in paths[:k]), None)
    if twice is not None:
        raise InvalidInput(f"{twice} is given twice; a copy of the baseline is timed in any case, as the A/A row")
    called = [path.name for path in paths]
    return [str(path) if called.count(path.name) > 1 else path.name for path in paths]


def _provider(given: str) -> str:
    """Return the provider's full name if this build has it, else the given name."""
    known: list[str] = onnxruntime.get_available_providers()
    return next((p for p in known if given.casefold() in (p.casefold(), p.removesuffix(_SUFFIX).casefold())), given)


def _require_same_inputs(paths: Sequence[Path], settings: Settings) -> None:
    taken = {}
    for path in paths:
        inputs = open_session(model_file(path), settings).get_inputs()
        # Dynamic axes may have different names in each file.
        taken[path] = {x.name: (x.type, tuple(s if isinstance(s, int) else "open" for s in x.shape)) for x in inputs}
    first, *rest = paths
    for path in rest:
        if _fixed(taken[path]) != _fixed(taken[first]) or not _agree(taken[path], taken[first]):
            raise InvalidInput(
                f"{first} takes {_text(taken[first])} and {path} takes {_text(taken[path])}: times can be compared "
                "where files take the same inputs; export them alike"
            )


def _fixed(inputs: Mapping[str, tuple[str, tuple[Any, ...]]]) -> dict[str, tuple[str, int]]:
    return {name: (kind, len(shape)) for name, (kind, shape) in inputs.items()}


def _agree(one: Mapping[str, tuple[str, tuple[Any, ...]]], other: Mapping[str, tuple[str, tuple[Any, ...]]]) -> bool:
    """Return whether sizes that are static in both files agree."""
    pairs = (pair for name in one for pair in zip(one[name][1], other[name][1], strict=True))
    return all("open" in pair or pair[0] == pair[1] for pair in pairs)


def _text(inputs: Mapping[str, tuple[str, tuple[Any, ...]]]) -> str:
    return ", ".join(f"'{name}' {kind} ({', '.join(map(str, shape))})" for name, (kind, shape) in inputs.items())


def render_terminal(found: Mapping[str, Any], console: Console) -> None:
    """Print the table of files, the A/A test, and the machine."""
    rows = [_cells(row) for row in found["rows"]]
    aa = found["aa"]
    if aa is not None:
        rows.append((f"{found['baseline']}, again", *("",) * 4, *_ratio(aa), *("",) * 3))
    where, settings = found["environment"], found["settings"]
    verdict = "reliable" if found["reliable"] else "UNRELIABLE"
    verdict_line = (
        f"times: {verdict}: {found['why']}; ONNX Runtime {where['onnxruntime']}, {settings['provider']}, on "
        f"{where['cpu']}, threads {settings['threads']}, batch {settings['batch']}, {found['rounds']} rounds"
    )
    print_parts([Table(COLUMNS, rows), verdict_line], console)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    memory = row["peak_memory_bytes"]
    return (
        row["name"],
        *(figure(row[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "throughput_per_s")),
        *_ratio(row["ratio"]),
        *(figure(row["load_ms"]), size(memory), size(row["file_bytes"])),
    )


def _ratio(value: Mapping[str, float]) -> tuple[str, str]:
    return ratio(value, digits=3, unit="")
