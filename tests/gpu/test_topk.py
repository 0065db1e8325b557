"""Top-k FFN out of the Triton kernels: the reference's units exactly, results and gradients against float64."""

from __future__ import annotations

from typing import Any

import flat
import pytest
import test_large
import torch
from net import TOLERANCE, Case, check, check_frozen, fp32_first, guarded, random, traps
from strange import stable, strange
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_ffn.backends.triton import bag, config, topk
from sparse_ffn.ops import Units
from sparse_ffn.ops.activations import ACTIVATIONS, SMOOTH, hidden
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.ops.topk_ffn import triton as topk_ffn
from sparse_ffn.ops.topk_ffn.reference import rank

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
ways = pytest.mark.parametrize("sparse", [True, False], ids=["gathered", "dense"])


@pytest.fixture(autouse=True)
def small_bags(monkeypatch: pytest.MonkeyPatch) -> None:
    small = config.Bag(rows=8, columns=32, cap=8)
    monkeypatch.setattr(bag, "BAG", small)
    monkeypatch.setattr(topk, "CHOSEN", 16)
    monkeypatch.setattr(config, "BAG", small)


def choose(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_ffn, "use_gather", lambda *sizes: sparse)


def hidden_units(t: dict[str, Tensor], activation: str) -> Tensor:
    up = t["x"] @ t["keys"].t() + t.get("key_bias", 0)
    glu_gate = t["x"] @ t["gate_keys"].t() if "gate_keys" in t else None
    return hidden(activation, up, glu_gate, t.get("dropout_mask"))


def topk_case(
    sizes: tuple[int, int, int, int, int] = (5, 10, 37, 19, 6),
    dtype: torch.dtype = torch.float32,
    *,
    form: str = "plain",
    activation: str = "relu",
    norm_aware: bool = False,
    rank_by: str = "hidden",
) -> Case:
    """T, D, F, O, k = sizes. Small whole numbers: products are exact in every dtype, and ties are everywhere.

    What it meets is the float64 sum over the reference's units, so that all magnitudes are of the same units.
    """
    T, D, n_units, O, k = sizes

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape).double()

    t = {"x": whole(T, D), "keys": whole(n_units, D), "values": random(n_units, O)}
    if form == "everything":
        t |= {"gate_keys": whole(n_units, D), "key_bias": whole(n_units), "dropout_mask": 2 * whole(T, n_units).abs()}
    narrow_values = t["values"].to(dtype).double()
    ranked = hidden_units(t, activation)
    if rank_by == "gate":
        ranked = hidden(activation, t["x"] @ t["gate_keys"].t(), None, t.get("dropout_mask"))
    index = stable_topk(rank(ranked, narrow_values, norm_aware), k)
    selected = torch.zeros(T, n_units, dtype=torch.bool).scatter(1, index, True)

    def op(activation: str, **tensors: Tensor) -> Tensor:
        if tensors["x"].dtype != torch.float64:
            return flat.topk_ffn(k=k, activation=activation, norm_aware=norm_aware, rank_by=rank_by, **tensors)
        return torch.where(selected.to(tensors["x"].device), hidden_units(tensors, activation), 0) @ tensors["values"]

    return Case(op, t, dtype, {"activation": activation}, tuple(n for n in t if n != "dropout_mask"))


