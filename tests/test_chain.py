"""RouterChain: a router's state that a GRU carries through the layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import sparse_ffn as sf
from benchmarks import bench_chain
from examples.language_model.configs import DEMO
from sparse_ffn.routing import RouterChain

D, P, N = 8, 5, 3


def chain(dtype: torch.dtype = torch.float64) -> RouterChain:
    torch.manual_seed(0)
    return RouterChain(D, P, N, dtype=torch.float64).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_it_is_torchs_cell_over_projections() -> None:
    c, xs = chain(), [normal(2, 7, D, seed=i).requires_grad_() for i in range(N)]
    state, expected = None, torch.zeros(14, P, dtype=torch.float64)
    for i, x in enumerate(xs):
        state = c(x, state, i)
        expected = c.gru(x.reshape(14, D) @ c.projections[i].weight.T, expected)
        torch.testing.assert_close(state, expected.view(2, 7, P))
    leaves, weight = [*xs, *c.parameters()], normal(2, 7, P, seed=9)
    actual = torch.autograd.grad((state * weight).sum(), leaves)  # through all the layers before
    wanted = torch.autograd.grad((expected.view(2, 7, P) * weight).sum(), leaves)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0
    assert {n: list(p.shape) for n, p in c.named_parameters()} == {
        **{f"projections.{i}.weight": [P, D] for i in range(N)},
        **{"gru.weight_ih": [3 * P, P], "gru.weight_hh": [3 * P, P], "gru.bias_ih": [3 * P], "gru.bias_hh": [3 * P]},
    }
    assert repr(c).startswith("RouterChain(\n  8, d_state=5, n_layers=3\n")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_state_is_fp32_under_autocast_too(dtype: torch.dtype) -> None:
    c, x = chain(dtype), normal(6, D, dtype=dtype)
    wide = chain(dtype).float()
    expected = wide(x.float(), wide(x.float(), None, 0), 1)
    with torch.autocast("cpu", torch.bfloat16):
        state = c(x, c(x, None, 0), 1)
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, expected)


def test_one_token_or_none_is_as_many() -> None:
    c, x = chain(), normal(3, D)
    state = c(x, None, 0)
    torch.testing.assert_close(c(x[1], state[1], 1), c(x, state, 1)[1])
    assert c(x[:0], None, 0).shape == (0, P)
    assert c(x[:0].view(0, 2, D), None, 0).shape == (0, 2, P)


@pytest.mark.exhaustive
def test_it_compiles_as_one_graph() -> None:
    c, x = chain(), normal(3, D)
    state = c(x, None, 0)
    compiled = torch.compile(c, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, state, 2), c(x, state, 2))


class Model(nn.Module):
    def __init__(self, kept: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chain, self.kept = RouterChain(D, P, N, dtype=dtype), kept
        self.layers = nn.ModuleList(sf.SigmaMoE(D, 6, 4, 2, d_router=P, dtype=dtype) for _ in range(N))

    def block(self, x: Tensor, state: Tensor | None, i: int) -> tuple[Tensor, Tensor]:
        state = self.chain(x, state, i)
        return x + self.layers[i](x, router_input=state), state

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for i in range(N):
            x, state = (
                self.block(x, state, i) if self.kept else checkpoint(self.block, x, state, i, use_reentrant=False)
            )
        return x


def test_a_model_of_layers_with_one_chain_trains_and_may_be_checkpointed() -> None:
    x, found = normal(3, 7, D, dtype=torch.float32), []
    for kept in (True, False):
        model = Model(kept)
        y = model(x)
        (y.square().sum() + sf.aux_loss(model)).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    model = Model(True, torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_parts_that_are_more_than_their_weights_compute() -> None:
    made, x = chain(torch.float32), normal(3, D, dtype=torch.float32)
    before = made(x, None, 0)
    called: list[nn.Module] = []
    for part in (made.projections[0], made.gru):
        part.register_forward_hook(lambda module, *_: called.append(module))
    torch.testing.assert_close(made(x, None, 0), before)
    assert called == [made.projections[0], made.gru]
    prune.random_unstructured(made.projections[0], "weight", 0.5)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(2):  # the mask is applied anew in each
        optimizer.zero_grad()
        made(x, None, 0).square().sum().backward()
        optimizer.step()
    assert not (made.projections[0].weight * (1 - made.projections[0].weight_mask)).any()
    peft = pytest.importorskip("peft")
    lora = chain(torch.float32)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["projections.0"], init_lora_weights=False), lora)
    assert not torch.equal(lora(x, None, 0), before)


def test_a_wrong_layer_or_state_is_named() -> None:
    c, x = chain(), normal(2, 4, D)
    with pytest.raises(IndexError, match=r"layer must be in \[0, n_layers = 3\), got 3"):
        c(x, None, 3)
    with pytest.raises(ValueError, match="layer must be at least 0, got -1"):
        c(x, None, -1)
    for wrong in (normal(2, 4, D), normal(2, 3, P), normal(8, P)):
        with pytest.raises(ValueError, match=r"state must have shape \[2, 4, 5\], d_state last, got \["):
            c(x, wrong, 0)
    with pytest.raises(ValueError, match=r"x must have shape \[..., d_model = 8\], got \[2, 4, 5\]"):
        c(normal(2, 4, P), None, 0)


def test_its_benchmark_compares_models_that_both_train() -> None:
    small = replace(DEMO, d_model=16, n_layers=2, n_heads=1, d_head=16, d_ff=32, expert_size=4, context=8, batch_size=2)
    assert bench_chain.ratio(4, small, 0.05).median > 0
