"""Tables that set machines side by side: what a reader of the documentation asks first."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from benchmarks.machine import OTHERS
from benchmarks.measuring.records import Result, Row
from benchmarks.measuring.report import Table, digits
from benchmarks.pages.machines import Machine
from benchmarks.shapes import MoEShape

COMPUTE, PARAMETERS = "dense, equal compute", "dense, equal parameters"
KEPT = ("sparse-ffn", COMPUTE, PARAMETERS, "per-expert loop", "torch grouped_mm")
LEAST = 256  # tokens from which a shape is a training step, not a few tokens that are decoded
FACTS = ("processor", "cores", "16-bit instructions", "CPU core", "torch", "sparse-ffn", "peers", OTHERS)
OPTIONAL = ("load average before the run", "provenance")
MEMORIES = {"pkm": "ProductKeyMemory: ", "pkm-query": "ProductKeyMemory with a query: "}


def facts(machines: Sequence[Machine]) -> Table:
    """What the machines are, one a column."""
    asked = (*FACTS, *(name for name in OPTIONAL if any(name in m.facts for m in machines)))
    return ("", *titles(machines)), [[name, *(m.facts.get(name, "not recorded") for m in machines)] for name in asked]


def titles(machines: Sequence[Machine]) -> list[str]:
    """Their titles, or the names of their folders where two titles are the same."""
    found = [machine.title for machine in machines]
    return [m.name if found.count(m.title) > 1 else m.title for m in machines]


def instructions(machines: Sequence[Machine]) -> str:
    """The 16-bit instructions of each, as a sentence beside a table."""
    said = (f"{title}: {m.instructions}" for title, m in zip(titles(machines), machines, strict=True))
    return f"16-bit instructions of {'; '.join(said)}."


def rows(machine: Machine, group: str, mode: str, dtype: str, part: str = "layers") -> list[Row]:
    """A machine's rows of a layer, a pass and a dtype."""
    return [row for row in machine.rows(part) if (row.group, row.mode, row.dtype) == (group, mode, dtype)]


def replaced(machines: Sequence[Machine]) -> Table:
    """Time relative to the dense FFN of equal parameters, which a layer replaces."""
    return _by_shape(machines, ("moe", "topk"), lambda row: _ratio(relative(row, of_replaced(row))))


def computed(machines: Sequence[Machine]) -> Table:
    """Time relative to a dense FFN of equal arithmetic: what the sparsity costs."""
    return _by_shape(machines, ("moe",), lambda row: _ratio(relative(row, COMPUTE)))


def peers(machines: Sequence[Machine]) -> Table:
    """How many times longer a training step of other implementations takes: over all shapes the least and the most."""
    columns, parts = list(_columns(machines)), ("layers", "authors")
    every = [row for machine in machines for part in parts for row in machine.rows(part) if row.mode == "fwdbwd"]
    body = []
    for group, name in dict.fromkeys((row.group, r.name) for row in every for r in row.results if r.kind == "peer"):
        found = [
            [
                r
                for part in parts
                for row in rows(machine, group, "fwdbwd", dtype, part)
                for r in row.results
                if r.name == name
            ]
            for machine, dtype in columns
        ]
        body.append([f"{MEMORIES.get(group, '')}{name}", *map(_span, found)])
    return ("", *_heads(machines, columns)), body


def kept(machines: Sequence[Machine]) -> Table:
    """Millions of numbers that a training step keeps for its backward pass; they do not depend on the machine."""
    steps = [row for row in machines[0].rows() if (row.group, row.mode) == ("moe", "fwdbwd")]
    steps = [row for row in steps if row.dtype == steps[0].dtype and MoEShape.parse(row.shape).T >= LEAST]
    return ("", *KEPT), [[words(row), *(_millions(row, name) for name in KEPT)] for row in steps]


def topk(machines: Sequence[Machine], percents: Sequence[int]) -> Table:
    """Time of TopKFFN relative to the dense FFN that it replaces, where it keeps these shares of its units."""
    columns = list(_columns(machines))
    lines: dict[tuple[str, ...], list[list[str]]] = {}
    for i, (machine, dtype) in enumerate(columns):
        for group, mode in itertools.product(("topk", "topk-glu"), ("fwdbwd", "fwd")):
            for row in rows(machine, group, mode, dtype, "topk"):
                tokens, width, units, k = map(int, re.findall(r"=(\d+)", row.shape))
                percent = round(100 * k / units)
                if percent in percents:
                    name = (_tokens(tokens, width), "GLU" if group == "topk-glu" else "ReLU", f"{percent}%")
                    lines.setdefault(name, [[] for _ in columns])[i].append(_ratio(relative(row, row.baseline)))
    body = [[*name, *(" / ".join(said) or "-" for said in cells)] for name, cells in lines.items()]
    return ("", "", "kept", *_heads(machines, columns)), body


def experts(machines: Sequence[Machine]) -> Table:
    """Milliseconds of ours and of the dense FFN of equal parameters, against the number of experts."""
    names = {"sparse-ffn": "sparse-ffn", PARAMETERS: "dense"}
    points: dict[str, dict[tuple[str, str], str]] = {}
    for machine in machines:
        for row in (row for row in machine.rows("sweeps") if row.group == "experts"):
            line = points.setdefault(row.shape.partition(";")[0].partition("=")[2], {})
            for result in (result for result in row.results if result.name in names and result.seconds):
                line[machine.name, result.name] = digits(result.seconds.median * 1e3)
    heads = [f"{title}: {short}" for title in titles(machines) for short in names.values()]
    columns = [(machine.name, name) for machine in machines for name in names]
    return ("experts", *heads), [[point, *(line.get(c, "-") for c in columns)] for point, line in points.items()]


