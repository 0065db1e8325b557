"""Features of torch that meet in one training step: compilers, checkpoints, sharded parts, meta, copies."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sparse_ffn as sf
from sparse_ffn.layers import LatentMoE, MixedMoE, SharedExpertMoE, SwitchHeadAttention

D = 16
BALANCES = ("entropy", "switch", "z", "bias")


def step(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, balance loss and gradients."""
    layer.zero_grad()
    y = call(x)
    loss = torch.as_tensor(sf.aux_loss(layer))
    (y.square().sum() + loss).backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "loss": loss.detach(), **gradients}


SWITCH = "skip_fwd_side_effects_in_bwd_under_checkpoint"


@pytest.mark.skipif(not hasattr(torch._dynamo.config, SWITCH), reason="this torch lacks the switch")
@pytest.mark.parametrize("balance", BALANCES)
def test_a_compiled_model_may_checkpoint_inside(balance: str) -> None:
    torch._dynamo.reset()
    layer, x = sf.SigmaMoE(D, 4, 8, 2, balance=balance, balance_weight=0.1), torch.randn(3, 5, D)
    compiled = torch.compile(checkpoint_wrapper(copy.deepcopy(layer)), backend="aot_eager", fullgraph=True)
    wanted = step(layer, layer, x)
    load = layer.router.load.clone()
    with torch._dynamo.config.patch(SWITCH, True):
        found = step(compiled, compiled, x)
    found = {name.replace("_orig_mod._checkpoint_wrapped_module.", ""): t for name, t in found.items()}
    torch.testing.assert_close(found, wanted)
    assert torch.equal(next(m for m in compiled.modules() if isinstance(m, sf.MoE)).router.load, load)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_a_compiler_need_not_know_how_many_tokens_a_mask_leaves(backend: str, train: bool) -> None:
    torch._dynamo.reset()
    layer, x = sf.SigmaMoE(D, 4, 8, 2, balance_weight=0.1).train(train), torch.randn(30, D)

    def real(kept: Tensor) -> Tensor:
        return layer(x[kept])

    compiled = torch.compile(real, backend="aot_eager", fullgraph=True)
    with sf.backend(backend), torch._dynamo.config.patch("capture_dynamic_output_shape_ops", True):
        for kept in (torch.arange(30) % 2 == 0, torch.zeros(30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)):
            torch.testing.assert_close(step(layer, compiled, kept), step(layer, real, kept))


@pytest.mark.parametrize("null_experts", [0, 1])
def test_experts_of_unequal_size_compile_in_one_graph(null_experts: int) -> None:
    torch._dynamo.reset()
    layer, x = MixedMoE(D, [(2, 8), (2, 4)], 2, null_experts=null_experts), torch.randn(3, 5, D)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(layer, compiled, x), step(layer, layer, x))


