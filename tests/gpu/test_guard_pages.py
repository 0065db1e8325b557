"""Every kernel with all its tensors at the edge of memory without access: nothing outside is read or written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pages
import pytest
import test_bag
import test_topk
import torch
from net import check, cvmm_case, expert_case, guard_pages, guarded, random, traps
from test_seeded_bugs import alarm

import sparse_ffn as sf
from sparse_ffn import ops
from sparse_ffn.backends.triton import outer
from sparse_ffn.ops.topk_ffn import triton as topk_ffn

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory has no such pages"),
]


def experts() -> None:
    check(expert_case("ragged", form="everything", activation="gelu", sizes=(24, 20, 33)))
    check(expert_case("random", torch.float16, sizes=(16, 16, 32)))
    check(expert_case("one token", form="everything", train=False))


def in_parts() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outer, "n_parts", lambda *sizes: 3)
        check(expert_case("all on one expert", form="everything", sizes=(17, 20, 16)))


def masters() -> None:
    check(replace(expert_case("ragged", torch.float16), wide=("keys", "values")))


def cvmm() -> None:
    check(cvmm_case("ragged", form="gather, scatter, reduction"))
    check(cvmm_case("random"))


def bags() -> None:
    check(test_bag.bag_case("random"))
    check(test_bag.bag_case("one hot row", width=17))


def selected() -> None:
    for sparse in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(topk_ffn, "use_gather", lambda *sizes, sparse=sparse: sparse)
            check(test_topk.topk_case(form="everything", norm_aware=True))


def product_keys() -> None:
    for shape, k in (((3, 2, 2, 21), 5), ((2, 1, 2, 7), 40)):
        check_scores(random(*shape).float(), k)


def check_scores(scores: torch.Tensor, k: int) -> None:
    def op(scores: torch.Tensor) -> torch.Tensor:
        best, _ = ops.product_key_topk(scores, k)
        return best

    with sf.backend("triton"), traps():
        leaf = guarded(scores).requires_grad_()
        best = op(leaf)
        torch.autograd.grad(best, leaf, guarded(torch.ones_like(best)))


CALLS = (experts, in_parts, masters, cvmm, bags, selected, product_keys)


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_nothing_outside_is_touched(call: Callable[[], Any], side: pages.Side) -> None:
    assert not alarm(lambda: fenced(call, side))


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_the_pages_are_a_trap(side: pages.Side, write: bool) -> None:
    def touch() -> None:
        with guard_pages(side):
            x = guarded(torch.ones(5))
        outside = x.as_strided((1,), (1,), x.storage_offset() + (-1 if side == "before" else 5))
        outside.fill_(1) if write else outside.sum()

    assert alarm(touch)


def fenced(call: Callable[[], Any], side: pages.Side) -> None:
    with guard_pages(side):
        call()
