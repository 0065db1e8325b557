"""Offsets past 2^31: tensors that are huge by their strides, of which only a few rows are ever touched.

torch.empty maps memory without touching it, and the interpreter reads in place: none of this costs memory. A product of
32-bit numbers that overflows is an error in the interpreter, so these tests fail where 64 bits are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from net import random
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

from sparse_ffn.backends.triton import combine, config, decode, grouped, hidden, outer, product_keys, routing

pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this memory would be real"),
]
FAR = (1 << 30) + 8  # a stride of 32 bits, of which twice has not
TILE = config.Tile(16, 16, 16, 4, 2)


def spread(x: Tensor) -> Tensor:
    """The same numbers, with a stride along the first dimension (three entries) of which twice passes 2^31."""
    assert x.shape[0] == 3
    strides = (FAR, *x[0].contiguous().stride())
    return torch.empty(2 * FAR + x[0].numel(), dtype=torch.float16).as_strided(x.shape, strides).copy_(x)


@contextmanager
def only(module: Any, program: int) -> Iterator[None]:
    """Let a module's launches run one program of a grid that no interpreter would get through."""
    number = TensorHandle(np.array([program], np.int32), tl.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_get_program_id", lambda self, axis: number)
        patch.setattr(module, "launch", lambda kernel, grid, *a, **meta: kernel[(1,)](*a, **meta))
        yield


def plan_of(expert: list[int], n_experts: int) -> routing.Plan:
    return routing.sort_slots(torch.tensor(expert), n_experts, 1, 16, inverse=True)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-3, atol=2e-3)


def test_rows_and_experts_far_apart() -> None:
    x, keys, plan = random(3, 20).half(), random(3, 18, 20).half(), plan_of([2, 1, 0], 3)
    expected = torch.stack([keys[2 - i].double() @ x[i].double() for i in range(3)])
    z, other, h = (torch.empty(3, 18, dtype=torch.float16) for _ in range(3))
    far = spread(keys)
    hidden.up(plan, spread(x), far, far, None, None, z, other, h, "identity", TILE, "ieee")
    close(z[plan.inverse.long()], expected)
    close(other, z)

    out = torch.empty(3, 18, dtype=torch.float16)
    grouped.multiply(plan, spread(x), far.transpose(1, 2), out, TILE, "ieee", rows=plan.order, unsort=True)
    close(out, expected)

    weight = torch.empty(3, 20, 18)
    outer.outer(
        spread(x), spread(x[:, :18]), plan.offsets, plan.order, weight, TILE, "ieee",
        left_rows=plan.order, right_rows=plan.order,
    )  # fmt: skip
    close(weight[0], torch.outer(x[2].double(), x[2, :18].double()))

    total = torch.empty(1, 20, dtype=torch.float16)
    combine.combine(spread(x), torch.tensor([2, 0], dtype=torch.int32), None, total, 2)
    close(total[0], x[2].double() + x[0].double())
    members, offsets = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    combine.add_segments(spread(x), members, offsets, total)
    close(total[0], x[2].double() + x[0].double())


def test_decoding_of_experts_far_apart() -> None:
    x, keys, index = random(3, 20).half(), random(3, 18, 20).half(), torch.tensor([[0], [1], [2]])
    h, y = torch.empty(3, 18), torch.empty(3, 20)
    far = spread(keys)
    decode.up_rows(spread(x), index, far, None, None, None, h, "identity")
    close(h[2], keys[2].double() @ x[2].double())
    decode.down_rows(h, index, torch.ones(3), far, y)
    close(y[2], h[2].double() @ keys[2].double())


def test_hidden_gradient_of_experts_far_apart() -> None:
    grad, values, plan = random(3, 20).half(), random(3, 18, 20).half(), plan_of([2, 1, 0], 3)
    z, dz, weighted = (torch.ones(3, 18, dtype=torch.float16) for _ in range(3))
    dgate = torch.empty(2, 3)
    hidden.hidden_gradient(
        plan, spread(grad), spread(values), z, None, None, torch.ones(3), dz, None, weighted, dgate,
        "relu", TILE, "ieee",
    )  # fmt: skip
    close(dz[plan.inverse.long()], torch.stack([values[2 - i].double() @ grad[i].double() for i in range(3)]))


