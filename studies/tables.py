"""The page's tables: layers against a base, and the order beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import mean
from textwrap import fill

from benchmarks.measuring.report import markdown

from . import paper
from .results import Record, emulated, machine_of, training_seconds
from .statistics import ERRORS, Bits, Difference, Ranks, noise, paired, ranks, ranks_by
from .variants import DENSE, VARIANTS


def comparison(records: Sequence[Record], names: Sequence[str], base: str, quoted: Mapping[str, paper.Row]) -> str:
    """A row for each of these layers that has a finished run; chance is known from all records."""
    of = {name: [record for record in records if record["variant"] == name] for name in [*names, base]}
    bits = bits_of(records)
    chance, rows = noise(bits), []
    for name in names:
        if not of[name]:
            continue
        difference = paired(bits.get(name, {}), bits.get(base, {}), chance) if name != base else None
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
    legend = f"Parameters and FLOPs are the FFN's, time the model's training step's, of {label}'s on the same machine"
    legend += ", at any commit."
    if any(map(emulated, records)):
        legend += " Machines without instructions for bfloat16 are left out of it."
    sources = "; ".join(
        f"{VARIANTS[name].label}: {quoted[name].source}" for name in names if name in quoted and of[name]
    )
    return f"{table}\n\n{legend} The paper's numbers: {sources}.\n"


def bits_of(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Of the test text, by layer and seed: of the runs that did not diverge."""
    bits: dict[str, dict[int, float]] = {}
    for record in records:
        if not record["diverged"]:
            bits.setdefault(record["variant"], {})[record["seed"]] = record["bits_per_byte"]["test"]
    return bits


def diverged_of(records: Sequence[Record]) -> set[str]:
    """The layers of which some runs diverged."""
    return {record["variant"] for record in records if record["diverged"]}


def other_runs(records: Sequence[Record], names: Collection[str]) -> str:
    """That what is told of some of these layers leaves out runs; "" if none diverged."""
    diverged = diverged_of(records)
    lost = " / ".join(VARIANTS[name].label for name in names if name in diverged)
    return f"Some runs diverged of {lost}: what is told of them here is of their other runs." if lost else ""


def _difference(difference: Difference | None, is_base: bool) -> str:
    return "" if is_base else str(difference or "–")


def _seeds(n: int, diverged: int, paired_with_base: int | None) -> str:
    """How many there are; of how many the difference is, where it is of fewer."""
    of_fewer = f", {paired_with_base} of them paired" if paired_with_base not in (None, n - diverged) else ""
    return f"{n}{f', {diverged} diverged' if diverged else ''}{of_fewer}"


def _relative(records: Sequence[Record], base: Sequence[Record], key: str) -> str:
    return f"{records[0][key] / base[0][key]:.1%}" if base else "–"


def _relative_time(records: Sequence[Record], base: Sequence[Record]) -> str:
    """On machines that both ran on: to a tenth, since other programs take their part of its caches."""
    own, others = times(records), times(base)
    ratios = [own[machine] / others[machine] for machine in own if machine in others]
    return f"{mean(ratios):.1f}x" if ratios else "–"


