"""Numbers and layouts: structure from hypothesis, so that it shrinks; numbers from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

LOW = (torch.float16, torch.bfloat16)
SIZES = st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 48, 64, 67, 130])
DEPTHS = st.one_of(SIZES, SIZES, SIZES, st.sampled_from([0, 513, 530, 1050]))  # beyond a packed panel
WIDTHS = st.one_of(SIZES, SIZES, SIZES, st.just(0))
TOKENS = st.one_of(SIZES, SIZES, st.sampled_from([0, 32, 257, 400]))
EXPERTS = st.sampled_from([1, 2, 3, 5, 9, 16])
SIDES = st.one_of(st.tuples(SIZES, DEPTHS), st.tuples(DEPTHS, SIZES))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
CORE = [torch.float32, torch.bfloat16]  # of ops that only the core has
SEEDS = st.integers(0, 2**31)
LAYOUTS = st.sampled_from(
    [
        *("contiguous", "transposed", "offset", "sliced columns", "sliced rows", "every other column", "one row"),
        "one column",
    ]
)
KINDS = st.sampled_from([*["plain"] * 5, "nan", "infinity", "huge", "top", "bottom"])
"""What one of the tensors has in it: some numbers of a kind; or all of it is near the largest or smallest numbers."""


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of x behind other strides, with NaN (or an index out of range) in the gaps.

    "one row" and "one column" repeat x's first one; a shape that a layout does not fit stays as it is.
    """
    if layout == "contiguous" or x.dim() == 0 or x.numel() == 0:
        return x
    gap = float("nan") if x.is_floating_point() else -(2**40)
    if layout == "one row":
        return x[:1].expand(x.shape)
    if layout == "one column":
        return x[..., :1].expand(x.shape)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        buffer = torch.full((x.numel() + 6,), gap, dtype=x.dtype)
        view = buffer[3:-3].view(x.shape)
    elif layout == "sliced columns":
        view = torch.full((*x.shape[:-1], x.shape[-1] + 5), gap, dtype=x.dtype)[..., 2:-3]
    elif layout == "sliced rows":
        view = torch.full((2 * x.shape[0] + 1, *x.shape[1:]), gap, dtype=x.dtype)[1::2]
    else:
        view = torch.full((*x.shape[:-1], 2 * x.shape[-1]), gap, dtype=x.dtype)[..., ::2]
    return view.copy_(x)


@dataclass
class Numbers:
    """Draws tensors for a call in a dtype."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.draw(SEEDS))

    def real(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def whole(self, *shape: int) -> Tensor:
        """Small numbers whose products are exact in every dtype: no rounding moves one over a kink or in a ranking."""
        limit = 2 if shape[-1] < 200 and self.dtype != torch.float16 else 1  # fp16 overflows
        return torch.randint(-limit, limit + 1, shape, generator=self.generator).to(self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """Gates and reduction weights: at least fp32, or the op's own dtype."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return self.real(*shape, dtype=self.draw(st.sampled_from([wide, self.dtype])))

    def dropout(self, *shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.generator).to(self.dtype) * 2

    def index(self, limit: int, *shape: int) -> Tensor:
        """Indices below limit: uniform, crowded (Zipf), all the same, in order (repeating), or only even ones."""
        kind = self.draw(st.sampled_from(["uniform", "zipf", "one", "ordered", "even"]))
        n = torch.Size(shape).numel()
        if kind == "ordered":
            index = torch.arange(n) % limit
        elif kind == "one":
            index = torch.full((n,), self.draw(st.integers(0, limit - 1)))
        elif kind == "zipf":
            crowd = 1 / torch.arange(1, limit + 1, dtype=torch.float64) ** 1.5
            index = crowd.expand(max(n, 1), -1).multinomial(1, generator=self.generator)[:n, 0]
        else:
            index = torch.randint(0, limit, (n,), generator=self.generator)
            index = index // 2 * 2 if kind == "even" else index
        return index.view(shape)

    def experts(self, n_experts: int, *shape: int) -> Tensor:
        """Experts of slots, of which none, some, or all are void."""
        index = self.index(n_experts, *shape)
        share = self.draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]))
        return index.masked_fill(torch.rand(shape, generator=self.generator) < share, n_experts)

    def spoil(self, x: Tensor, kind: str) -> Tensor:
        """x with numbers of a kind in it."""
        info = torch.finfo(x.dtype)
        if kind == "plain" or x.numel() == 0:
            return x
        if kind in ("top", "bottom"):
            largest = float(x.abs().nan_to_num(0, 0).max())
            if largest == 0:
                return x
            to = info.max / 2.0 ** self.draw(st.integers(1, 4)) if kind == "top" else info.tiny
            if x.dtype == torch.float64:  # what is right is computed in fp64
                to = 2.0**100 if kind == "top" else 2.0**-100
            if kind == "bottom":
                to *= 2.0 ** self.draw(st.integers(-4, 4))
            return (x.double() * 2.0 ** math.floor(math.log2(to / largest))).to(x.dtype)
        huge = _huge(x.dtype)
        numbers = {"nan": [math.nan], "infinity": [math.inf, -math.inf], "huge": [huge, -huge]}[kind]
        n = 1 if kind == "huge" else self.draw(st.integers(1, 3))  # the sum of two huge numbers may lose a third
        places = torch.randint(0, x.numel(), (n,), generator=self.generator)
        which = torch.randint(0, len(numbers), (n,), generator=self.generator)
        x.view(-1)[places] = torch.tensor(numbers, dtype=x.dtype)[which]
        return x


def _huge(dtype: torch.dtype) -> float:
    """A power of two beside which small numbers vanish in every sum."""
    return 2.0**15 if dtype == torch.float16 else 2.0**100 if dtype == torch.float64 else 2.0**126
