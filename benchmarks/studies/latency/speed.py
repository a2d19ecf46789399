"""Rows with random weights: latency budgets, and other tools at the same MACs and latency."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from benchmarks.studies.coverage.tools import exported, onnx_macs, plain
from benchmarks.studies.latency.bench import MET, NEAR, Bench, loop_of, tell, told
from benchmarks.studies.latency.jobs import Job
from benchmarks.studies.latency.options import Options
from benchmarks.studies.latency.rivals import PLAIN, SETTINGS, Subject, Uniform, by_torch_pruning, to_macs
from benchmarks.studies.latency.search import reach
from surgery.cutting import cut, masked
from surgery.errors import BudgetUnreachable
from surgery.inputs import LoadedModel, load_model
from surgery.planning import Choice, decide

Entry = dict[str, Any]
"""`share` is of the channels that go, of the MACs for uniform width. `to`: what was made equal, MACs or latency."""


def subject_of(network: str) -> Subject:
    """Return a network of torchvision with random weights, and one image."""
    loaded = load_model(network, weights="random")
    return Subject(loaded.module, loaded.example_inputs)


def speed(job: Job, options: Options, folder: Path) -> Entry:
    """Shrink to a target; bring the others to our MACs, some to our latency as well; time all files together."""
    subject = subject_of(job.network)
    bench = Bench(subject, folder, job.threads, options.seconds)
    bench.add("dense", subject.module)
    started = time.perf_counter()
    result = surgery.shrink(subject.module, subject.inputs, surgery.recipe(latency=job.amount, threads=job.threads))
    loop, seconds = loop_of(result.report), time.perf_counter() - started
    tell(f"ours in {seconds:.0f} s: {loop['verdict']}")
    entries: dict[str, Entry] = {"ours": {"macs": subject.kept(result.model)}}
    bench.add("ours", result.model)
    with _explained(entries, "masked"):
        bench.add("masked", masked(result.cut))
        entries["masked"] = {"macs": 1.0}
    _at_our_macs(bench, entries, entries["ours"]["macs"], options)
    if job.amount in options.equal_latency and job.threads == 1:
        _at_our_latency(bench, entries, bench.quick(result.model), options)
    figures = bench.measure()
    rows = _judged(entries, figures["latency"])
    rows["ours"]["met"] = MET[0] <= loop["measured"] / job.amount <= MET[1]
    return {"entries": rows, "timer": figures["timer"], "loop": loop, "shrink_s": round(seconds, 1)}


def _at_our_macs(bench: Bench, entries: dict[str, Entry], macs: float, options: Options) -> None:
    subject = bench.subject
    for setting in SETTINGS:
        with _explained(entries, name := f"{setting.name} @ MACs"):
            tell(name)
            module, point = to_macs(subject, setting, macs)
            bench.add(name, module)
            entries[name] = {"macs": point.ratio, "share": point.share, "to": "macs"}
    with _explained(entries, name := "uniform @ MACs"):
        tell(name)
        module = Uniform(subject).cut(1 - macs)
        bench.add(name, module)
        entries[name] = {"macs": subject.kept(module), "share": 1 - macs, "to": "macs"}
    if options.onnxsim:
        with _explained(entries, name := "onnxsim @ MACs"):
            tell(name)
            entries[name] = _by_onnxsim(bench, name, macs)


def _at_our_latency(bench: Bench, entries: dict[str, Entry], wanted: float, options: Options) -> None:
    """Bring rivals to our latency as measured by the quick timer."""
    subject = bench.subject
    ways: dict[str, Callable[[float], nn.Module]] = {
        setting.name: partial(by_torch_pruning, subject, setting) for setting in SETTINGS
    }
    ways["uniform"] = Uniform(subject).cut
    for name, way in ways.items():
        if name in options.equal_latency_of:
            with _explained(entries, full := f"{name} @ latency"):
                tell(full)
                start = entries.get(f"{name} @ MACs", {}).get("share")
                point = bench.to_latency(way, wanted, start=start)
                bench.add(full, module := way(point.share))
                reached = point.ratio <= wanted * (1 + NEAR)
                entries[full] = {
                    "macs": subject.kept(module),
                    "share": point.share,
                    "to": "latency",
                    "reached": reached,
                }


def _by_onnxsim(bench: Bench, name: str, wanted: float) -> Entry:
    """Its structured pruning, on the file that the TorchScript exporter makes, by the share that leaves these MACs.

    Its simplifier stores equal tensors once, and its pruning then cuts one for several layers: weights are set apart.
    """
    import onnx
    import onnxsim

    subject, path = bench.subject, bench.folder / "onnxsim.onnx"
    exporter = exported(_set_apart(subject.module), subject.inputs, path)
    dense, _ = onnxsim.simplify(onnx.load(path))
    whole = onnx_macs(dense)

    def pruned(share: float) -> Any:
        return onnxsim.apply_structured_pruning(dense, sparsity=share, importance_norm="l1", global_sparsity=True)

    point = reach(lambda share: onnx_macs(pruned(share)) / whole, wanted, tolerance=0.01, most=6)
    onnx.save(pruned(point.share), path)
    bench.enter(name, path)
    return {"macs": point.ratio, "share": point.share, "to": "macs", "exporter": exporter}


def _set_apart(module: nn.Module) -> nn.Module:
    """Return a copy no two tensors of which are equal, as those of fresh batch norms are."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor += 1e-3 * torch.rand(tensor.shape, generator=generator)
    return module


