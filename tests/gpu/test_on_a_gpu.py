"""What only a GPU can show: CUDA graphs, and production tiles on real sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from net import TOLERANCE, check, cvmm_case, expert_case, random, tf32
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sparse_ffn as sf
from sparse_ffn.ops.topk_ffn import torch as topk_ffn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


TOKENS = (1, 7, 40, 80, 300, 5000)  # of which each chooses 3 of 5 experts: tiles of 16 to 128 rows


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_real_tiles(tokens: int, dtype: torch.dtype) -> None:
    for sizes in ((256, 128, 256), (100, 60, 36)):
        for form in ("plain", "everything"):
            case = expert_case("random", dtype, form=form, activation="silu", sizes=sizes)
            index = torch.rand(tokens, 5).topk(3).indices
            case.tensors |= {"x": random(tokens, sizes[0]), "index": index, "gate": torch.rand(tokens, 3).double()}
            if form == "everything":
                case.tensors["dropout_mask"] = (torch.rand(tokens, 3, sizes[1]) > 0.3).double()
            check(case, "cuda")
            if dtype != torch.float32:
                check(replace(case, wide=("keys", "values")), "cuda")
    check(cvmm_case("ragged", dtype, form="gather, scatter, reduction", sizes=(256, 128)), "cuda")


@pytest.mark.parametrize("op", ["expert_ffn", "cvmm"])
def test_tf32_where_torch_allows_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an activation each number comes of two products at most, each of two rounded factors."""
    case = cvmm_case("ragged", form="gather, scatter, reduction", sizes=(256, 128))
    if op != "cvmm":
        case = expert_case("random", activation="identity", sizes=(256, 128, 256))
        index = torch.rand(300, 5).topk(3).indices
        case.tensors |= {"x": random(300, 256), "index": index, "gate": torch.rand(300, 3).double()}
    with tf32(False):
        plain = check(case, "cuda")
    with tf32(True), monkeypatch.context() as patch:
        patch.setitem(TOLERANCE, torch.float32, 5e-3)  # tf32 has 10 bits; they may be cut off
        rounded = check(case, "cuda")
    with tf32(False):
        again = check(case, "cuda")
    assert all((rounded[name] != plain[name]).any() for name in plain)  # the tensor cores' path was taken
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize(
    "make",
    [
        lambda: sf.SigmaMoE(64, 16, 32, 4, device="cuda"),
        lambda: sf.SoftmaxMoE(64, 4, 32, 2, glu=True, activation="silu", device="cuda"),
        lambda: sf.TopKFFN(64, 256, 16, device="cuda"),
        lambda: sf.ProductKeyMemory(64, 16, 8, n_heads=2, device="cuda"),
    ],
    ids=["moe", "glu", "topk", "pkm"],
)
def test_a_training_step_in_a_cuda_graph(make: Callable[[], sf.SparseFFN], tokens: int) -> None:
    layer = make()
    x = torch.randn(tokens, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and warms up
        for _ in range(3):
            layer(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.square().sum().backward()
    x.copy_(torch.randn_like(x))
    graph.replay()
    captured = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad(set_to_none=True)
    expected = layer(x)
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    for got, parameter in zip(captured, layer.parameters(), strict=True):
        assert torch.equal(got, parameter.grad)


@pytest.mark.parametrize("balance", ["bias", "l1"])
def test_the_replays_of_a_graph_count_the_loads(balance: str) -> None:
    layer = sf.MoE(64, 16, 32, 4, router="relu" if balance == "l1" else "sigmoid", balance=balance, device="cuda")
    x = torch.randn(512, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    once = layer.router.load.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x)
    sf.update_router_bias(layer)
    for _ in range(3):
        graph.replay()
    assert torch.equal(layer.router.load, 3 * once)


def test_a_graph_routes_anew_at_every_replay() -> None:
    """bf16, the width of a real layer: tokens that are all alike overload k experts, and others none at all."""
    layer = sf.SigmaMoE(1024, 64, 128, 8, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> Tensor:
        loss = layer(x).float().square().mean() + sf.aux_loss(layer)
        loss.backward()
        return loss.detach()

    def gradients() -> list[Tensor]:
        return [t.grad for t in (x, *layer.parameters()) if t.grad is not None]

    def forget() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    recorded = gradients()
    batches = [torch.randn_like(x), torch.randn_like(x[:1]).expand_as(x), torch.zeros_like(x), torch.randn_like(x)]
    for batch in batches:
        with torch.no_grad():
            x.copy_(batch)
        graph.replay()
        found = [loss.clone(), *(t.clone() for t in recorded)]
        forget()
        expected = [step(), *gradients()]
        assert all(map(torch.equal, found, expected))


def test_layer_compiles_whole() -> None:
    layer = sf.SigmaMoE(64, 16, 32, 4, device="cuda").eval()
    x = torch.randn(512, 64, device="cuda")
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="autograd's threads know the caller's context from torch 2.12 on"
)
def test_a_checkpoint_is_recomputed_on_the_backend_of_the_block_around_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Autograd does so in a thread of its own."""
    threads = []
    forward = topk_ffn.forward
    monkeypatch.setattr(topk_ffn, "forward", lambda *a: threads.append(threading.get_ident()) or forward(*a))
    layer, x = sf.TopKFFN(32, 64, 8, device="cuda"), torch.randn(20, 32, device="cuda", requires_grad=True)
    with sf.backend("torch"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(set(threads)) == 2
