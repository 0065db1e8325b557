"""The page's tables: layers against a base, and the order beside the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from benchmarks.measuring.report import markdown

from . import paper
from .results import Record
from .statistics import Difference, paired
from .variants import DENSE, VARIANTS

Bits = dict[str, dict[int, float]]
"""Of the test text, by layer and seed."""


def comparison(records: Sequence[Record], names: Sequence[str], base: str, quoted: Mapping[str, paper.Row]) -> str:
    """A row for each layer that has a finished run."""
    of = {name: [record for record in records if record["variant"] == name] for name in [*names, base]}
    bits = bits_of(records)
    rows = []
    for name in names:
        if not of[name]:
            continue
        difference = paired(bits.get(name, {}), bits.get(base, {})) if name != base else None
        own = quoted.get(name)
        rows.append(
            [
                VARIANTS[name].label,
                _relative(of[name], of[base], "ffn_parameters"),
                _relative(of[name], of[base], "ffn_flops_per_byte"),
                _relative_time(of[name], of[base]),
                f"{mean(bits[name].values()):.4f}" if name in bits else "diverged",
                _difference(difference, name == base),
                difference.verdict if difference else "",
                _seeds(of[name]),
                f"{own.e8:.2f}" if own else "",
                f"{own.wt_s:.2f}" if own else "",
            ]
        )
    label = _short(base)
    header = ["FFN", "parameters", "FLOPs", "CPU time", "bits per byte", f"difference from {label}", "called", "seeds"]
    table = markdown(([*header, "paper, Enwik8", "paper, WT-103"], rows))
    legend = f"Parameters and FLOPs are the FFN's, CPU time the model's training step's, relative to {label}'s."
    return f"{table}\n\n{legend}\n"


def bits_of(records: Sequence[Record]) -> Bits:
    """Of the runs that did not diverge."""
    bits: Bits = {}
    for record in records:
        if not record["diverged"]:
            bits.setdefault(record["variant"], {})[record["seed"]] = record["bits_per_byte"]["test"]
    return bits


def _difference(difference: Difference | None, is_base: bool) -> str:
    return "" if is_base else str(difference or "–")


def _seeds(records: Sequence[Record]) -> str:
    diverged = sum(bool(record["diverged"]) for record in records)
    return f"{len(records)}, {diverged} diverged" if diverged else str(len(records))


def _relative(records: Sequence[Record], base: Sequence[Record], key: str) -> str:
    return f"{records[0][key] / base[0][key]:.1%}" if base else "–"


def _relative_time(records: Sequence[Record], base: Sequence[Record]) -> str:
    """Of the seeds that ran on the same processor."""
    seconds = {(r["seed"], r["machine"]["processor"], r["threads"]): r["training_cpu_seconds"] for r in base}
    ratios = [
        record["training_cpu_seconds"] / seconds[key]
        for record in records
        if (key := (record["seed"], record["machine"]["processor"], record["threads"])) in seconds
        and not record["diverged"]
    ]
    return f"{mean(ratios):.2f}x" if ratios else "–"


def beside_the_paper(
    records: Sequence[Record], names: Sequence[str], base: str, quoted: Mapping[str, paper.Row]
) -> Iterator[str]:
    """The orders, best first, and the layers whose difference goes another way than the paper's."""
    bits = bits_of(records)
    found = {name: paired(bits.get(name, {}), bits.get(base, {})) for name in names if name in quoted}
    ours = {name: difference for name, difference in found.items() if difference is not None}
    if len(ours) < 2:
        return
    e8, wt_s = ({name: getattr(quoted[name], column) for name in ours} for column in ("e8", "wt_s"))
    columns = (
        _ordered({name: difference.mean for name, difference in ours.items()}, "+.4f"),
        _ordered(e8, ".2f"),
        _ordered(wt_s, ".2f"),
    )
    header = ["", f"here, difference from {_short(base)}", "the paper's Enwik8", "the paper's WikiText-103"]
    rows = [[str(rank), *cells] for rank, cells in enumerate(zip(*columns, strict=True), 1)]
    yield f"The order beside the paper's, best first, of the layers that it has too:\n\n{markdown((header, rows))}\n"
    other = []
    for name, difference in ours.items():
        theirs = [paper.direction(column[name], column[base]) for column in (e8, wt_s)]
        if name != base and difference.error is not None and difference.verdict not in theirs:
            there = theirs[0] if theirs[0] == theirs[1] else f"{theirs[0]} on Enwik8 and {theirs[1]} on WikiText-103"
            other.append(f"{VARIANTS[name].label} ({difference.verdict} here, {there} in the paper)")
    if other:
        yield f"The difference goes another way than both of the paper's: {'; '.join(other)}.\n"


def _ordered(values: Mapping[str, float], form: str) -> list[str]:
    return [f"{VARIANTS[name].label}: {values[name]:{form}}" for name in sorted(values, key=lambda name: values[name])]


def _short(base: str) -> str:
    return "dense" if base == DENSE else "SigmaMoE"
