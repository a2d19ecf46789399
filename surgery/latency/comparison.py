"""ONNX files timed against each other: `surgery bench`. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from surgery.errors import InvalidInput
from surgery.latency import ort
from surgery.latency.fill import Progress
from surgery.latency.ort import Limits
from surgery.latency.session import Settings
from surgery.report import Table, figure, print_parts, ratio, size

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = (
    *("file", "p50 ms", "p90 ms", "p99 ms", "items /s", "time, relative", "95% interval"),
    *("load ms", "peak memory", "size"),
)
_SUFFIX = "executionprovider"


def settings_of(
    shapes: Mapping[str, tuple[int, ...]], *, batch: int = 1, threads: int = 1, seed: int = 0, provider: str = "cpu"
) -> Settings:
    """Return settings from command-line values.

    Args:
        shapes: input name → shape, for files that leave more than the batch open.
        batch: items per run; if it is 1, the batch of the shapes.
        threads: intra-op threads.
        seed: of inputs and order.
        provider: execution provider, case-insensitive and with or without `ExecutionProvider`.
    """
    given = {shape[0]: name for name, shape in shapes.items() if shape}
    if len(given) == 1 and batch == 1:
        (batch,) = given
    if wrong := given.keys() - {batch}:
        other = wrong.pop()
        raise InvalidInput(f"input '{given[other]}' has a batch of {other}, and --batch is {batch}: give one of them")
    known: list[str] = onnxruntime.get_available_providers()
    short = provider.casefold().removesuffix(_SUFFIX)
    found = next((name for name in known if name.casefold().removesuffix(_SUFFIX) == short), provider)
    return Settings(batch, threads, seed, dict(shapes), found)


def compare(
    paths: Sequence[Path],
    settings: Settings,
    limits: Limits,
    *,
    baseline: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time ONNX files with the same inputs by `surgery.latency.time`; return plain JSON values.

    Rows are named after the file, or its path if two files share a name. `baseline` is the path that ratios refer to,
    by default the first.

    Raises:
        InvalidInput: a file cannot be read or run, or the files' inputs differ.
    """
    names = _names(paths)
    _require_same_inputs(paths, settings)
    if baseline is not None and baseline not in paths:
        raise InvalidInput(f"--baseline {baseline} is none of the files: {', '.join(map(str, paths))}")
    base = None if baseline is None else names[list(paths).index(baseline)]
    timing = ort.time(dict(zip(names, paths, strict=True)), settings, limits, baseline=base, progress=progress)
    found = timing.to_dict()
    for row, path in zip(found["rows"], paths, strict=True):
        row["file"] = str(path)
    return {"schema": 1, **found}


def _names(paths: Sequence[Path]) -> list[str]:
    twice = next((path for k, path in enumerate(paths) if path in paths[:k]), None)
    if twice is not None:
        raise InvalidInput(f"{twice} is given twice; a copy of the baseline is timed in any case, as the A/A row")
    called = [path.name for path in paths]
    return [str(path) if called.count(path.name) > 1 else path.name for path in paths]


def _require_same_inputs(paths: Sequence[Path], settings: Settings) -> None:
    """Raise InvalidInput if names, types or static sizes of the inputs differ; dynamic axes may have any name."""
    taken = {path: {x.name: (x.type, *x.shape) for x in settings.open(path).get_inputs()} for path in paths}
    first, *rest = paths
    for path in rest:
        one, other = taken[first], taken[path]
        if one.keys() != other.keys() or not all(map(_agree, one.values(), (other[name] for name in one))):
            raise InvalidInput(
                f"{first} takes {_text(one)} and {path} takes {_text(other)}: times can be compared "
                "where files take the same inputs; export them alike"
            )


def _agree(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    (kind, *shape), (other_kind, *other_shape) = one, other
    pairs = zip(shape, other_shape, strict=False)
    static = all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    return kind == other_kind and len(shape) == len(other_shape) and static


def _text(inputs: Mapping[str, tuple[Any, ...]]) -> str:
    return ", ".join(f"'{name}' {kind} ({', '.join(map(str, shape))})" for name, (kind, *shape) in inputs.items())


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
