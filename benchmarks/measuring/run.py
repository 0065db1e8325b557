"""Run a case: build the contenders, check them, measure their memory, then time those that are right."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import replay
from benchmarks.measuring.check import errors
from benchmarks.measuring.contender import Case, Contender, Entry, NotInstalled, TooLarge, backward
from benchmarks.measuring.memory import available_bytes, peak_bytes, saved_for_backward
from benchmarks.measuring.records import Result, Row
from benchmarks.measuring.timing import Run, race, stopwatch


def run_case(case: Case, modes: Iterable[str], seconds: float, *, peers: Iterable[str] | None = None) -> list[Row]:
    """Check and time the contenders of a case.

    Args:
        case: the contenders and their input.
        modes: ``"fwd"`` and ``"fwdbwd"``.
        seconds: about how long the timing of one row may take.
        peers: names of the peers to run; None for all.
    """
    chosen = [e for e in case.entries if e.kind != "peer" or peers is None or e.name in peers]
    cotangent = torch.randn(*case.out, device=case.x.device).to(case.x.dtype)
    ready: dict[str, Contender] = {}
    results: dict[str, Result] = {}
    for entry in chosen:
        results[entry.name], contender = _prepare(entry, case.x, cotangent)
        if contender is not None:
            ready[entry.name] = contender
    for contender in ready.values():  # the answers are large and no longer needed
        contender.oracle.forget()
    facts = {"device": case.x.device.type, **_experts(case)}
    rows = []
    for mode in modes:
        found = _time(case, mode, seconds, ready, dict(results), cotangent)
        row = Row(case.group, case.shape, case.dtype, mode, case.baseline, tuple(found), case.saved_bound, **facts)
        rows.append(row)
    return rows


def _experts(case: Case) -> dict[str, Any]:
    """What our experts keep, and what they may."""
    if case.experts is None:
        return {}
    try:
        kept = saved_for_backward(case.experts.module, case.x).bytes
    except Exception:  # the table of the layers says what is wrong with them
        return {"experts_bound": case.experts.bound}
    return {"experts_kept": kept, "experts_bound": case.experts.bound}


def _prepare(entry: Entry, x: Tensor, cotangent: Tensor) -> tuple[Result, Contender | None]:
    """The contender if it could be built and is right; else the reason in the result."""
    result = Result(entry.name, entry.kind, entry.about)
    try:
        contender = entry.build()
        found, wrong = errors(contender, x, cotangent)
    except NotInstalled as error:
        return replace(result, status="not importable", note=str(error)), None
    except TooLarge as error:
        return replace(result, status="too large", note=str(error)), None
    except Exception as error:  # whatever a peer raises, the others are still to be measured
        return replace(result, status="failed", note=_first_line(error)), None
    result = replace(result, errors=found)
    if wrong:
        note = ", ".join(f"{name}: {found[name]:.1e}" if name in found else f"{name}: missing" for name in wrong)
        return replace(result, status="wrong", note=f"relative error of {note}"), None
    return result, contender


def _time(
    case: Case,
    mode: str,
    seconds: float,
    ready: dict[str, Contender],
    results: dict[str, Result],
    cotangent: Tensor,
) -> list[Result]:
    gc.collect()  # a collection in the middle would be someone's time
    if case.x.device.type == "cuda":
        torch.cuda.empty_cache()  # of the check, and of whoever ran out of memory
    runs: dict[str, Run] = {}
    first: dict[str, float] = {}
    for name, contender in ready.items():
        if contender.inference and mode == "fwdbwd":
            results[name] = replace(results[name], status="inference only", note="it has no backward pass")
            continue
        try:
            run = _run(contender, mode, case.x, cotangent)
            if case.x.device.type == "cuda":  # kernels are compiled at a first call: that is no time of theirs
                run.prepare()
                run.call()
            peak, first[name] = peak_bytes(run, case.x.device)
            saved = saved_for_backward(contender.module, case.x) if mode == "fwdbwd" else None
            results[name] = replace(results[name], peak_bytes=peak, saved=saved)
            if case.x.device.type == "cuda":
                results[name] = replace(results[name], host=replay.host_seconds(run), clock="events")
        except Exception as error:
            results[name] = replace(results[name], status="failed", note=_first_line(error))
            continue
        runs[name] = run
        run.prepare()
    if case.x.device.type == "cuda":
        peaks = {name: results[name].peak_bytes or 0 for name in runs}
        for name, graph in replay.graphs(runs, peaks, lambda: available_bytes(case.x.device)).items():
            runs[name], results[name] = graph, replace(results[name], clock="graph")
    ours = case.entries[0].name
    samples = race(runs, seconds, lead=(ours, case.baseline), first=first, stopwatch=stopwatch(case.x.device))
    for name in runs:
        results[name] = replace(
            results[name],
            seconds=samples.time(name),
            ratio=samples.ratio(name, case.baseline) if case.baseline in runs else None,
            slowdown=samples.ratio(name, ours) if ours in runs else None,
        )
    return list(results.values())


def _run(contender: Contender, mode: str, x: Tensor, cotangent: Tensor) -> Run:
    module = contender.module
    parameters = [x, *module.parameters()]
    loss = contender.loss or contender.unchecked_loss

    def prepare() -> None:
        module.train(mode == "fwdbwd")
        for p in parameters:
            p.grad = None

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def both() -> None:
        y = module(x)
        backward(y, cotangent, None if loss is None else loss(module))

    return Run(prepare, forward if mode == "fwd" else both)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
