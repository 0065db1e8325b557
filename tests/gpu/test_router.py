"""The router's kernels against the reference in float64: selection to the last tie, gates, sums, and all gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from net import TOLERANCE, guard_pages, guarded, moved, traps
from test_seeded_bugs import alarm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_ffn as sf
from benchmarks import launches
from benchmarks.shapes import MoEShape
from sparse_ffn import ops
from sparse_ffn.backends.triton import router
from sparse_ffn.ops.route import reference
from sparse_ffn.ops.route import triton as route
from sparse_ffn.ops.route.backend import Router
from sparse_ffn.ops.route.op import MAX_ROWS

D = 37
gates = pytest.mark.parametrize("gate_function", reference.GATES)
KINDS = {  # of tokens, of the router
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, fp32 router": (torch.bfloat16, torch.float32),
}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and columns take more than one of a program's blocks, the last ones ragged."""
    of = router.Blocks.of
    monkeypatch.setattr(router.Blocks, "of", lambda *args, **form: of(*args, **form)._replace(tokens=16, depth=16))
    monkeypatch.setattr(router, "COLUMNS", 16)


def made(tokens: int, rows: int, kind: str, *, everything: bool) -> dict[str, Tensor | None]:
    dtype, wide = KINDS[kind]
    return {
        "x": torch.randn(tokens, D).to(dtype),
        "router_weight": (torch.randn(rows, D) / 4).to(wide),
        "router_bias": torch.randn(rows) if everything else None,
        "mask": torch.rand(tokens) > 0.3 if everything else None,
    }


def results(op: Any, tensors: dict[str, Any], upstream: list[Tensor], *options: Any) -> dict[str, Tensor]:
    leaves = {n: tensors[n].detach().requires_grad_() for n in ("x", "router_weight")}
    index, gate, sums = op(*(tensors | leaves).values(), *options)
    arriving = [u.to(t.dtype) for u, t in zip(upstream, (gate, sums), strict=True)]
    dx, dweight = torch.autograd.grad((gate, sums), tuple(leaves.values()), arriving)
    return {"index": index, "gate": gate.detach(), "sums": sums.detach(), "dx": dx, "dweight": dweight}


def kernels(
    x: Tensor, router_weight: Tensor, router_bias: Any, mask: Any, k: int, gate_function: str, groups: int
) -> Any:
    return ops.route(
        x, router_weight, k=k, gate_function=gate_function, router_bias=router_bias, mask=mask, groups=groups
    )


def check(tensors: dict[str, Tensor | None], k: int, gate_function: str, groups: int, device: str) -> None:
    narrow = {n: None if t is None else moved(t, t.dtype, device) for n, t in tensors.items()}
    x, weight = narrow["x"], narrow["router_weight"]
    assert x is not None
    assert weight is not None
    wide = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in narrow.items()}
    shapes = ((x.shape[0], k), (groups, weight.shape[0]))
    upstream = [torch.linspace(-1, 1, a * b, device=device).double().view(a, b) for a, b in shapes]
    options = (k, gate_function, groups)
    expected = results(reference.route, wide, upstream, *options)
    strict = {n: None if t is None else guarded(t) if t.dtype != torch.bool else t for n, t in narrow.items()}
    with sf.backend("triton"), traps():
        actual = results(kernels, strict, [guarded(u.float()) for u in upstream], *options)
    assert torch.equal(actual.pop("index"), expected.pop("index"))
    for name, want in expected.items():
        # scores, gates and sums are of fp32 whatever the tokens are; gradients of x's dtype
        tolerance = 1e-5 if name in ("gate", "sums") else TOLERANCE[x.dtype]
        excess = (actual[name].double() - want).abs().max() / max(1.0, want.abs().max())
        assert excess <= tolerance, f"{name}: off by {excess}"
        assert actual[name].dtype == {"dx": x.dtype, "dweight": weight.dtype}.get(name, torch.float32)