def test_without_the_core_a_model_compiles_at_its_first_call() -> None:
    code = """
import torch, sparse_ffn as sf
torch.compile(sf.SigmaMoE(16, 4, 8, 2), backend="aot_eager", fullgraph=True)(torch.randn(5, 16)).sum().backward()
"""
    environment = {"SPARSE_FFN_LIBRARY": "/nowhere/lib.so", "PATH": "", "HOME": str(Path.home())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[str, ...], ...]]] = {
    "shared": (
        lambda: SharedExpertMoE(sf.SigmaMoE(D, 4, 8, 2), sf.DenseFFN(D, 8), gated=True),
        (("routed",), ("shared",), ("routed", "shared", "gate"), ("routed.router",)),
    ),
    "latent": (lambda: LatentMoE(D, 8, 4, 8, 2), (("moe",), ("down", "up"), ("moe.router",))),
    "shared latent": (
        lambda: SharedExpertMoE(LatentMoE(D, 8, 4, 8, 2), sf.DenseFFN(D, 8)),
        (("routed",), ("routed.moe",)),
    ),
    "attention": (lambda: SwitchHeadAttention(D, 2, 4, 2), (("values",), ("outputs",), ("query",))),
    "mixed": (lambda: MixedMoE(D, [(2, 8), (2, 4)], 2), (("banks.0", "banks.1"), ("router",))),
}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """One process that is a mesh."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_a_layer_are_sharded_apart(kind: str, dtype: torch.dtype, alone: None) -> None:
    """A part's weights are whole, and of the policy's dtype, from its call on: what calls it must not judge them."""
    make, choices = PARTS[kind]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    x = torch.randn(3, 5, D)
    for parts in choices:
        model = nn.Sequential(nn.Linear(D, D), make())
        wanted = step(model, copy.deepcopy(model), x)["y"]
        for part in parts:
            fully_shard(model[1].get_submodule(part), mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        y = model(x)
        (y.float().square().sum() + sf.aux_loss(model)).backward()
        assert all(p.grad is not None for p in model.parameters())
        if dtype == torch.float32:
            torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("balance", ["bias", "l1"])
def test_a_forward_on_meta_counts_no_loads(balance: str) -> None:
    def make() -> sf.MoE:
        return sf.MoE(D, 4, 8, 2, router="relu" if balance == "l1" else "sigmoid", balance=balance)

    with torch.device("meta"):
        layer = make()
    layer(torch.empty(6, D, device="meta"))
    layer.to_empty(device="cpu")
    layer.load_state_dict(make().state_dict())
    layer(torch.randn(6, D))
    assert layer.router.load.any()
    sf.update_router_bias(layer)


def test_assigned_buffers_stay_wide() -> None:
    """Steps of 1e-3 vanish in 16 bits."""
    layer = sf.SigmaMoE(D, 4, 8, 2, balance="bias")
    layer.load_state_dict({name: t.bfloat16() for name, t in layer.state_dict().items()}, assign=True)
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.router.bias.dtype == torch.float32


def test_a_copy_of_a_metered_model_is_not_metered() -> None:
    model, x = nn.Sequential(sf.SigmaMoE(D, 4, 8, 2)), torch.randn(5, D)
    with sf.RoutingMeter(model) as meter:
        averaged = copy.deepcopy(model)
        averaged(x)
        assert meter.stats() == {}
        model(x)
    assert meter.stats().keys() == {"0"}


@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_normalised_table_has_a_group_of_its_own(normalise: Callable[..., nn.Module]) -> None:
    memory = normalise(sf.ProductKeyMemory(D, 8, 8), "values")
    groups = memory.param_groups(1e-2)
    torch.optim.AdamW(groups, lr=1e-3)
    assert [len(group["params"]) for group in groups] == [2, 1]


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    "layer",
    [
        sf.SigmaMoE(D, 5, 4, 2, balance="bias"),
        MixedMoE(D, [(3, 4), (2, 8)], 2),
        LatentMoE(D, 4, 5, 4, 2),
        SwitchHeadAttention(D, 2, 3, d_head=4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_copy_of_a_compiled_layer_computes_with_its_own_weights(layer: nn.Module, copied: Any) -> None:
    """Module leaves what ``compile`` made behind; a copy that kept it would run, and train, the original."""

    def never(*given: Any) -> Any:
        raise AssertionError("the original was compiled")

    layer, x = copy.deepcopy(layer).eval(), torch.randn(2, 3, D)
    expected = layer(x)
    for module in layer.modules():
        module.compile(backend=never)
    twin = copied(layer)
    assert torch.equal(twin(x), expected)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not twin(x).any()


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_balanced_by_sequences_is_exported_for_any_number_of_them(masked: bool) -> None:
    layer = sf.SigmaMoE(D, 5, 4, 2, balance_over="sequence").eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    given = {"mask": torch.ones(4, 6, dtype=torch.bool)} if masked else {}
    shapes = {name: {0: batch, 1: length} for name in ("x", *given)}
    program = torch.export.export(layer, (torch.randn(4, 6, D),), given, dynamic_shapes=shapes)
    for size in ((4, 6), (3, 5)):
        x, some = torch.randn(*size, D), {name: mask.new_ones(size) for name, mask in given.items()}
        torch.testing.assert_close(program.module()(x, **some), layer(x, **some))
