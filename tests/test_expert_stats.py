"""expert_stats: every sum against a loop over tokens and experts in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import hidden_units
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.compress import ExpertStats, statistics

SUMS = ("count", "gate", "gate_square", "norm", "contribution", "energy", "moment")


def brute_force(layer: sf.MoE, x_TD: Tensor, forced: bool = False) -> dict[str, Any]:
    """All fields, by a loop over tokens and their experts."""
    layer = layer.eval()
    routing = layer.router(x_TD)
    n, o = layer.n_experts, layer.d_out
    p = {name: t.detach().double() for name, t in layer.named_parameters()}

    def f(t: int, e: int) -> Tensor:
        rows = {name: p[name][e] if name in p else None for name in ("key_bias", "gate_keys")}
        h = hidden_units(x_TD[t].double(), p["keys"][e], rows["key_bias"], rows["gate_keys"], layer.activation)
        return h @ p["values"][e]

    outputs: list[list[tuple[float, Tensor]]] = [[] for _ in range(n)]
    for t in range(len(x_TD)):
        for e, g in zip(routing.index_TK[t].tolist(), routing.gate_TK[t].tolist(), strict=True):
            outputs[e].append((g, f(t, e)))
    zero = torch.zeros(o, dtype=torch.float64)
    found: dict[str, Any] = {"tokens": len(x_TD)}
    found["count"] = torch.tensor([float(len(of)) for of in outputs])
    found["gate"] = torch.tensor([sum(g for g, _ in of) for of in outputs])
    found["gate_square"] = torch.tensor([sum(g**2 for g, _ in of) for of in outputs])
    found["norm"] = torch.tensor([float(sum(y.norm() for _, y in of)) for of in outputs])
    found["contribution"] = torch.tensor([float(sum(g * y.norm() for g, y in of)) for of in outputs])
    found["energy"] = torch.tensor([float(sum((g * y).square().sum() for g, y in of)) for of in outputs])
    found["moment"] = torch.stack([sum((g**2 * y for g, y in of), zero) for of in outputs])
    found["mean"] = torch.stack([
        found["moment"][e] / found["gate_square"][e].double() if of else zero for e, of in enumerate(outputs)
    ])  # fmt: skip
    found["residual"] = torch.tensor([
        float(sum((g**2 * (y - found["mean"][e]).square().sum() for g, y in of), zero.sum()))
        for e, of in enumerate(outputs)
    ])  # fmt: skip
    if forced:
        ys = [torch.stack([f(t, e) for t in range(len(x_TD))]).mean(0) for e in range(n)]
        found["all_tokens_mean"] = torch.stack(ys)
    return found


def assert_same(stats: ExpertStats, expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    assert stats.tokens == expected["tokens"]
    for name in expected:
        if name != "tokens":
            value = getattr(stats, name)
            assert (value.dtype, value.device.type) == (torch.float64, "cpu"), name
            torch.testing.assert_close(value, expected[name].double(), rtol=tolerance, atol=tolerance, msg=name)


LAYERS = {
    "σ-MoE": lambda **o: sf.SigmaMoE(6, 5, 4, 2, **o),
    "GLU with biases": lambda **o: sf.MoE(6, 5, 4, 3, glu=True, bias=True, activation="silu", d_out=3, **o),
    "noisy": lambda **o: sf.NoisyTopKMoE(6, 5, 4, 2, activation="gelu", **o),
}


@pytest.mark.parametrize("name", LAYERS)
def test_all_fields_are_those_of_a_loop_over_tokens_and_experts(name: str, on_backend: str) -> None:
    layer = LAYERS[name](dtype=torch.float64)
    if layer.key_bias is not None:
        nn.init.normal_(layer.key_bias)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    stats = sf.expert_stats(layer, [(x[:2],), {"x": x[2:]}], forced=True)
    assert list(stats) == [""]
    assert_same(stats[""], brute_force(layer, x.flatten(0, 1), forced=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_kept_in_fp64_whatever_the_layer_computes_in(dtype: torch.dtype) -> None:
    layer = sf.SigmaMoE(6, 5, 4, 2, dtype=dtype)
    x = torch.randn(40, 6, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_same(sf.expert_stats(layer, [x])[""], brute_force(layer, x), tolerance)


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = sf.SigmaMoE(6, 5, 4, 2).double(), torch.randn(50, 6, dtype=torch.float64)
    whole = sf.expert_stats(layer, [x], forced=True)[""]
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 7 * 8 * 6)
    parts = sf.expert_stats(layer, [x], forced=True)[""]
    for name in (*SUMS, "total", "residual"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=1e-9)


def test_two_runs_add_to_one() -> None:
    layer, x = sf.SigmaMoE(6, 5, 4, 2).double(), torch.randn(50, 6, dtype=torch.float64)
    both = sf.expert_stats(layer, [x], forced=True)[""]
    sum_ = sf.expert_stats(layer, [x[:20]], forced=True)[""] + sf.expert_stats(layer, [x[20:]], forced=True)[""]
    assert sum_.tokens == 50
    for name in (*SUMS, "total", "mean", "residual", "all_tokens_mean"):
        torch.testing.assert_close(getattr(sum_, name), getattr(both, name), rtol=1e-6, atol=1e-9)


def test_a_constant_explains_an_expert_that_always_sees_one_token() -> None:
    layer = sf.SigmaMoE(6, 5, 4, 1)
    stats = sf.expert_stats(layer, [torch.randn(1, 6).repeat(9, 1)])[""]
    assert stats.count.sum() == 9
    assert stats.energy.sum() > 0
    assert (stats.residual <= 1e-12 * stats.energy).all()
    assert (stats.residual >= 0).all()
    assert not stats.mean[stats.count == 0].any()  # zeros and no NaN where no token came


def test_the_mean_is_the_best_constant_in_least_squares() -> None:
    layer, x = sf.SigmaMoE(6, 3, 4, 2).double(), torch.randn(60, 6, dtype=torch.float64)
    stats = sf.expert_stats(layer, [x])[""]
    routing = layer.router(x)
    for e in range(3):
        token, slot = (routing.index_TK == e).nonzero(as_tuple=True)
        g = routing.gate_TK[token, slot].unsqueeze(1).detach()
        y = (torch.relu(x[token] @ layer.keys[e].T) @ layer.values[e]).detach()
        best = torch.linalg.lstsq(g, g * y)
        torch.testing.assert_close(stats.mean[e], best.solution[0])
        torch.testing.assert_close(stats.residual[e], (g * y - g * best.solution).square().sum())


class Model(nn.Module):
    """A model with a mask for its batch, and a layer that may be given one of its own."""

    def __init__(self, own_mask: bool) -> None:
        super().__init__()
        self.first = sf.SigmaMoE(6, 5, 4, 2)
        self.drop = nn.Dropout(0.5)
        self.shared = sf.layers.SharedExpertMoE(sf.SoftmaxMoE(6, 4, 3, 2), sf.DenseFFN(6, 3))
        self.unused, self.own_mask = sf.SigmaMoE(6, 5, 4, 2), own_mask

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        own = attention_mask.bool() if self.own_mask and attention_mask is not None else None
        y: Tensor = self.drop(self.first(x, mask=own))
        y = self.shared(y.flatten(0, 1))
        return y


@pytest.mark.parametrize("own_mask", [False, True])
def test_padding_is_left_out_and_modes_and_hooks_come_back(own_mask: bool) -> None:
    model = Model(own_mask).train()
    model.shared.eval()
    x = torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = sf.expert_stats(model, [{"x": x, "attention_mask": mask}])
    assert list(found) == ["first", "shared.routed"]  # the unused layer saw nothing
    assert [s.tokens for s in found.values()] == [8, 8]
    assert_same(found["first"], brute_force(model.first, x[mask.bool()]), 1e-5)
    assert model.training
    assert not model.shared.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert list(sf.expert_stats(model, [x], lambda module, name: name == "first")) == ["first"]


def test_a_mask_of_the_other_order_marks_the_same_tokens() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = sf.SigmaMoE(6, 5, 4, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y: Tensor = self.moe(x.transpose(0, 1))
            return y

    model, x = Turned(), torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = sf.expert_stats(model, [{"x": x, "attention_mask": mask}])
    assert_same(found["moe"], brute_force(model.moe, x[mask.bool()]), 1e-5)


def test_a_router_input_is_what_routes() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = sf.SigmaMoE(6, 5, 4, 2, d_router=3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.moe(x, router_input=x[..., :3].contiguous())
            return y

    model, x = Wide(), torch.randn(20, 6)
    count = model.moe.router(x[:, :3].contiguous()).index_TK.flatten().bincount(minlength=5)
    assert torch.equal(sf.expert_stats(model, [x])["moe"].count, count.double())


def test_void_slots_count_for_no_expert() -> None:
    """Experts of transformers' convention, where an index may name no expert."""

    class Experts(nn.Module):
        num_experts = 3

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            y = torch.zeros_like(hidden_states)
            for j in range(top_k_index.shape[1]):
                real = (top_k_index[:, j] < 3).unsqueeze(1)
                y = y + real * top_k_weights[:, j : j + 1] * (1 + top_k_index[:, j : j + 1]) * hidden_states
            return y

    x, index = torch.randn(4, 6), torch.tensor([[0, 3], [0, 1], [3, 3], [1, 0]])
    weight = torch.rand(4, 2)
    stats = sf.expert_stats(Experts(), [{"hidden_states": x, "top_k_index": index, "top_k_weights": weight}])[""]
    assert stats.count.tolist() == [3, 2, 0]
    assert stats.tokens == 4
    torch.testing.assert_close(stats.gate[1], (weight[1, 1] + weight[3, 0]).double())
    norms = 2 * x.norm(dim=1)
    torch.testing.assert_close(stats.norm[1], (norms[1] + norms[3]).double())


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_transformers_models_are_measured_without_code_of_their_own(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 8, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "vocab_size": 20}
    config = getattr(transformers, f"{family}Config")(**sizes, num_local_experts=4, num_experts=4, head_dim=4)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    experts = model.model.layers[0].mlp.experts
    calls = []
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    ids, mask = torch.randint(0, 20, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    found = sf.expert_stats(model, [{"input_ids": ids, "attention_mask": mask}])
    handle.remove()
    assert list(found) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    (x, index, gate), stats = calls[0], found["model.layers.0.mlp.experts"]
    energy = torch.zeros(4, dtype=torch.float64)
    for t in mask.flatten().nonzero().flatten().tolist():
        for e, g in zip(index[t].tolist(), gate[t].tolist(), strict=True):
            a, b = (experts.gate_up_proj[e] @ x[t]).chunk(2)
            y = experts.down_proj[e] @ (nn.functional.silu(a) * b)
            energy[e] += (g * y).square().sum().item()
    assert stats.tokens == 10
    torch.testing.assert_close(stats.energy, energy, rtol=1e-4, atol=1e-12)


def test_a_family_with_other_names_is_measured() -> None:
    pytest.importorskip("transformers", minversion="5")
    from test_transformers_experts import model_of

    model = model_of("gpt_oss", torch.float32)
    (stats,) = sf.expert_stats(model, [{"input_ids": torch.randint(0, 20, (2, 6))}]).values()
    assert stats.tokens == 12
    assert stats.energy.sum() > 0


def test_weights_that_accelerate_holds_are_not_measured() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(sf.SigmaMoE(6, 5, 4, 2))
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match=r"0\.keys is on meta, since accelerate holds these weights"):
        sf.expert_stats(model, [torch.randn(3, 6)])