def _judged(entries: Mapping[str, Entry], latencies: Mapping[str, Any]) -> dict[str, Entry]:
    return {
        name: entry if "failed" in entry else {**entry, **told(entry["macs"], latencies[name])}
        for name, entry in entries.items()
    }


# Ours and torch-pruning's default at the same MACs. ------------------------------------------------------------------


def channels(job: Job, options: Options, folder: Path) -> Entry:
    """torch-pruning takes a share of all channels; ours is given the budget of time that leaves the same MACs."""
    subject = subject_of(job.network)
    bench = Bench(subject, folder, job.threads, options.seconds)
    bench.add("dense", subject.module)
    theirs = by_torch_pruning(subject, PLAIN, job.amount)
    wanted = subject.kept(theirs)
    bench.add(PLAIN.name, theirs)
    choice, budget = ours_of_macs(subject, wanted, threads=job.threads)
    compact = cut(choice.program, choice.plan, coupling=choice.coupling).module
    bench.add("ours", compact)
    figures = bench.measure()
    entries: dict[str, Entry] = {PLAIN.name: {"macs": wanted}, "ours": {"macs": subject.kept(compact)}}
    rows = _judged(entries, figures["latency"])
    gain = rows[PLAIN.name]["latency"]["value"] / rows["ours"]["latency"]["value"]
    return {"entries": rows, "timer": figures["timer"], "gain": round(gain, 3), "budget": round(budget, 4)}


def ours_of_macs(subject: Subject, wanted: float, *, threads: int) -> tuple[Choice, float]:
    """Return the plan of a budget of time that leaves about these MACs, and the budget."""
    recipe = surgery.recipe(latency=0.5, threads=threads, correct=False)
    planner = decide(LoadedModel(subject.module, subject.inputs), recipe).planner
    assert planner is not None, "latency budgets have one"
    plans: dict[float, Choice] = {}

    def ratio_of(share: float) -> float:
        try:
            plans[share] = planner.plan(1 - share)
        except BudgetUnreachable:
            return 0.0
        return _macs(plans[share])

    reach(ratio_of, wanted, tolerance=0.005, most=12, start=1 - wanted)
    share = min(plans, key=lambda share: abs(_macs(plans[share]) - wanted))
    return plans[share], 1 - share


def _macs(choice: Choice) -> float:
    dense, kept = choice.costs["macs"]
    return kept / dense


@contextmanager
def _explained(entries: dict[str, Entry], name: str) -> Iterator[None]:
    """Where a tool fails at a network, that is its entry."""
    try:
        yield
    except Exception as error:  # peers may fail in any way
        text = str(error).strip().splitlines() or [""]
        entries[name] = {"failed": type(error).__name__, "message": plain(text[0])[:300]}
        tell(f"{name}: {entries[name]['failed']}: {entries[name]['message'][:120]}")
