"""Benchmark of cvmm against one dense product of the same arithmetic, torch's grouped_mm, and other libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

from benchmarks import plot
from benchmarks.contenders.cvmm import cvmm_case
from benchmarks.measuring.contender import Case
from benchmarks.measuring.records import Report
from benchmarks.options import add_shapes, collect, parser
from benchmarks.shapes import moe_shapes


def main(argv: Sequence[str] | None = None) -> Report:
    """Run from the command line."""
    arguments = parser(__doc__ or "", seconds=2)
    add_shapes(arguments)
    arguments.add_argument("--void", type=float, default=0.0, help="share of void slots in a row of its own")
    options = arguments.parse_args(argv)

    def cases() -> Iterator[Case]:
        for dtype in options.dtype:
            for shape in options.shapes or moe_shapes(options.device):
                yield cvmm_case(shape, dtype, options.device, down=False, void=options.void)
                yield cvmm_case(shape, dtype, options.device, down=True, void=options.void)

    return collect(options, cases, plot.ratios, argv)


if __name__ == "__main__":
    main()
