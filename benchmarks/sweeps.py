"""The paper's sweeps (c) and (e), scaled to a CPU: time and memory against the number of experts, and against d_model.

arXiv 2310.10837, appendix B: one layer, forward and backward, k = 4 experts of 128 units, against the dense network of
equal parameters. Its claim: a mixture of experts costs almost the same however many experts there are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

from benchmarks import plot
from benchmarks.contender import Case, Contender
from benchmarks.moe import moe_case
from benchmarks.options import collect, parser
from benchmarks.results import Report
from benchmarks.shapes import MoEShape

SIZE, K = 128, 4
EXPERTS, EXPERTS_WIDTH = (8, 16, 32, 64, 128, 256), 512
WIDTHS, WIDTHS_EXPERTS = (128, 256, 512, 1024, 2048), 32
NAMES = ("sparse-ffn", "dense, equal compute", "dense, equal parameters", "torch grouped_mm")
CHECKED_TOKENS = 256


def _fewer_tokens(build: Callable[[], Contender]) -> Contender:
    return replace(build(), tokens=CHECKED_TOKENS)


def sweep_case(group: str, grows: str, fixed: str, shape: MoEShape, dtype: str, device: torch.device) -> Case:
    """One point of a sweep: few contenders, checked on a part of the tokens, since the oracle computes all experts."""
    case = moe_case(shape, dtype, device)

    entries = tuple(
        replace(entry, build=partial(_fewer_tokens, entry.build)) for entry in case.entries if entry.name in NAMES
    )
    return replace(case, group=group, shape=f"{grows}; {fixed}", entries=entries)


def main(argv: Sequence[str] | None = None) -> Report:
    """Run from the command line."""
    arguments = parser((__doc__ or "").splitlines()[0], seconds=4)
    arguments.add_argument("--tokens", type=int, default=4096, help="default 4096; the paper has 32768")
    arguments.set_defaults(dtype=["fp32"], mode="fwdbwd")
    options = arguments.parse_args(argv)
    T = options.tokens

    def cases() -> Iterator[Case]:
        for dtype in options.dtype:
            for E in EXPERTS:
                shape = MoEShape(T, EXPERTS_WIDTH, E, SIZE, K)
                fixed = f"d_model={EXPERTS_WIDTH}, T={T}"
                yield sweep_case("experts", f"N_E={E}", fixed, shape, dtype, options.device)
            for D in WIDTHS:
                shape = MoEShape(T, D, WIDTHS_EXPERTS, SIZE, K)
                fixed = f"N_E={WIDTHS_EXPERTS}, T={T}"
                yield sweep_case("width", f"d_model={D}", fixed, shape, dtype, options.device)

    return collect(options, cases, plot.growth, argv)


if __name__ == "__main__":
    main()