def test_a_split_layer_is_measured_before() -> None:
    model = Model(own_mask=False)
    model.first._split = object()
    with pytest.raises(ValueError, match=r"model's layer first is split by sparse_ffn\.parallel: measure before"):
        sf.expert_stats(model, [torch.randn(2, 5, 6)])


def test_a_module_whose_forward_tells_nothing_has_no_experts() -> None:
    model, x = nn.Sequential(sf.SigmaMoE(6, 5, 4, 2), nn.ReLU(), nn.ReLU()), torch.randn(4, 6)
    for module in model[1:]:
        module.forward = torch.relu  # a builtin without a signature
    model[2].num_experts = 3
    assert list(sf.expert_stats(model, [x])) == ["0"]


def test_errors_say_what_is_missing() -> None:
    layer, x = sf.SigmaMoE(6, 5, 4, 2), torch.randn(4, 6)
    with pytest.raises(ValueError, match="no MoE layer"):
        sf.expert_stats(nn.Linear(2, 2), [torch.randn(1, 2)])
    with pytest.raises(ValueError, match="no layer saw a token"):
        sf.expert_stats(layer, [])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda x: sf.expert_stats(layer, [x])[""].energy)(x.unsqueeze(0))
    one, wide = (sf.expert_stats(sf.SigmaMoE(6, n, 4, 2), [x])[""] for n in (5, 6))
    with pytest.raises(ValueError, match=r"\[5, 6\] and of \[6, 6\]"):
        one + wide
    with pytest.raises(ValueError, match="forced=True"):
        one + sf.expert_stats(layer, [x], forced=True)[""]


