"""Expert FFN and CVMM out of the Triton kernels against float64, forward and all gradients, inside traps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import flat
import pytest
import torch
from net import (
    ROUTINGS,
    TOLERANCE,
    VOID,
    Case,
    check,
    check_frozen,
    check_void,
    cvmm_case,
    expert_case,
    fp32_first,
    random,
    tf32,
)
from nobody import check_nobody
from strange import assert_near, exact, numbers
from test_on_a_gpu import TOKENS
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn.backends.triton import bag, columns, config, grouped, hidden, launch, outer
from sparse_ffn.ops.activations import ACTIVATIONS
from sparse_ffn.ops.expert_ffn import triton as expert_ffn

routings = pytest.mark.parametrize("routing", ROUTINGS)
pytestmark = pytest.mark.usefixtures("small_blocks")


@fp32_first
@routings
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_expert_ffn(form: str, routing: str, dtype: torch.dtype, device: str) -> None:
    names = list(ACTIVATIONS)
    activation = names[list(ROUTINGS).index(routing) % len(names)]
    check(expert_case(routing, dtype, form=form, activation=activation), device)


@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_expert_ffn_with_every_activation(activation: str, form: str, device: str) -> None:
    check(expert_case("ragged", form=form, activation=activation, sizes=(16, 20, 16)), device)


@fp32_first
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_derivatives_are_right_everywhere(
    activation: str, dtype: torch.dtype, device: str
) -> None:
    z = numbers(dtype)
    if dtype == torch.bfloat16:  # hosts' products may take numbers below the normal ones as zero
        z = z[(z == 0) | ~(z.abs() < torch.finfo(dtype).tiny)]
    x = z.to(device).unsqueeze(1).requires_grad_()
    ones = torch.ones(3, 2, 1, dtype=dtype, device=device)  # two units: those of one are no product
    gate = x.new_ones(len(z), 1)
    with sf.backend("triton"):
        y = flat.expert_ffn(x, ones, ones, gate.long() - 1, gate, activation=activation)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    value, derivative = (2 * expected for expected in exact(activation, z))
    assert_near(activation, z, y.detach().cpu()[:, 0], value)
    assert_near(f"the derivative of {activation}", z, slope.cpu()[:, 0], derivative)


@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("sizes", [(0, 20, 33), (24, 0, 33), (24, 20, 0)])
def test_expert_ffn_of_no_size(sizes: tuple[int, int, int], form: str, device: str) -> None:
    """Nothing is left as it lay in memory: gates have gradients without a row of x, zeros without units."""
    check(expert_case("half of the slots void", form=form, sizes=sizes, activation="silu"), device)


@fp32_first
@routings
@pytest.mark.parametrize("form", ["plain", "biased"])
def test_experts_of_one_unit_are_rows_of_tables(
    form: str, routing: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = config.Bag(rows=4, columns=16, cap=4)  # several blocks of columns, and rows in several segments
    monkeypatch.setattr(bag, "BAG", small)
    monkeypatch.setattr(config, "BAG", small)
    case = expert_case(routing, dtype, form=form, activation="silu", sizes=(24, 1, 33))
    if form == "biased":  # as under autocast
        case = replace(case, wide=("keys", "values", "key_bias"))
    check(case, device)
    check(replace(case, trained=()), device)
    check_frozen(case, device, exact=False)  # dots are summed in another order
    if routing in VOID:
        check_void(case, device)
        check_nobody(case, device)


@pytest.mark.exhaustive
def test_frozen_matrices_get_no_gradients(device: str) -> None:
    check_frozen(expert_case("one token", form="everything", sizes=(16, 16, 16)), device)
    check_frozen(cvmm_case("one token", form="reduction", sizes=(16, 16)), device)


def test_without_any_expert_all_slots_are_void(device: str) -> None:
    tensors = {"x": torch.randn(10, 4), "keys": torch.randn(0, 3, 4), "values": torch.randn(0, 3, 5)}
    tensors |= {"index": torch.zeros(10, 2, dtype=torch.int64), "gate": torch.rand(10, 2)}
    tensors |= {"gate_keys": torch.randn(0, 3, 4), "key_bias": torch.randn(0, 3)}
    tensors = {n: t.to(device) for n, t in tensors.items()}
    trained = [t.requires_grad_() for n, t in tensors.items() if n != "index"]
    with sf.backend("triton"):
        with torch.no_grad():
            assert not flat.expert_ffn(**tensors).any()
        y = flat.expert_ffn(**tensors)
    assert not y.any()
    for t, grad in zip(trained, torch.autograd.grad(y.sum(), trained), strict=True):
        assert grad.shape == t.shape
        assert not grad.any()


@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (16, 16, 16), (32, 16, 48), (33, 17, 1), (1, 40, 17)])
def test_expert_ffn_of_any_size(sizes: tuple[int, int, int], form: str, device: str) -> None:
    check(expert_case(form=form, sizes=sizes, activation="silu"), device)


@fp32_first
@pytest.mark.parametrize("few", [True, False], ids=["decode", "sorted"])
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_inference(form: str, few: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_ffn, "use_decode", lambda n_slots, n_experts: few)
    monkeypatch.setattr(expert_ffn.decode, "BLOCK_D", 16)
    monkeypatch.setattr(expert_ffn.decode, "BLOCK_O", 16)
    for routing in ("one token", "no token", "an expert named twice"):
        check(expert_case(routing, dtype, form=form, activation="gelu", train=False), device)


def test_which_calls_are_decoded() -> None:
    assert expert_ffn.use_decode(16, 4)
    assert not expert_ffn.use_decode(17, 4)
    assert expert_ffn.use_decode(64, 64)
    assert not expert_ffn.use_decode(65, 64)


@fp32_first
@routings
@pytest.mark.parametrize("form", ["plain", "gather", "gather, scatter, reduction"])
def test_cvmm(form: str, routing: str, dtype: torch.dtype, device: str) -> None:
    check(cvmm_case(routing, dtype, form=form), device)


@pytest.mark.parametrize(
    "form", ["scatter", "reduction", "gather, reduction", "transposed", "gather, reduction, transposed"]
)
def test_cvmm_with_some_of_its_indices(form: str, device: str) -> None:
    check(cvmm_case("ragged", form=form), device)


@pytest.mark.parametrize("sizes", [(1, 1), (16, 16), (33, 17), (48, 1)])
def test_cvmm_of_any_size(sizes: tuple[int, int], device: str) -> None:
    check(cvmm_case(form="gather, scatter, reduction", sizes=sizes), device)


def test_strided_arguments_and_the_gradient_of_a_sum(device: str) -> None:
    case = expert_case("ragged", form="everything", activation="gelu_tanh")
    across: dict[str, Tensor] = {}
    for name, t in case.tensors.items():
        if name in ("keys", "values", "gate_keys"):
            across[name] = t.transpose(1, 2).contiguous().transpose(1, 2)
        elif t.is_floating_point():
            padded = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
            across[name] = padded[..., : t.shape[-1]].copy_(t) if name == "x" else padded[..., ::2].copy_(t)
        else:
            across[name] = t.t().contiguous().t()
    check(Case(case.op, across, case.dtype, case.options, case.trained, sum_gradient=True), device)

    case = cvmm_case("ragged", form="gather, reduction")
    case.tensors["weight"] = random(4, 33, 24).transpose(1, 2)
    case.tensors["x"] = random(24, 4).t()  # no unit stride anywhere: copied
    case.sum_gradient = True
    check(case, device)


def test_experts_that_share_a_matrix(device: str) -> None:
    case = cvmm_case("random")
    case.tensors["weight"] = case.tensors["weight"][:1].expand(5, -1, -1)
    case.trained = ("x",)
    check(case, device)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("routing", ["ragged", "all on one expert", "no token"])
def test_weight_gradients_in_parts(
    routing: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer, "n_parts", lambda *sizes: 3)
    check(expert_case(routing, dtype, form="everything", activation="gelu"), device)
    check(cvmm_case(routing, dtype, form="gather, reduction"), device)


@pytest.mark.parametrize("allowed", [True, False])
def test_torchs_switch_says_how_products_round(allowed: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tf32 does is seen on a GPU only: test_on_a_gpu."""
    seen: set[str] = set()
    for module in (grouped, hidden, outer):
        run = module.launch

        def spy(kernel: Any, grid: int, *arguments: Any, run: Any = run, **meta: Any) -> None:
            seen.add(meta["PRECISION"])
            run(kernel, grid, *arguments, **meta)

        monkeypatch.setattr(module, "launch", spy)
    monkeypatch.setitem(TOLERANCE, torch.float32, 5e-3)
    with tf32(allowed):
        check(expert_case(activation="identity"), device)
        check(cvmm_case(), device)
    assert seen == {"tf32" if allowed else "ieee"}