@gates
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_it_meets_the_reference(gate_function: str, kind: str, everything: bool, device: str) -> None:
    check(made(42, 21, kind, everything=everything), 3, gate_function, 2 if everything else 1, device)


@pytest.mark.parametrize(("tokens", "rows", "k"), [(1, 3, 2), (7, 1, 1), (5, 5, 5), (33, 70, 20)])
def test_any_size(tokens: int, rows: int, k: int, device: str) -> None:
    for kind in KINDS:
        check(made(tokens, rows, kind, everything=True), k, "softmax", 1, device)


@gates
@pytest.mark.parametrize("kind", KINDS)
def test_scores_whose_exponential_is_none(gate_function: str, kind: str, device: str) -> None:
    tensors = made(12, 21, kind, everything=False)
    x, weight = tensors["x"], tensors["router_weight"]
    assert x is not None
    assert weight is not None
    x.zero_()[:, 0], weight[:, 0] = torch.tensor([1, -1]).repeat(6), torch.arange(-240, 264, 24)
    check(tensors, 3, gate_function, 1, device)


def test_strided_arguments(device: str) -> None:
    tensors = made(20, 9, "bf16", everything=True)
    x, weight = tensors["x"], tensors["router_weight"]
    assert x is not None
    assert weight is not None
    tensors["x"] = torch.zeros(20, 2 * D, dtype=x.dtype)[:, :D].copy_(x)
    tensors["router_weight"] = weight.t().contiguous().t()
    tensors["router_bias"] = torch.randn(9, 2)[:, 0]
    tensors["mask"] = torch.tensor([[True, False], [False, True]]).repeat(10, 1)[:, 0]
    check(tensors, 2, "sigmoid", 1, device)
    tensors["x"] = x.t().contiguous().t()
    tensors["mask"] = torch.tensor([True]).expand(20)
    check(tensors, 2, "sigmoid", 1, device)


def test_a_bias_that_is_a_column_ranks_in_inference(device: str) -> None:
    x, weight, bias = torch.zeros(1, D), torch.zeros(4, D), torch.tensor([[0, 9], [1, 9], [2, 9], [3, 9.0]])
    _, index = route.inference(x.to(device), Router(weight.to(device), bias.to(device)[:, 0], None), 2, "sigmoid", 0)
    assert index.tolist() == [[3, 2]]