def test_of_quantised_experts_they_are_those_of_the_numbers_that_the_codes_stand_for() -> None:
    layer, x = sf.SigmaMoE(16, 6, 8, 2), torch.randn(40, 16)
    sf.quantize_experts_(layer, sf.ExpertQuantization(group_size=None))
    stored = sf.expert_stats(layer, [x])[""]
    sf.dequantize_experts_(layer)
    dense = sf.expert_stats(layer, [x])[""]
    assert torch.equal(stored.count, dense.count)
    assert (stored.energy - dense.energy).norm() < 1e-5 * dense.energy.norm()


def test_quantised_experts_are_pruned_before() -> None:
    layer, x = sf.SigmaMoE(16, 6, 8, 2), torch.randn(40, 16)
    sf.quantize_experts_(layer, sf.ExpertQuantization(group_size=None))
    with pytest.raises(ValueError, match=r"keys of the layer is no plain parameter: prune before it is .* quantised"):
        sf.prune_experts_(layer, sf.expert_stats(layer, [x]), 0.5)


def test_what_a_model_gives_its_layer_as_mask_counts_before_the_batchs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = sf.SigmaMoE(8, 5, 4, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.moe(x, mask=torch.arange(5).expand(2, 5) < 1)

    stats = sf.expert_stats(Model(), [{"x": torch.randn(2, 5, 8), "attention_mask": torch.ones(2, 5)}])
    assert stats["moe"].tokens == 2