def times(records: Sequence[Record]) -> dict[tuple[str, int], float]:
    """Seconds of training a byte, by machine and threads, where the machine computes in bfloat16."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for record in records:
        if not emulated(record) and not record["diverged"]:
            seconds.setdefault(machine_of(record), []).append(training_seconds(record) / record["training_bytes"])
    return {machine: mean(found) for machine, found in seconds.items()}


def beside_the_paper(
    records: Sequence[Record], names: Sequence[str], base: str, quoted: Mapping[str, paper.Row]
) -> Iterator[str]:
    """The ranks, and the layers whose rank or whose difference from the base is another than the paper's."""
    every = bits_of(records)
    chance = noise(every)
    bits = {name: of for name, of in every.items() if name in names and name in quoted}
    if len(bits) < 2:
        return
    columns = {column: {name: getattr(quoted[name], column) for name in bits} for column in paper.COLUMNS}
    here, theirs = ranks(bits, chance), {column: _printed_ranks(of, column) for column, of in columns.items()}
    above = {name: paired(of, bits.get(base, {}), chance) for name, of in bits.items()}
    rows = [
        [VARIANTS[name].label, str(here[name]), *(str(found[name]) for found in theirs.values())]
        for name, _ in sorted(above.items(), key=lambda item: item[1].mean if item[1] else math.inf)
    ]
    near = paper.NEAR
    yield "The ranks among the layers that the paper has too, 1 the lowest. Layers that cannot be told apart share"
    yield "theirs: here those between which the difference is called neither higher nor lower, there those whose bits"
    yield f"are within {near['e8']} of each other and may be equal but for rounding, or whose perplexities are within"
    yield f"{near['wt_s']}: so far apart are the paper's two runs of SigmaMoE, which by all signs differ in the"
    yield "weight of their loss too. How much chance is in its runs of Enwik8 is not known.\n"
    yield markdown((["FFN", "here", *paper.COLUMNS.values()], rows)) + "\n"
    if left_out := other_runs(records, bits):
        yield f"{left_out}\n"
    numbers, there = columns[paper.SAME_TEXT], theirs[paper.SAME_TEXT]
    moved = [
        f"{VARIANTS[name].label} ({here[name]} here, {there[name]} there)"
        for name in bits
        if here[name].apart(there[name])
    ]
    turned = []
    for name, found in above.items():
        own, of_base = numbers[name], getattr(quoted[base], paper.SAME_TEXT)
        direction = paper.direction(own, of_base, paper.SAME_TEXT)
        if name == base or found is None or found.error is None or found.verdict == direction:
            continue
        if paper.excludes(own, of_base, found.interval):
            turned.append(f"{VARIANTS[name].label} ({found.verdict} here, {direction} there)")
    other = [
        f"{what} of {', '.join(of)}"
        for what, of in (("the rank", moved), (f"the difference from {_short(base)}", turned))
        if of
    ]
    where = paper.COLUMNS[paper.SAME_TEXT]
    told = sum(name != base and found is not None and found.error is not None for name, found in above.items())
    if other:
        yield f"Other than in {where}: {'; '.join(other)}.\n"
    elif told:
        yield f"Of the {told} with more than one seed none is known to be other than in {where}.\n"
    else:
        few = "With one seed each" if all(len(of) == 1 for of in bits.values()) else "Of so few runs"
        yield f"{few} it cannot be told whether they are other than in {where}.\n"


def _printed_ranks(values: Mapping[str, float], column: str) -> dict[str, Ranks]:
    return ranks_by(values, lambda a, b: paper.direction(values[a], values[b], column) == "lower")


def verdicts(records: Sequence[Record], names: Sequence[str], base: str) -> Iterator[str]:
    """In words: how many layers are called what, and whether their differences rise in the course of training."""
    bits, label = bits_of(records), _short(base)
    chance = noise(bits)
    diverged = diverged_of(records)
    called: dict[str, list[str]] = {"higher": [], "none": [], "lower": []}
    for name in names:
        found = paired(bits.get(name, {}), bits.get(base, {}), chance) if name != base else None
        if found is not None and found.error is not None and name not in diverged:
            called[found.verdict].append(VARIANTS[name].label)
    n = sum(map(len, called.values()))
    if not n:
        return
    words = {"higher": f"above {label}", "none": f"not told from {label}", "lower": f"below {label}"}
    said = "; ".join(f"{words[verdict]}: {' / '.join(of) or 'none'}" for verdict, of in called.items())
    lost = " / ".join(VARIANTS[name].label for name in names if name in diverged)
    yield f"**Of {n} layers with two seeds or more, {said}.{f' Some runs diverged of {lost}.' if lost else ''}**"
    if counted := risen(records, names, base):
        yield f"From a quarter of the text to its end the difference from {label}, with its sign, {counted}."


def risen(records: Sequence[Record], names: Sequence[str], base: str) -> str:
    """Of how many layers the difference, with its sign, is another after all of the text than after the first part.

    "" where no layer has an error.
    """
    first, last = (_after(records, part) for part in (PARTS[0], PARTS[-1]))
    change = {name: {seed: of[seed] - first[name][seed] for seed in of} for name, of in last.items()}
    chance = noise(change)
    found = [paired(change.get(name, {}), change.get(base, {}), chance) for name in names if name != base]
    called = [difference.verdict for difference in found if difference and difference.error is not None]
    if not called:
        return ""
    said = f"rose by more than {ERRORS} standard errors for {called.count('higher')} of {len(called)} layers"
    return f"{said} and fell as much for {called.count('lower')}"


