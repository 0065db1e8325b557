"""A test of the net itself: faults planted in the kernels' source, each of which it must catch."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_bag
import test_codes
import test_kernels
import test_large
import test_product_keys
import test_topk
import torch
from net import check, cvmm_case, expert_case, guard_pages, guarded, traps
from nobody import check_nobody

from sparse_ffn.backends.triton import (
    activations,
    bag,
    codes,
    columns,
    combine,
    config,
    decode,
    grouped,
    hidden,
    operands,
    outer,
    product_keys,
    routing,
    schedule,
    topk,
)

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a fault may corrupt the GPU's memory"),
]


def everything() -> None:
    check(expert_case("ragged", form="everything", activation="gelu"))


def plain() -> None:
    check(expert_case("ragged"))
    check(cvmm_case("random", form="gather, scatter, reduction"))


def anywhere() -> None:
    test_kernels.test_activations_and_their_derivatives_are_right_everywhere("silu", torch.float32, "cpu")


def sort() -> None:
    index = torch.randint(0, 5, (200,))
    with traps():
        plan = routing.sort_slots(guarded(index), 5, 1, 16, inverse=False)
    assert torch.equal(plan.order.long(), index.sort(stable=True).indices)


def void() -> None:
    check(expert_case("half of the slots void"))


def void_rows() -> None:
    check(cvmm_case("half of the slots void"))


def nobody() -> None:
    check_nobody(expert_case("half of the slots void"))


def void_decoded() -> None:
    check(expert_case("one token, void slots", form="everything", train=False))


def decoded() -> None:
    check(expert_case("one token", form="everything", train=False))


def far() -> None:
    test_large.test_rows_and_experts_far_apart()


def one_sum() -> None:
    check(expert_case())


def in_parts() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outer, "n_parts", lambda *sizes: 3)
        check(expert_case("all on one expert"))


def bags() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "BAG", config.Bag(cap=8))  # some rows in several segments
        check(test_bag.bag_case("random"))
        check(test_bag.bag_case("one hot row"))


def far_bags() -> None:
    test_bag.test_offsets_past_two_billion()


def wide_sums() -> None:
    check(expert_case("ragged", sizes=(33, 20, 40)))


def gradient_of_pairs() -> None:
    test_product_keys.test_gradients_are_exact_and_in_order(40, torch.float32, "cpu")


def fenced() -> None:
    with guard_pages("after"):
        check(expert_case("ragged", sizes=(16, 20, 16)))
        check(test_bag.bag_case("random"))


def pairs() -> None:
    test_product_keys.test_zeros_of_both_signs_are_equal_and_infinities_have_their_place("cpu")
    test_product_keys.test_ties_go_to_the_lower_position(3, torch.float32, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        test_product_keys.test_nan_ranks_first_and_infinity_next(24, 11, torch.float32, "cpu", patch)


def selections() -> None:
    check(test_topk.topk_case(form="everything"))
    test_topk.test_nan_ranks_first_and_infinity_next(torch.float32, "cpu")


def coded() -> None:
    case, rows = test_codes.coded_case("4 bits", False, torch.float32, "one token, void slots", "plain")
    test_codes.check_codes(case, rows, False, "cpu")


FAULTS: dict[str, tuple[ModuleType, str, str, Callable[[], Any]]] = {
    # the nine classes of faults that any grouped product can have
    "row mask one too far": (schedule, "p < tl.load(offsets", "p <= tl.load(offsets", plain),
    "no mask on the tail of K": (operands, "(k < K)", "(k < K + start)", plain),
    "no mask on stored columns": (
        grouped, "mask = ok[:, None] & n_ok[None, :]", "mask = ok[:, None] & (n >= 0)[None, :]", plain,
    ),
    "rows addressed in 32 bits": (
        operands, "row.to(tl.int64)[:, None] * stride", "row[:, None] * stride", far,
    ),
    "swapped strides": (hidden, "stride_ke, stride_kd, stride_kg,\n", "stride_ke, stride_kg, stride_kd,\n", plain),
    "last block of K dropped": (grouped, "in range(0, K, BLOCK_K)", "in range(0, K - 15, BLOCK_K)", plain),
    "masked load without other": (
        operands, "mask=ok[:, None] & (k < K)[None, :], other=0.0)", "mask=ok[:, None] & (k < K)[None, :])", plain,
    ),
    "expert 0 skipped": (routing, "busy = tile < carry", "busy = (tile < carry) & (expert > 0)", plain),
    "another program's output read": (
        routing, "tl.gather(end - total, tl.where(known, expert, 0), 0)",
        "tl.load(offsets + expert, mask=known, other=0)", sort,
    ),
    # and some of our own
    "experts addressed in 32 bits": (
        operands, "expert.to(tl.int64) * stride_e", "expert * stride_e", far,
    ),
    "sort not stable": (routing, "before[None, :] < slot[:, None]", "before[None, :] > slot[:, None]", sort),
    "blocks before not counted": (routing, "begin + earlier + rank", "begin + rank", sort),
    "tile's rows not from its expert's begin": (routing, "(tile - first) * BLOCK_M", "tile * BLOCK_M", plain),
    "idle tiles at work": (schedule, "return tl.load(tiles) *", "return (tl.load(tiles) + 1) *", plain),
    "a program's first block only": (schedule, "return tl.load(tiles) *", "return tl.num_programs(0) + 0 *", plain),
    "a group of tiles as high as any": (schedule, "tl.minimum(tl.load(tiles) - first_tile, GROUP)", "GROUP", wide_sums),
    "bias left out": (hidden, "        if BIAS:", "        if False:", everything),
    "halves of a GLU swapped": (hidden, "(dh * active).to(dup", "(dh * factor).to(dup", everything),
    "dropout left out of the gradient": (hidden, "        dh *= scale", "        dh *= 1", everything),
    "parts of the gate's gradient in one place": (
        hidden, "block.to(tl.int64) * S", "0", everything,
    ),
    "derivative at the wrong place": (hidden, "gradient(dh, pre, ACTIVATION)", "gradient(dh, dh, ACTIVATION)", plain),
    "infinity times zero": (activations, "return above(z) * tl.sigmoid(z)", "return z * tl.sigmoid(z)", anywhere),
    "infinity times zero in the gradient": (activations, "derivative(near(z), ", "derivative(z, ", anywhere),
    "gate left out of the sum": (combine, "        if WEIGHTED:", "        if False:", plain),
    "a token's sum cut short": (combine, "for j in range(0, K)", "for j in range(0, K - 1)", one_sum),
    "parts that overlap": (outer, "end = tl.minimum(end, begin + length)", "end = end", in_parts),
    "a part forgotten": (combine, "for _ in range(0, n_parts)", "for _ in range(1, n_parts)", in_parts),
    "tail of an expert's rows not masked": (outer, "ok = p < end", "ok = p >= 0", plain),
    "reduction left out of the weights' gradient": (outer, "        if SCALE:", "        if False:", plain),
    "decode reads the wrong token": (decode, "(slot // K).to(tl.int64)", "slot.to(tl.int64)", decoded),
    # void slots
    "void slots given to an expert": (routing, "(expert < E), expert, E)", "(expert < E), expert, 0)", void),
    "void slots of blocks before not counted": (
        routing, "mask=known, other=0), n_void)", "mask=known, other=0), 0)", void,
    ),
    "void slots forgotten in a token's sum": (combine, "live = (position >= 0) & (t < T)", "live = t < T", void),
    "void slots have a position": (routing, "tl.where(known, position, -1)", "position", void),
    "void slots have a position in the backward pass": (
        routing, "tl.where(position < tl.load(offsets + E), position, -1)", "position", void,
    ),
    "void slots have a gate's gradient": (
        combine, "total += tl.load(at, mask=live, other=0.0)", "total += tl.load(at)", void,
    ),
    "experts known by their lower 32 bits": (
        routing, "tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)", "expert.to(tl.int32)", nobody,
    ),
    "rows of void slots not cleared": (
        combine, "void = (p >= tl.load(offsets + E)) & (p < S)", "void = p < 0", void_rows,
    ),
    "void slots decoded": (decode, "G if known else 0", "G", void_decoded),
    # bags, product keys, top-k
    "a segment's slots not masked": (bag, "ok = p < end", "ok = p >= 0", bags),
    "segments that overlap": (bag, "begin = row_begin + nth * CAP", "begin = row_begin", bags),
    "parts of a row in one place": (bag, "(tl.load(row_part + r) + nth)", "tl.load(row_part + r)", bags),
    "rows of the table addressed in 32 bits": (
        bag, "row[:, None] * stride_values", "row.to(tl.int32)[:, None] * stride_values", far_bags,
    ),
    "rows of the gradient addressed in 32 bits": (
        bag, "(slot // K).to(tl.int64)[:, None]", "(slot // K)[:, None]", far_bags,
    ),
    "two zeros": (product_keys, "tl.where(score == 0, 0.0, score)", "score", pairs),
    "ties to the higher position": (
        product_keys, "pack(total, p)", "pack(total, p ^ (PAIRS - 1))", pairs,
    ),
    "halves swapped": (product_keys, "half == 0, pair // n", "half == 1, pair // n", gradient_of_pairs),
    "gradients of later pairs lost": (
        product_keys, "for other in range(0, k, BLOCK)", "for other in range(0, start + 1, BLOCK)", gradient_of_pairs,
    ),
    "NaNs ranked by their bits": (product_keys, "tl.where(score == score, bits, NAN)", "bits", pairs),
    "units that are NaN ranked by their bits": (
        topk, "tl.where(score == score, score.to(tl.int32, bitcast=True), NAN)", "score.to(tl.int32, bitcast=True)",
        selections,
    ),
    "all ties at the threshold taken": (topk, "(equal & (n_equal <= wanted))", "equal", selections),
    "dropout left out of the score": (topk, "    if SCALE:", "    if False:", selections),
    # rows of codes
    "zero points left out": (codes, "    if ZERO:\n        zero = ", "    if False:\n        zero = ", coded),
    "one scale for all groups": (codes, "(start // GROUP)[None, :]", "(start * 0)[None, :]", coded),
    "void slots of codes at work": (codes, "K if known else 0", "K", coded),
    # blocks of columns
    "every block of columns the first": (columns, "slice(begin, min(begin + width", "slice(0, min(width", wide_sums),
    # reads outside that change no result: only guard pages see them
    "columns read past the last row's end": (
        bag, "mask=ok[:, None] & (o < O)[None, :], other=0.0).to(tl.float32) * factor",
        "mask=ok[:, None], other=0.0).to(tl.float32) * factor", fenced,
    ),
    "units read past the last expert's end": (
        operands, "tl.load(at, mask=(n < N)[None, :], other=0.0)", "tl.load(at)", fenced,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault: str, tmp_path: Path) -> None:
    module, old, new, cases = FAULTS[fault]
    source = Path(str(module.__file__)).read_text()
    assert old in source, "the fault no longer fits the source"
    path = tmp_path / f"faulty_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    assert alarm(lambda: (swap(module, path), cases()))


@pytest.mark.parametrize("cases", {c: None for *_, c in FAULTS.values()}, ids=lambda c: c.__name__)
def test_there_is_no_alarm_without_a_fault(cases: Callable[[], Any]) -> None:
    assert not alarm(cases)


def alarm(cases: Callable[[], Any]) -> bool:
    """Whether the cases fail in a child process: by a wrong result, a dead canary, an overflow, or a crash."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            cases()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def swap(module: ModuleType, path: Path) -> None:
    """Load the file and put it in the module's place, wherever the library refers to it or to what is in it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = faulty
    spec.loader.exec_module(faulty)
    for name, value in vars(module).items():
        if name.isupper():
            setattr(faulty, name, value)  # the small blocks of this test
    users = [m for n, m in sys.modules.items() if n.startswith(("sparse_ffn.", "test_"))]
    for user in users:
        for name, value in list(vars(user).items()):
            if value is module:
                setattr(user, name, faulty)
                continue
            home = getattr(getattr(value, "fn", value), "__module__", None)  # a kernel's is that of its function
            if home == module.__name__ and user is not module and hasattr(faulty, name):
                setattr(user, name, getattr(faulty, name))
