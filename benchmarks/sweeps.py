"""The paper's sweeps (a) to (e): time and memory of one layer against its width, its experts and their size.

arXiv 2310.10837, appendix B: forward and backward, k = 4 experts, against the dense network of equal parameters. Its
claim: a mixture of experts costs almost the same however many experts there are. On a CPU (c) and (e) are run, with
fewer tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

from benchmarks import plot
from benchmarks.contenders.moe import moe_case
from benchmarks.measuring.contender import Case, checked_on
from benchmarks.measuring.records import Report
from benchmarks.options import collect, parser
from benchmarks.shapes import MoEShape

SIZE, K, FIXED_WIDTH, FIXED_EXPERTS = 128, 4, 512, 32
NAMES = ("sparse-ffn", "dense, equal compute", "dense, equal parameters", "torch grouped_mm")
CHECKED_TOKENS = 256
TOKENS = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True)
class Sweep:
    """One sweep: its name in the paper and in the tables, what grows, what is fixed, and d_model, N_E, G of a point."""

    letter: str
    group: str
    grows: str
    points: tuple[int, ...]
    fixed: str
    sizes: Callable[[int], tuple[int, int, int]]


SWEEPS = (
    Sweep("a", "width-experts", "d_model", (128, 256, 512, 1024, 2048, 4096), "d_ff = 4 d_model, G=128",
          lambda d: (d, 4 * d // SIZE, SIZE)),
    Sweep("b", "width-size", "d_model", (128, 256, 512, 1024, 2048, 4096), "d_ff = 4 d_model, N_E=32",
          lambda d: (d, FIXED_EXPERTS, 4 * d // FIXED_EXPERTS)),
    Sweep("c", "experts", "N_E", (8, 16, 32, 64, 128, 256), f"d_model={FIXED_WIDTH}",
          lambda E: (FIXED_WIDTH, E, SIZE)),
    Sweep("d", "size", "G", (64, 128, 256, 512, 1024), f"d_model={FIXED_WIDTH}, N_E={FIXED_EXPERTS}",
          lambda G: (FIXED_WIDTH, FIXED_EXPERTS, G)),
    Sweep("e", "width", "d_model", (128, 256, 512, 1024, 2048), f"N_E={FIXED_EXPERTS}",
          lambda d: (d, FIXED_EXPERTS, SIZE)),
)  # fmt: skip


def sweep_case(sweep: Sweep, point: int, tokens: int, dtype: str, device: torch.device) -> Case:
    """One point of a sweep: few contenders, checked on a part of the tokens, since the oracle computes all experts."""
    D, E, G = sweep.sizes(point)
    case = moe_case(MoEShape(tokens, D, E, G, K), dtype, device)
    entries = tuple(checked_on(entry, CHECKED_TOKENS) for entry in case.entries if entry.name in NAMES)
    shape = f"{sweep.grows}={point}; {sweep.fixed}, T={tokens}"
    return replace(case, group=sweep.group, shape=shape, entries=entries, experts=None)


def main(argv: Sequence[str] | None = None) -> Report:
    """Run from the command line."""
    arguments = parser((__doc__ or "").splitlines()[0], seconds=3)
    arguments.add_argument("--tokens", type=int, help="default 32768, as the paper has, on a GPU, and 4096 on a CPU")
    arguments.add_argument("--sweeps", nargs="+", choices=[sweep.letter for sweep in SWEEPS],
                           help="default: all on a GPU, c and e on a CPU")  # fmt: skip
    arguments.add_argument("--points", type=int, help="only so many of each, the smallest ones")
    arguments.set_defaults(dtype=["fp32"], mode="fwdbwd")
    options = arguments.parse_args(argv)
    kind = "cuda" if options.device.type == "cuda" else "cpu"
    letters = options.sweeps or ("abcde" if kind == "cuda" else "ce")
    tokens = options.tokens or TOKENS[kind]

    def cases() -> Iterator[Case]:
        for dtype in options.dtype:
            for sweep in SWEEPS:
                if sweep.letter in letters:
                    for point in sweep.points[: options.points]:
                        yield sweep_case(sweep, point, tokens, dtype, options.device)

    return collect(options, cases, plot.growth, argv)


if __name__ == "__main__":
    main()