def test_tf32_is_for_cards_whose_products_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton refuses it on all of AMD's but one."""
    cards = {"gfx942:sramecc+:xnack-": True, "gfx90a": False, "gfx1100": False}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for card, has in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, name=card: SimpleNamespace(gcnArchName=name))
        assert launch._has_tf32.__wrapped__(torch.device("cuda", 0)) is has


def test_narrow_loads_take_smaller_tiles() -> None:
    """Off the grid of 16 addresses fill the registers, whatever is off it: a size, a stride or the begin."""
    x, w = torch.empty(4, 48, dtype=torch.bfloat16), torch.empty(3, 32, 48, dtype=torch.bfloat16)
    for operands in ((x, w), (x[:, 8:40], w.mT), (x[:1], None), (x[:, :32], w[..., :16])):
        assert config.arithmetic(x.dtype, "ieee", *operands) == "half"
    strided = torch.empty(4, 33, dtype=torch.bfloat16)[:, :32]
    for operands in ((x[:, :40], w), (strided, w), (x[:, 1:33], w), (x, w[:, :8]), (w.mT[:, :24],), (x, strided.T)):
        assert config.arithmetic(x.dtype, "ieee", *operands) == "odd"
        assert config.arithmetic(torch.float32, "tf32", *(t.float() for t in (x, w))) == "tf32"
    assert config.arithmetic(torch.float32, "ieee", strided) == "fp32"


