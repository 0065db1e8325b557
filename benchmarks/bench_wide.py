"""Benchmark of wide layers: one token, and a GLU of the size of a model that is served, beside kernels for serving."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

from benchmarks import plot
from benchmarks.contenders.moe import moe_case, served_case
from benchmarks.measuring.contender import Case
from benchmarks.measuring.records import Report
from benchmarks.options import collect, parser
from benchmarks.shapes import SERVED, WIDE_SINGLE, MoEShape


def main(argv: Sequence[str] | None = None) -> Report:
    """Run from the command line."""
    arguments = parser(__doc__ or "", seconds=6)
    add = arguments.add_argument
    add("--single", type=MoEShape.parse, default=WIDE_SINGLE, metavar="T,D,E,G,k", help="with ReLU; default one token")
    add("--served", type=MoEShape.parse, default=SERVED, metavar="T,D,E,G,k", help="the GLU, in 16 bits")
    options = arguments.parse_args(argv)

    def cases() -> Iterator[Case]:
        for dtype in options.dtype:
            yield moe_case(options.single, dtype, options.device)
        if "bf16" in options.dtype:
            yield served_case(options.served, "bf16", options.device)

    return collect(options, cases, plot.ratios, argv)


if __name__ == "__main__":
    main()
