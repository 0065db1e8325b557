"""Benchmark of the layers against dense networks, plain torch and other libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

from benchmarks import plot
from benchmarks.contenders.memories import memory_case, topk_case
from benchmarks.contenders.moe import glu_case, moe_case
from benchmarks.measuring.contender import Case
from benchmarks.measuring.records import Report
from benchmarks.options import add_shapes, collect, parser
from benchmarks.shapes import memory_shape, moe_shapes, topk_shape

LAYERS = ("moe", "moe-glu", "pkm", "pkm-query", "topk")


def main(argv: Sequence[str] | None = None) -> Report:
    """Run from the command line."""
    arguments = parser(__doc__ or "", seconds=3)
    add_shapes(arguments)
    arguments.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="default: all")
    options = arguments.parse_args(argv)

    memory = memory_shape(options.device)

    def cases() -> Iterator[Case]:
        for dtype in options.dtype:
            for shape in options.shapes or moe_shapes(options.device):
                if "moe" in options.layers:
                    yield moe_case(shape, dtype, options.device)
                if "moe-glu" in options.layers:
                    yield glu_case(shape, dtype, options.device)
            if "pkm" in options.layers:
                yield memory_case(memory, dtype, options.device, learned=False)
            if "pkm-query" in options.layers:
                yield memory_case(memory, dtype, options.device, learned=True)
            if "topk" in options.layers:
                yield topk_case(topk_shape(options.device), dtype, options.device)

    return collect(options, cases, plot.ratios, argv)


if __name__ == "__main__":
    main()