@pytest.mark.exhaustive
def test_vmap_over_the_second_dimension_reads_each_members_mask(device: str) -> None:
    x, weight = torch.randn(6, 2, D, device=device), torch.randn(5, D, device=device)
    mask = torch.rand(6, 2, device=device) > 0.5

    def sums(x: Tensor, mask: Tensor) -> Tensor:
        return ops.route(x, weight, k=2, gate_function="sigmoid", mask=mask)[2]

    with sf.backend("triton"):
        found = torch.func.vmap(sums, in_dims=1)(x, mask)
        torch.testing.assert_close(found, torch.stack([sums(x[:, i], mask[:, i].clone()) for i in range(2)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [5, 24])
def test_ties_go_to_the_lower_row_and_nan_ranks_first(k: int, kind: str, device: str) -> None:
    rows, (dtype, wide) = 24, KINDS[kind]
    nan, inf = float("nan"), float("inf")
    for values in ((nan, inf, -inf, -0.0, 0.0), (-inf,), (nan, -nan), (-2.0, 1.0, 3.0), (3e38, inf, -3e38)):
        score = torch.tensor(values)[torch.randint(0, len(values), (rows,))].to(wide)
        weight, x = torch.zeros(rows, D, dtype=wide), torch.zeros(1, D, dtype=dtype)
        weight[:, 20], x[:, 20] = score, 1
        _, found = route.inference(x.to(device), Router(weight.to(device), None, None), k, "sigmoid", 0)
        assert torch.equal(found[0].cpu(), score.sort(descending=True, stable=True).indices[:k])


def test_a_token_that_is_no_number_shows_in_its_gates(device: str) -> None:
    x, weight = torch.randn(3, D), torch.randn(8, D)
    x[1] = float("nan")
    for gate_function in reference.GATES:
        gate, index = route.inference(x.to(device), Router(weight.to(device), None, None), 2, gate_function, 0)
        assert gate[1].isnan().all()
        assert gate[[0, 2]].isfinite().all()
        assert index[1].tolist() == [0, 1]


def test_fp32_weights_are_not_rounded_for_tokens_in_bf16(device: str) -> None:
    """Two rows differ by less than a sum of two numbers of bf16 can say."""
    x = torch.zeros(1, D, dtype=torch.bfloat16)
    x[0, 5] = 1
    weight = torch.full((2, D), 1 / 3)
    weight[1, 5] += 2.0**-22
    _, index = route.inference(x.to(device), Router(weight.to(device), None, None), 1, "sigmoid", 0)
    assert index.item() == 1


def test_the_gradient_of_an_fp32_router_is_not_rounded_to_the_tokens_dtype(device: str) -> None:
    dlogits, x = torch.randn(64, 5, device=device).bfloat16(), torch.randn(64, D, device=device).bfloat16()
    found = route._weight_gradient(dlogits, x, torch.float32)
    assert found.dtype == torch.float32
    if device != "cuda":  # torch has no such product on a CPU, where this only shows what is asked of a GPU
        with FakeTensorMode(), Names("aten") as called:
            two = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (dlogits, x)]
            assert route._weight_gradient(*two, torch.float32).dtype == torch.float32
        assert "mm.dtype" in called.names
        return
    torch.testing.assert_close(found.double(), dlogits.double().t() @ x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "router"), [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_the_gradient_of_a_16_bit_router_asks_torch_for_no_product_that_it_lacks(
    tokens: torch.dtype, router: torch.dtype
) -> None:
    """A product may give fp32 out of 16 bits, and nothing else than its operands' dtype beside that."""
    with FakeTensorMode(), Names("aten") as called:
        dlogits, x = (torch.empty(64, n, dtype=tokens, device="cuda") for n in (5, D))
        assert route._weight_gradient(dlogits, x, router).dtype == router
    assert "mm.dtype" not in called.names


LAYERS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax, switch and cv2": {"router": "softmax", "balance": ("switch", "cv2"), "balance_weight": (0.1, 0.1)},
    "softmax of the selected, over sequences": {"router": "softmax_topk", "balance_over": "sequence"},
    "unweighted, bias": {"router": "unweighted", "balance": "bias"},
    "sigmoid, inject": {"aux": "inject"},
    "null experts": {"router": "softmax", "null_experts": 2, "null_kind": "constant"},
}


def layer_results(layer: sf.MoE, x: Tensor, mask: Tensor) -> dict[str, Any]:
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    y = layer(leaf, mask=mask)
    (y.float().square().sum() + 100 * sf.aux_loss(layer)).backward()
    found = {"y": y.detach(), "aux_loss": sf.aux_loss(layer).detach(), "dx": leaf.grad}
    found |= {n: p.grad for n, p in layer.named_parameters()} | {"load": layer.router.load}
    with torch.no_grad():
        found["alone"] = layer.eval()(x)
    layer.train()
    return found


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_the_same_as_with_its_router_called(
    name: str, autocast: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sf.MoE, "_compute", sf.backend("torch")(sf.MoE._compute))  # the experts are not the question
    layer = sf.MoE(16, 6, 8, 2, **{"balance_weight": 0.1, **LAYERS[name]}, device=device)
    x, mask = torch.randn(2, 5, 16, device=device), torch.rand(2, 5, device=device) > 0.3
    called = copy.deepcopy(layer)
    called.router.register_forward_hook(lambda *args: None)  # a hooked router is called as a module
    with sf.backend("triton"), torch.autocast(device, torch.bfloat16, enabled=autocast):
        expected, actual = layer_results(called, x, mask), layer_results(layer, x, mask)
    for key, want in expected.items():
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(actual[key], want, **tolerance, msg=lambda m, n=key: f"{n}: {m}")


class Names(TorchDispatchMode):
    """Of our ops that run inside, or of another library's."""

    def __init__(self, namespace: str = "sparse_ffn") -> None:
        super().__init__()
        self.namespace, self.names = namespace, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            self.names.add(func.name().removeprefix(f"{self.namespace}::"))
        return func(*args, **kwargs or {})


def called_ops(layer: nn.Module, x: Tensor, **arguments: Any) -> set[str]:
    with Names() as mode:
        layer(x, **arguments)
    return mode.names


def test_which_routers_take_the_kernel(device: str) -> None:
    with FakeTensorMode(), torch.device(device), sf.backend("triton"):
        x, plain = torch.empty(3, 16), sf.SigmaMoE(16, 6, 8, 2)
        assert called_ops(plain, x) == {"route", "negative_entropy", "expert_ffn"}
        assert called_ops(plain, x, router_input=x.clone()) == {"route", "negative_entropy", "expert_ffn"}
        with torch.no_grad():
            assert called_ops(plain.eval(), x) == {"route_inference", "expert_ffn_inference"}
        for other in (
            sf.SigmaMoE(16, 6, 8, 2, expert_dropout=0.1),
            sf.SigmaMoE(16, 6, 8, 2, balance="z"),
            sf.NoisyTopKMoE(16, 6, 8, 2),
            sf.SigmaMoE(16, MAX_ROWS[torch.float32] + 1, 1, 2),
        ):
            assert called_ops(other, x) == {"expert_ffn"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on CPU tensors, which only the interpreter takes")
def test_what_a_step_launches() -> None:
    """At most four for the routing in each pass, the balance loss included; four for a layer of one token."""
    shape = MoEShape(64, 32, 16, 16, 2)
    forward, backward = launches.step(shape, fused=True)
    assert forward.routing.launches == ["route_kernel", "sum", "entropy_kernel"]
    assert backward.routing.launches == ["entropy_gradient_kernel", "route_gradient_kernel", "mm", "add"]
    (alone,) = launches.step(MoEShape(1, 32, 16, 16, 2), fused=True, train=False)
    assert alone.routing.launches == ["route_kernel"]
    assert alone.experts.launches == ["up_rows_kernel", "down_rows_kernel", "combine_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)])
def test_a_step_keeps_its_tokens_scores_and_slots(dtype: torch.dtype, device: str) -> None:
    """No copy of x, whatever its dtype: T·(R + K) numbers, and K indices of 64 bits."""
    tokens, rows, k = 50, 12, 3
    x = torch.randn(tokens, D, device=device).to(dtype).requires_grad_()
    weight = torch.randn(rows, D, device=device).requires_grad_()
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with sf.backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.route(x, weight, k=k, gate_function="softmax")
    others = [t for p, t in kept.items() if p not in (x.data_ptr(), weight.data_ptr())]
    assert sum(t.nbytes for t in others) <= tokens * (4 * rows + 4 * k + 8 * k)


@pytest.mark.exhaustive
def test_opcheck_holds(device: str) -> None:
    x, weight = (torch.randn(n, D, device=device, requires_grad=True) for n in (6, 5))
    bias, mask = torch.randn(5, device=device), torch.rand(6, device=device) > 0.5
    call = (x, weight, bias, mask, 2, "softmax_topk", 2, "triton")
    torch.library.opcheck(torch.ops.sparse_ffn.route.default, call)
    still = tuple(t.detach() if isinstance(t, Tensor) else t for t in call)
    torch.library.opcheck(torch.ops.sparse_ffn.route_inference.default, still)


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory has no such pages")
@pytest.mark.parametrize("side", ["before", "after"])
def test_nothing_outside_is_touched(side: Any) -> None:
    def fenced() -> None:
        with guard_pages(side):
            for kind in KINDS:
                check(made(21, 19, kind, everything=True), 3, "softmax", 1, "cpu")

    assert not alarm(fenced)
