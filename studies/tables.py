"""The page's tables: layers against a base, and the order beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from benchmarks.measuring.report import markdown

from . import paper
from .results import Record, machine_of, training_seconds
from .statistics import Difference, paired, ranks, ranks_of_numbers
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
        ran = len(of[name]), sum(bool(record["diverged"]) for record in of[name])
        own = quoted.get(name)
        rows.append(
            [
                VARIANTS[name].label,
                _relative(of[name], of[base], "ffn_parameters"),
                _relative(of[name], of[base], "ffn_flops_per_byte"),
                _relative_time(of[name], of[base]),
                f"{mean(bits[name].values()):.4f}" if name in bits else "diverged",
                _difference(difference, name == base),
                "diverged" if ran[1] else difference.verdict if difference else "",
                _seeds(*ran, None if difference is None else difference.n),
                f"{own.e8:.2f}" if own else "",
                f"{own.wt_s:.2f}" if own else "",
            ]
        )
    label = _short(base)
    header = ["FFN", "parameters", "FLOPs", "time", "bits per byte", f"difference from {label}", "called", "seeds"]
    table = markdown(([*header, *paper.COLUMNS.values()], rows))
    legend = f"Parameters and FLOPs are the FFN's, time the model's training step's, of {label}'s on the same machine."
    sources = "; ".join(
        f"{VARIANTS[name].label}: {quoted[name].source}" for name in names if name in quoted and of[name]
    )
    return f"{table}\n\n{legend} The paper's numbers: {sources}.\n"


def bits_of(records: Sequence[Record]) -> Bits:
    """Of the runs that did not diverge."""
    bits: Bits = {}
    for record in records:
        if not record["diverged"]:
            bits.setdefault(record["variant"], {})[record["seed"]] = record["bits_per_byte"]["test"]
    return bits


def _difference(difference: Difference | None, is_base: bool) -> str:
    return "" if is_base else str(difference or "–")


def _seeds(n: int, diverged: int, paired_with_base: int | None) -> str:
    """How many there are; of how many the difference is, where it is of fewer."""
    of_fewer = f", {paired_with_base} of them paired" if paired_with_base not in (None, n - diverged) else ""
    return f"{n}{f', {diverged} diverged' if diverged else ''}{of_fewer}"


def _relative(records: Sequence[Record], base: Sequence[Record], key: str) -> str:
    return f"{records[0][key] / base[0][key]:.1%}" if base else "–"


def _relative_time(records: Sequence[Record], base: Sequence[Record]) -> str:
    """Of the seeds that ran on the same machine: to a tenth, since other programs take their part of its caches."""
    seconds = {(record["seed"], machine_of(record)): training_seconds(record) for record in base}
    ratios = [
        training_seconds(record) / seconds[key]
        for record in records
        if (key := (record["seed"], machine_of(record))) in seconds and not record["diverged"]
    ]
    return f"{mean(ratios):.1f}x" if ratios else "–"


def beside_the_paper(
    records: Sequence[Record], names: Sequence[str], base: str, quoted: Mapping[str, paper.Row]
) -> Iterator[str]:
    """The ranks, and the layers whose rank or whose difference from the base is another than the paper's."""
    bits = {name: of for name, of in bits_of(records).items() if name in names and name in quoted}
    if len(bits) < 2:
        return
    columns = {column: {name: getattr(quoted[name], column) for name in bits} for column in paper.COLUMNS}
    here, theirs = ranks(bits), {column: ranks_of_numbers(values) for column, values in columns.items()}
    above = {name: paired(of, bits.get(base, {})) for name, of in bits.items()}
    rows = [
        [VARIANTS[name].label, str(here[name]), *(str(found[name]) for found in theirs.values())]
        for name, _ in sorted(above.items(), key=lambda item: item[1].mean if item[1] else math.inf)
    ]
    yield "The ranks among the layers that the paper has too, 1 the lowest. Layers that cannot be told apart share"
    yield "theirs: here those between which the difference is called none, there those of equal numbers.\n"
    yield markdown((["FFN", "here", *paper.COLUMNS.values()], rows)) + "\n"
    numbers, there = columns[paper.SAME_TEXT], theirs[paper.SAME_TEXT]
    moved = [
        f"{VARIANTS[name].label} ({here[name]} here, {there[name]} there)"
        for name in bits
        if here[name].apart(there[name])
    ]
    turned = []
    for name, found in above.items():
        direction = paper.direction(numbers[name], getattr(quoted[base], paper.SAME_TEXT))
        if name != base and found is not None and found.error is not None and found.verdict != direction:
            turned.append(f"{VARIANTS[name].label} ({found.verdict} here, {direction} there)")
    other = [
        f"{what} of {', '.join(of)}"
        for what, of in (("the rank", moved), (f"the difference from {_short(base)}", turned))
        if of
    ]
    where = paper.COLUMNS[paper.SAME_TEXT]
    yield (
        f"Other than in {where}: {'; '.join(other)}.\n" if other else f"Nothing is known to be other than in {where}.\n"
    )


PARTS = (0.25, 0.5, 0.75, 1.0)
"""Of the text of a run."""


def course(records: Sequence[Record], names: Sequence[str], base: str) -> str:
    """The difference from the base after parts of the text, of the validation windows of the curves."""
    rows = []
    for name in names:
        found = [paired(_after(records, name, part), _after(records, base, part)) for part in PARTS]
        if name != base and any(found):
            rows.append([VARIANTS[name].label, *(str(difference or "–") for difference in found)])
    if not rows:
        return ""
    header = ["FFN", *(f"{part:.0%} of the text" for part in PARTS)]
    what = f"The difference from {_short(base)} in the course of training, in bits per byte of the curves' windows:"
    return f"{what}\n\n{markdown((header, rows))}\n"


def _after(records: Sequence[Record], variant: str, part: float) -> dict[int, float]:
    """Bits per byte of each seed at the point that is the nearest to this part of the text."""
    found = {}
    for record in records:
        if record["variant"] == variant and not record["diverged"]:
            done, bits = record["curve"]["bytes"], record["curve"]["bits_per_byte"]
            found[record["seed"]] = bits[min(range(len(done)), key=lambda i: abs(done[i] - part * done[-1]))]
    return found


def _short(base: str) -> str:
    return "dense" if base == DENSE else "SigmaMoE"