def test_the_tokens_of_test_on_a_gpu_reach_every_height() -> None:
    for kind, heights in (("half", {16, 32, 64, 128}), ("fp32", {16, 32})):
        with config.fixed(architecture="sm_90"):
            found = {config.block_m(torch.device("cpu"), kind, tokens * 3 / 5) for tokens in TOKENS}
        assert found == heights


def test_parts_only_where_they_fill_the_device() -> None:
    cpu = torch.device("cpu")  # counts as an A100's 108 processors
    assert outer.n_parts(cpu, 512, 1 << 20) == 1
    assert outer.n_parts(cpu, 20, 1 << 20) == 10
    assert outer.n_parts(cpu, 1, 1 << 20) == outer.MAX_PARTS
    assert outer.n_parts(cpu, 1, 600) == 2
    assert outer.n_parts(cpu, 1, 0) == 1


@pytest.mark.exhaustive
def test_blocks_of_columns_change_no_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is summed over a token's slots is computed some columns at a time, down to those of one tile."""
    cases = (
        expert_case("an expert named twice", torch.bfloat16, form="everything", activation="gelu", sizes=(40, 20, 50)),
        cvmm_case("an expert named twice", torch.bfloat16, form="gather, scatter, reduction", sizes=(40, 50)),
    )
    for case in cases:
        found = []
        for max_bytes in (1, 36 * 32 * 2, 1 << 20):  # blocks of 16, 32 and all columns of 36 slots
            monkeypatch.setattr(columns, "MAX_BYTES", max_bytes)
            found.append(check(case, device))
        for other in found[1:]:
            assert all(torch.equal(found[0][n], other[n]) for n in other)


H100, A100, B200, MI300X = 50 << 20, 40 << 20, 126 << 20, 4 << 20  # second-level caches