# outputs of 17 rows of WIDE numbers: the last row begins past 2^31
WIDE = (1 << 27) + 16


def wide(rows: int) -> Tensor:
    return torch.empty(rows, WIDE, dtype=torch.float16)


def test_hidden_units_past_two_billion() -> None:
    S, G = 2064, (1 << 20) + 16
    x, keys, plan = random(S, 16).half(), random(1, 1, 16).half(), plan_of([0] * S, 1)
    z, h, dz, weighted = (torch.empty(S, G, dtype=torch.float16) for _ in range(4))
    expected, every = x[-16:].double() @ keys[0].double().t().expand(16, 16), keys.expand(1, G, 16)
    last = (S // 16) * (G // 16) - 1
    with only(hidden, last):
        hidden.up(plan, x, every, None, None, None, z, None, h, "identity", TILE, "ieee")
    close(z[-16:, -16:], expected)
    close(h[-16:, -16:], expected)
    dgate = torch.empty(G // 16, S)
    z[-16:, -16:] = 1
    with only(hidden, last):
        hidden.hidden_gradient(
            plan, x, every, z, None, None, torch.ones(S), dz, None, weighted, dgate, "identity", TILE, "ieee"
        )
    close(dz[-16:, -16:], expected)


def test_experts_of_too_many_units_are_refused() -> None:
    """Inside a tile offsets have 32 bits."""
    keys = torch.empty(1, 1, 1).expand(1, 1 << 24, 1)
    with pytest.raises(ValueError, match="fewer than 2"):
        hidden.up(plan_of([0], 1), torch.empty(1, 1), keys, None, None, None, None, None, keys, "relu", TILE, "ieee")


def test_gradients_of_scores_far_apart() -> None:
    grad, index = random(3, 1, 2).float(), torch.tensor([[[0, 1]], [[2, 3]], [[5, 8]]])
    out = spread(torch.zeros(3, 6)).as_strided((3, 1, 2, 3), (FAR, 6, 3, 1))
    product_keys.product_keys_gradient(grad, index, out)
    close(out[2, 0, 0], torch.tensor([0, grad[2, 0, 0], grad[2, 0, 1]]))
    close(out[2, 0, 1], torch.tensor([0, 0, grad[2, 0].sum()]))


def test_products_past_two_billion() -> None:
    a, b, plan, out = random(17, 16).half(), random(1, 16, 1).half(), plan_of([0] * 17, 1), wide(17)
    with only(grouped, 2 * (WIDE // 16) - 1):
        grouped.multiply(plan, a, b.expand(1, 16, WIDE), out, TILE, "ieee")
    close(out[16, -16:], (a[16].double() @ b[0, :, 0].double()).expand(16))


def test_matrix_gradients_past_two_billion() -> None:
    left, right, plan, out = random(2, 17).half(), wide(2), plan_of([0] * 2, 1), wide(17)
    right[:, -16:] = random(2, 16).half()
    with only(outer, 2 * (WIDE // 16) - 1):
        outer.outer(left, right, plan.offsets, plan.order, out.unsqueeze(0), TILE, "ieee")
    close(out[16, -16:], left[:, 16].double() @ right[:, -16:].double())
    rows = wide(17)
    rows[:, -16:] = 1
    sums = torch.empty(1, WIDE, dtype=torch.float16)
    offsets = plan_of([0] * 17, 1).offsets
    with only(outer, WIDE // outer.SUM_BLOCK_N):  # the last, ragged block
        outer.sum_rows(rows, offsets, sums)
    close(sums[0, -16:], torch.full((16,), 17))


def test_sums_past_two_billion() -> None:
    y, out = wide(17), wide(17)
    y[16, -16:] = random(16).half()
    blocks = WIDE // combine.BLOCK_N + 1  # the last one is ragged
    with only(combine, 5 * blocks - 1):
        combine.combine(y, torch.arange(17, dtype=torch.int32), None, out, 1)
    close(out[16, -16:], y[16, -16:])
    out[16, -16:] = 0
    members, offsets = torch.arange(17, dtype=torch.int32), torch.arange(18, dtype=torch.int32)
    with only(combine, 17 * blocks - 1):
        combine.add_segments(y, members, offsets, out)
    close(out[16, -16:], y[16, -16:])
