"""Results as tables, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring.records import MODES, Report, Result, Row
from benchmarks.measuring.timing import Quartiles

Table = tuple[Sequence[str], list[list[str]]]  # header and body

GROUPS = {
    "moe": "Mixture of experts, ReLU (T,D,E,G,k)",
    "moe-glu": "Mixture of experts, GLU with SiLU (T,D,E,G,k)",
    "pkm": "ProductKeyMemory",
    "pkm-query": "ProductKeyMemory with a learned query and softmax",
    "topk": "TopKFFN",
    "topk-glu": "TopKFFN, gated",
    "cvmm-up": "cvmm, tokens to slots: gather (T,D,E,G,k)",
    "cvmm-down": "cvmm, slots to tokens: weigh and scatter (T,D,E,G,k)",
    "width-experts": "Growing width, more experts with it (a)",
    "width-size": "Growing width, larger experts with it (b)",
    "experts": "Growing number of experts (c)",
    "size": "Growing size of experts (d)",
    "width": "Growing width (e)",
}


def contenders(row: Row) -> Table:
    """One row's contenders."""
    header = ("", "ms [quartiles]", f"of {row.baseline}", "over ours", "rounds", "kept", "peak", "error of y")
    if row.device != "cuda":
        return header, [_contender(result) for result in row.results]
    body = [[*_contender(r), spread(r.host, 1e3) if r.host else "", r.clock] for r in row.results]
    return (*header, "host, ms", "by"), body


def _contender(result: Result) -> list[str]:
    if result.status != "timed":
        return [result.name, f"{result.status}: {result.note}", *[""] * 6]
    return [
        result.name,
        spread(result.seconds, 1e3),
        spread(result.ratio),
        spread(result.slowdown),
        "" if result.seconds is None else str(result.seconds.rounds),
        "" if result.saved is None else f"{result.saved.elements:,}",
        "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.1f} MiB",
        f"{result.errors['y']:.0e}" if "y" in result.errors else "",
    ]


def peers(rows: Sequence[Row]) -> Table:
    """How many times slower than ours each peer is, by row."""
    names = list(dict.fromkeys(r.name for row in rows for r in row.results if r.kind == "peer"))
    body = []
    for row in rows:
        found = {result.name: result for result in row.results}
        body.append([row.shape, row.dtype, row.mode, *(_slowdown(found.get(name)) for name in names)])
    return ("shape", "dtype", "pass", *names), body


def _slowdown(result: Result | None) -> str:
    if result is None:
        return "not asked for"
    return f"{result.slowdown.median:.2f}" if result.slowdown is not None else result.status


def spread(quartiles: Quartiles | None, factor: float = 1.0) -> str:
    """Median and quartiles."""
    if quartiles is None:
        return "-"
    low, median, high = (digits(q * factor) for q in (quartiles.low, quartiles.median, quartiles.high))
    return median if quartiles.rounds == 1 else f"{median} [{low}, {high}]"


def digits(value: float) -> str:
    """Three digits."""
    rounded = float(f"{value:.3g}")
    return f"{value:.{0 if rounded >= 100 else 1 if rounded >= 10 else 2 if rounded >= 1 else 3}f}"


def title(row: Row) -> str:
    """One row's heading."""
    return f"{GROUPS.get(row.group, row.group)}: {row.shape}, {row.dtype}, {MODES[row.mode]}"


def text(table: Table) -> str:
    """For the terminal: first column to the left, the others to the right."""
    header, body = table
    lines = [list(header), *body]
    last = {i: max(len(line[i]) for line in lines if not _is_note(line) or i == 0) for i in range(len(header))}
    out = []
    for line in lines:
        if _is_note(line):
            out.append(f"{line[0].ljust(last[0])}  {line[1]}")
        else:
            cells = (cell.ljust(last[i]) if i == 0 else cell.rjust(last[i]) for i, cell in enumerate(line))
            out.append("  ".join(cells).rstrip())
    out.insert(1, "  ".join("-" * last[i] for i in range(len(header))))
    return "\n".join(out)


def _is_note(line: Sequence[str]) -> bool:
    """A contender without times has a sentence in place of the numbers."""
    return len(line) > 2 and not any(line[2:])


def markdown(table: Table) -> str:
    """As a Markdown table."""
    header, body = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (list(header), rule, *body))


def summary(report: Report) -> str:
    """What a run ends with on the terminal before the targets: machine, peers."""
    parts = ["\n".join(f"{name:28} {value}" for name, value in report.machine.items())]
    for group, rows in report.groups():
        if any(result.kind == "peer" for row in rows for result in row.results):
            parts.append(f"{GROUPS.get(group, group)}: times slower than ours\n\n{text(peers(rows))}")
    return "\n\n".join(parts)