def spread(records: Sequence[Record]) -> str:
    """The deviation that chance adds to a run, and how much one layer has to do with it."""
    bits = bits_of(records)
    chance, without = noise(bits), without_one(bits)
    if chance is None:
        return ""
    said = f"Chance adds a standard deviation of {chance.deviation:.4f} to a run, known from {chance.freedom} degrees"
    said += " of freedom"
    if without:
        low, high = (f"{without[name]:.4f} ({VARIANTS[name].label})" for name in _ends(without))
        said += f"; without the runs of any one layer it would be {low} to {high}"
    return fill(f"{said}.", 118)


def without_one(bits: Bits) -> dict[str, float]:
    """What the deviation would be without the runs of each layer that tells of it."""
    left = {name: noise({other: of for other, of in bits.items() if other != name}, 1) for name in bits}
    return {name: found.deviation for name, found in left.items() if found and len(bits[name]) > 1}


def _ends(values: Mapping[str, float]) -> tuple[str, str]:
    return min(values, key=values.__getitem__), max(values, key=values.__getitem__)


def _course(records: Sequence[Record], names: Sequence[str], base: str, part: float) -> dict[str, Difference]:
    """Each layer's difference after this part of the text, on the curves' windows."""
    bits = _after(records, part)
    found = {name: paired(bits.get(name, {}), bits.get(base, {}), noise(bits)) for name in names if name != base}
    return {name: difference for name, difference in found.items() if difference is not None}


PARTS = (0.25, 0.5, 0.75, 1.0)
"""Of the text of a run."""


def course(records: Sequence[Record], names: Sequence[str], base: str) -> str:
    """The difference from the base after parts of the text, of the validation windows of the curves."""
    after = [_course(records, names, base, part) for part in PARTS]
    known = [name for name in names if any(name in found for found in after)]
    rows = [[VARIANTS[name].label, *(str(found.get(name, "–")) for found in after)] for name in known]
    if not rows:
        return ""
    header = ["FFN", *(f"{part:.0%} of the text" for part in PARTS)]
    windows = records[0]["config"]["eval_windows"]
    what = (
        f"The difference from {_short(base)} in the course of training, in bits per byte of the curves' {windows}\n"
        "windows. All runs share them, so the errors do not know what chance is in them: the test text, which is\n"
        "larger, may say another thing at the end."
    )
    return f"{what}\n\n{markdown((header, rows))}\n"


def _after(records: Sequence[Record], part: float) -> dict[str, dict[int, float]]:
    """Bits per byte by layer and seed at the point that is the nearest to this part of the text."""
    bits: dict[str, dict[int, float]] = {}
    for record in records:
        if not record["diverged"]:
            done, points = record["curve"]["bytes"], record["curve"]["bits_per_byte"]
            at = min(range(len(done)), key=lambda i: abs(done[i] - part * done[-1]))
            bits.setdefault(record["variant"], {})[record["seed"]] = points[at]
    return bits


CHOSEN: dict[str, tuple[float, float]] = {
    "topk-16": (1 / 16, 0),
    "topk-4": (1 / 4, 0),
    "sigma-k8": (1 / 4, 1 / 2),
    "sigma-8": (1 / 8, 1),
    "sigma": (1 / 4, 1),
    "sigma-2": (1 / 2, 1),
    "sigma-k2": (1 / 4, 2),
    "sigma-k1": (1 / 4, 4),
}
"""Layers that differ in the share of units that a token uses and in what is chosen: single units (0), or experts of so
many times SigmaMoE's size."""


def chosen(records: Sequence[Record]) -> str:
    """The difference from dense by how many units a token uses, and in what blocks they are chosen."""
    bits, diverged = bits_of(records), diverged_of(records)
    chance, config = noise(bits), records[0]["config"]
    rows = []
    for name, (share, size) in CHOSEN.items():
        if found := paired(bits.get(name, {}), bits.get(DENSE, {}), chance):
            block = round(size * config["expert_size"]) or 1
            called = "diverged" if name in diverged else found.verdict
            rows.append([str(block), str(round(share * config["d_ff"])), str(found), called, str(found.n)])
    if len(rows) < 2:
        return ""
    what = (
        "How many hidden units a token uses, and in blocks of how many they are chosen: by SigmaMoE's router, or one\n"
        "by one by TopKFFN, which has no router and no gates, looks at all keys, and has biases."
    )
    header = ["chosen in blocks of", "units a token", "difference from dense", "called", "seeds"]
    return f"{what}\n\n{markdown((header, rows))}\n"


def _short(base: str) -> str:
    return "dense" if base == DENSE else "SigmaMoE"