@pytest.mark.parametrize(
    ("cache", "n_rows", "depth", "widths"),
    [
        (H100, 1 << 17, 128, [128] * 8),  # 32 MiB a block, and an eighth of the rows' columns are read seven times more
        (H100, 1 << 17, 256, [1024]),  # deep rows: never
        (B200, 1 << 15, 256, [1024]),
        (A100, 1 << 17, 128, [1024]),  # no block of a tile's width fits
        (B200, 1 << 17, 128, [256] * 4),
        (B200, 1 << 17, 255, [256] * 4),
        (H100, 25_000, 128, [512, 512]),  # 640 would fit
        (H100, 1 << 16, 200, [256] * 4),
        (H100, 100_000, 160, [1024]),  # seven times 160 are more than 1024
        (H100, 1 << 10, 128, [1024]),  # all of it fits
        (MI300X, 1 << 17, 64, [1024]),
        (H100, 1 << 19, 256, [512, 512]),  # 512 MiB are the most that a buffer takes
    ],
)
def test_columns_come_in_blocks_where_the_cache_then_holds_them(
    cache: int, n_rows: int, depth: int, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the small blocks of these tests
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    width = columns.fitting(cache, 2, n_rows, 1024, depth, 128)
    found = list(columns.blocks(like, n_rows, 1024, width))
    assert [y.shape for _, y in found] == [(n_rows, w) for w in widths]
    assert [part.start for part, _ in found] == [sum(widths[:i]) for i in range(len(widths))]


def test_the_cache_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    properties = SimpleNamespace(L2_cache_size=H100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or properties)
    card = torch.device("cuda", 77)
    assert [columns.cache_bytes(card) for _ in range(3)] == [H100] * 3
    assert asked == [card]
    assert columns.cache_bytes(torch.device("cpu")) == A100  # the interpreter's and the compile gate's


def test_experts_without_tokens_get_exactly_zero(device: str) -> None:
    actual = check(expert_case("empty experts first", form="everything", activation="silu"), device)
    for name in ("dkeys", "dvalues", "dgate_keys", "dkey_bias"):
        assert (actual[name][:3] == 0).all()
        assert (actual[name][3:] != 0).any()
    assert (check(cvmm_case("empty experts first"), device)["dweight"][:3] == 0).all()


def test_two_runs_are_bit_equal(device: str) -> None:
    case = expert_case("random", torch.bfloat16, form="everything", activation="gelu")
    first, second = check(case, device), check(case, device)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    "layer",
    [
        lambda **o: sf.SigmaMoE(16, 5, 20, 2, glu=True, bias=True, dropout=0.1, activation="gelu", **o),
        lambda **o: sf.ProductKeyMemory(16, 6, 4, **o),
        lambda **o: sf.TopKFFN(16, 40, 5, **o),
    ],
    ids=["moe", "pkm", "topk"],
)
def test_every_layer_trains(layer: Callable[..., torch.nn.Module], device: str) -> None:
    """Also with a batch dimension, under autocast, and with no token."""
    module = layer(device=device)
    for shape in ((2, 7, 16), (0, 16)):
        with sf.backend("triton"), torch.autocast(device, torch.bfloat16):
            y = module(torch.randn(shape, device=device))
        assert y.dtype == torch.bfloat16
        (y.float().square().sum() + sf.aux_loss(module)).backward()
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("routing", VOID)
def test_what_belongs_to_void_slots_is_not_read(routing: str, train: bool, device: str, small_blocks: None) -> None:
    check_void(expert_case(routing, form="everything", train=train), device)
    check_void(cvmm_case(routing, form="reduction", train=train), device)


@pytest.mark.parametrize("way", ["sorted", "sorted by torch"])
@pytest.mark.parametrize("routing", VOID)
def test_slots_of_nobody_are_void(
    routing: str, way: str, device: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "sorted by torch":
        monkeypatch.setattr(expert_ffn.routing, "SORT", config.Sort(experts=1))
    check_nobody(expert_case(routing, form="everything"), device)
    check_nobody(cvmm_case(routing, form="gather, scatter, reduction"), device)