def steps(machine: Machine) -> Table:
    """Its profiles of the CPU core, a step a line."""
    body = []
    for found in machine.profiles:
        *_, step, baseline = found.table()[1]
        body.append([found.shape, found.dtype, found.mode, *step[1:], *found.gigabytes(), found.baseline, baseline[1]])
    return ("shape", "dtype", "pass", "ms", "floor", "of floor", "GB/s", "of torch.sum", "beside", "ms"), body


def first_screen(machines: Sequence[Machine], shapes: Iterable[MoEShape]) -> Table:
    """Milliseconds of a training step, and how many times longer dense FFNs take: of equal parameters / arithmetic.

    Those in bf16 or fp32, whichever is faster: a processor without instructions for bf16 would make them look slow.
    """
    columns, body = list(_columns(machines)), []
    for name in map(sentence, shapes):
        of_shape = [
            {d: row for d in (dtype, "fp32") for row in rows(machine, "moe", "fwdbwd", d) if words(row) == name}
            for machine, dtype in columns
        ]
        found = [_times_faster(of, dtype) for of, (_, dtype) in zip(of_shape, columns, strict=True)]
        if any(cell != "-" for cell in found):
            body.append([name, *found])
    return ("", *_heads(machines, columns)), body


def _times_faster(of_dtype: Mapping[str, Row], dtype: str) -> str:
    row = of_dtype.get(dtype)
    if row is None or (ours := row.results[0].seconds) is None:
        return "-"
    exact = None if dtype == "fp32" else of_dtype.get("fp32")
    factors = []
    for name in (PARAMETERS, COMPUTE):
        own = relative(row, name)
        if own is None:
            return "-"
        factors.append(1 / own)
        if exact and (in_fp32 := relative(exact, name)) and exact.results[0].seconds:  # each ratio is of a round
            factors[-1] = min(1 / own, exact.results[0].seconds.median / in_fp32 / ours.median)
    return f"{digits(ours.median * 1e3)} ms, {' / '.join(f'{factor:.1f}×' for factor in factors)}"


def relative(row: Row, to: str) -> float | None:
    """Our time relative to another contender's, both of one round; None if either was not timed."""
    theirs, ours = over_ours(row, to), row.results[0].ratio
    if theirs is None:
        return None
    return ours.median if to == row.baseline and ours is not None else 1 / theirs


def over_ours(row: Row, name: str) -> float | None:
    """A contender's time relative to ours; None if either was not timed."""
    slowdown = next((result.slowdown for result in row.results if result.name == name), None)
    return None if slowdown is None else slowdown.median


def of_replaced(row: Row) -> str:
    """The dense network that a layer of this row replaces."""
    return "dense" if row.group == "topk" else PARAMETERS


def words(row: Row) -> str:
    """The shape of a mixture or of a TopKFFN for people."""
    if row.group != "topk":
        return sentence(MoEShape.parse(row.shape))
    tokens, width, units, k = re.findall(r"=(\d+)", row.shape)
    return f"{tokens} tokens of {width}, TopKFFN: {k} of {units} units"


def sentence(shape: MoEShape) -> str:
    """A mixture's shape for people."""
    return f"{_tokens(shape.T, shape.D)}, {shape.k} of {shape.E} experts of {shape.G}"


def _tokens(n: int, width: int) -> str:
    return f"1 token of {width}" if n == 1 else f"{n} tokens of {width}"


def _by_shape(machines: Sequence[Machine], groups: Sequence[str], cell: Callable[[Row], str]) -> Table:
    """A line for each shape, whose cells have a number for each pass."""
    columns = list(_columns(machines))
    lines: dict[str, list[list[str]]] = {}
    for i, (machine, dtype) in enumerate(columns):
        for row in (row for group in groups for mode in ("fwdbwd", "fwd") for row in rows(machine, group, mode, dtype)):
            lines.setdefault(words(row), [[] for _ in columns])[i].append(cell(row))
    body = [[name, *(" / ".join(said) or "-" for said in cells)] for name, cells in lines.items()]
    return ("", *_heads(machines, columns)), body


def _columns(machines: Sequence[Machine]) -> Iterator[tuple[Machine, str]]:
    for machine in machines:
        for dtype in sorted({row.dtype for row in machine.rows()}, reverse=True):  # fp32 before bf16
            yield machine, dtype


def _heads(machines: Sequence[Machine], columns: Iterable[tuple[Machine, str]]) -> list[str]:
    names = dict(zip((m.name for m in machines), titles(machines), strict=True))
    return [f"{names[machine.name]}, {dtype}" for machine, dtype in columns]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _span(results: Sequence[Result]) -> str:
    times = [result.slowdown.median for result in results if result.slowdown is not None]
    if not times:
        return results[0].status if results else "-"
    low, high = (f"{factor:.1f}" if factor < 10 else f"{factor:.0f}" for factor in (min(times), max(times)))
    few = "" if len(times) == len(results) else f" ({len(times)} of {len(results)})"
    return (low if low == high else f"{low} – {high}") + few


def _millions(row: Row, name: str) -> str:
    saved = next((result.saved for result in row.results if result.name == name), None)
    return "-" if saved is None else digits(saved.elements / 1e6)
