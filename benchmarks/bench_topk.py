"""Benchmark of TopKFFN from few units to all against the dense FFN that it replaces, for one token and for many."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

from benchmarks import plot
from benchmarks.contenders.memories import topk_case
from benchmarks.measuring.contender import Case, checked_on
from benchmarks.measuring.records import Report
from benchmarks.options import collect, parser
from benchmarks.shapes import TOPK_TOKENS, topk_sweep

NAMES = ("sparse-ffn", "dense")  # bench_layers has the others
CHECKED_TOKENS = 256


def main(argv: Sequence[str] | None = None) -> Report:
    """Run from the command line."""
    arguments = parser(__doc__ or "", seconds=1)
    add = arguments.add_argument
    add("--tokens", nargs="+", type=int, default=list(TOPK_TOKENS), help="default: one, a few and many")
    add("--points", type=int, help="only so many k, the smallest ones")
    options = arguments.parse_args(argv)

    def cases() -> Iterator[Case]:
        for dtype in options.dtype:
            for glu in (False, True):
                for tokens in options.tokens:
                    for shape in topk_sweep(tokens)[: options.points]:
                        case = topk_case(shape, dtype, options.device, glu=glu)
                        entries = tuple(
                            checked_on(entry, CHECKED_TOKENS) for entry in case.entries if entry.name in NAMES
                        )
                        yield replace(case, entries=entries)

    return collect(options, cases, plot.ratios, argv)


if __name__ == "__main__":
    main()