@ways
@fp32_first
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_topk_ffn(form: str, dtype: torch.dtype, sparse: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(sparse, monkeypatch)
    check(topk_case(dtype=dtype, form=form), device)
    check(topk_case(dtype=dtype, form=form, activation="squared_relu", norm_aware=True), device)
    if form == "everything":
        check(topk_case(dtype=dtype, form=form, rank_by="gate"), device)


@ways
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_frozen_units_get_no_gradients(form: str, sparse: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(sparse, monkeypatch)
    check_frozen(topk_case(form=form), device, exact=False)


@ways
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1), (0, 4, 5, 6, 2), (3, 8, 16, 16, 16), (2, 5, 33, 1, 33), (3, 5, 7, 4, 1)],
)
def test_any_size(
    sizes: tuple[int, int, int, int, int], sparse: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(sparse, monkeypatch)
    check(topk_case(sizes, form="everything"), device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(True, monkeypatch)
    check(topk_case(activation=activation), device)


def test_units_go_by_their_gate_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many some have a negative gate: the larger it is, the smaller is silu there, and its product is not."""
    choose(True, monkeypatch)
    check(topk_case((5, 10, 37, 19, 24), form="everything", activation="silu", rank_by="gate"), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_that_round_to_the_same_number_are_ties(dtype: torch.dtype, device: str) -> None:
    """A GLU's products are rounded before dropout's multiplier as torch rounds them: the lowest of equal units win."""
    up, glu_gate, scale = (torch.randn(9, 200, device=device).to(dtype) for _ in range(3))
    (h, of), (h_sorted, of_sorted) = (
        select(up, glu_gate, scale, None, 70, "relu", "hidden") for select in (topk_ffn._select, topk_ffn._sorted)
    )
    order = of_sorted.selected.long().argsort(1)
    assert torch.equal(of.selected, of_sorted.selected.gather(1, order))
    assert torch.equal(h, h_sorted.gather(1, order))


def test_strided_arguments_and_the_gradient_of_a_sum(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(True, monkeypatch)
    case = topk_case(form="everything")
    for name in ("x", "keys", "values", "gate_keys", "dropout_mask"):
        case.tensors[name] = case.tensors[name].t().contiguous().t()
    case.sum_gradient = True
    check(case, device)


@dtypes
@pytest.mark.parametrize("k", [1, 7, 300])
def test_selection_is_the_stable_topk(k: int, dtype: torch.dtype, device: str) -> None:
    """Ties of every kind: rounding of a dtype, zeros, equal numbers of both signs."""
    coarse = (torch.randn(2, 300, device=device) * 4).round() / 4
    for pre in (coarse.to(dtype), torch.randn(2, 300, device=device).to(dtype) * 1e-6):
        for norm in (None, torch.rand(300, device=device)):
            index, z = pre.new_empty(2, k, dtype=torch.int32), pre.new_empty(2, k)
            h = torch.empty_like(z)
            with traps():
                topk.select(guarded(pre), None, None, norm, index, z, None, h, "identity")
            score = pre.abs() if norm is None else pre.abs().float() * norm
            assert torch.equal(index.long(), stable_topk(score, k).sort().values)
            assert torch.equal(z, pre.gather(1, index.long()))
            assert torch.equal(h, z)


@dtypes
def test_nan_ranks_first_and_infinity_next(dtype: torch.dtype, device: str) -> None:
    pre = strange(8, 40, dtype).to(device)
    for k in (1, 5, 40):
        for norm in (None, torch.tensor([0.0, 1.0, 2.0], device=device).repeat(14)[:40]):
            index, z = pre.new_empty(8, k, dtype=torch.int32), pre.new_empty(8, k)
            h = torch.empty_like(z)
            with traps():
                topk.select(guarded(pre), None, None, norm, index, z, None, h, "identity")
            score = pre.abs().float() if norm is None else pre.abs().float() * norm
            assert torch.equal(index.long().cpu(), stable(score, k).sort().values)
            assert torch.equal(h.isnan(), pre.gather(1, index.long()).isnan())


def test_many_units_are_sorted_by_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert topk.fits(8192)
    assert not topk.fits(8193)
    monkeypatch.setattr(topk, "MAX_F", 36)
    for sparse in (True, False):
        choose(sparse, monkeypatch)
        check(topk_case(form="everything", norm_aware=True), device)
        check(topk_case(form="everything", norm_aware=True, rank_by="gate"), device)


@pytest.mark.parametrize("fits", [True, False], ids=["kernel", "torch"])
def test_at_minus_infinity_a_smooth_activation_and_its_derivative_are_zero(
    fits: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(False, monkeypatch)
    monkeypatch.setattr(topk, "MAX_F", 4 if fits else 3)
    x, ones = torch.ones(1, 1, device=device), torch.ones(4, 1, device=device)
    closed = torch.tensor([[1.0], [-torch.inf], [2.0], [3.0]], device=device)
    for name in SMOOTH:
        for units in (Units(closed, ones), Units(ones, ones, closed)):
            out, saved = topk_ffn.forward(x, units, 4, None, name, False, "hidden")
            _, grads = topk_ffn.backward(torch.ones_like(out), x, units, None, saved, True, name)
            assert out.isfinite().all()
            assert grads.keys[1] == grads.values[1] == 0
            assert grads.keys[[0, 2, 3]].all()


class Sizes(TorchDispatchMode):
    """The most numbers in a tensor that an op gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        found = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max(self.largest, *found, 0)
        return result


@pytest.mark.exhaustive
@ways
@pytest.mark.parametrize("fits", [True, False], ids=["kernel", "torch"])
def test_blocks_of_tokens_bound_the_temporaries(
    fits: bool, sparse: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has a number for every token and hidden unit, and the results are the same to rounding."""
    T, n_units, k, most = 50, 40, 4, 16 * 40
    choose(sparse, monkeypatch)
    monkeypatch.setattr(topk_ffn, "MIN_TOKENS", 1)
    monkeypatch.setattr(topk_ffn, "MAX_BYTES", most * (4 if fits else 8))
    monkeypatch.setattr(topk, "MAX_F", n_units if fits else n_units - 1)
    for dtype in (torch.float32, torch.bfloat16):
        check(topk_case((T, 5, n_units, 6, k), dtype, form="everything", norm_aware=True), device)
    case = topk_case((T, 5, n_units, 6, k), form="everything")
    t = {n: x.float().to(device) for n, x in case.tensors.items()}
    units = Units(t["keys"], t["values"], t["gate_keys"], t["key_bias"])
    monkeypatch.setattr(bag, "launch", lambda *a, **meta: None)  # what kernels allocate is seen, not what they do
    monkeypatch.setattr(topk, "launch", lambda kernel, grid, *a, **meta: [x.zero_() for x in a if is_index(x)])
    with Sizes() as sizes:
        _, saved = topk_ffn.forward(t["x"], units, k, None, "relu", True, "hidden")
        topk_ffn.backward(t["x"].new_ones(T, 6), t["x"], units, None, saved, True, "relu")
    assert sizes.largest <= most < T * n_units


def is_index(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.int32


def test_which_calls_gather() -> None:
    many, one = torch.empty(1 << 14, 1, dtype=torch.bfloat16), torch.empty(1, 1, dtype=torch.bfloat16)
    assert topk_ffn.use_gather(many, 4096, 37)
    assert not topk_ffn.use_gather(many, 4096, 38)
    assert topk_ffn.use_gather(one, 4096, 2048)
    assert topk_ffn.use_gather(many.float(), 4096, 128)  # without tf32


def test_two_runs_are_bit_equal(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(True, monkeypatch)
    case = topk_case(dtype=torch.bfloat16, form="everything")
    first, second = check(case, device), check(case, device)
    assert all(torch.equal(first[n], second[n]) for n in first)


@ways
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_it_never_waits_for_the_device(form: str, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(sparse, monkeypatch)
    launched: set[str] = set()

    def launch(kernel: Any, grid: int, *arguments: Any, **meta: Any) -> None:
        launched.add(kernel.fn.__name__)

    monkeypatch.setattr(bag, "launch", launch)
    monkeypatch.setattr(topk, "launch", launch)
    t = {n: x.float() for n, x in topk_case(form=form).tensors.items()}
    with FakeTensorMode() as mode:
        t = {n: mode.from_tensor(x) for n, x in t.items()}
        units = Units(t["keys"], t["values"], t.get("gate_keys"), t.get("key_bias"))
        out, saved = topk_ffn.forward(t["x"], units, 6, t.get("dropout_mask"), "relu", True, "hidden")
        dx, dunits = topk_ffn.backward(out, t["x"], units, t.get("dropout_mask"), saved, True, "relu")
    assert (dx.shape, dunits.keys.shape, dunits.values.shape) == (t["x"].shape, units.keys.shape, units.values.shape)
    gathered = {"bag_kernel", "bag_gradient_kernel", "hot_rows_kernel"}
    assert launched == {"select_kernel", "chosen_kernel"} | (gathered if sparse else set())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this memory would be real")
def test_rows_far_apart() -> None:
    pre = random(3, 20).half()
    index, z, h = torch.empty(3, 3, dtype=torch.int32), torch.empty(3, 3).half(), torch.empty(3, 3).half()
    far = test_large.spread(pre)
    topk.select(far, far, far, None, index, z, torch.empty_like(z), h, "identity")
    assert torch.equal(z, pre.gather(1, index.long()))
