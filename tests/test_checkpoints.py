"""Foreign MoE checkpoints: a layer computes what the block did, going back gives the same state, errors are loud."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import sparse_ffn as sf
from sparse_ffn.convert import to_dense
from sparse_ffn.integrations import (
    from_moe_layer,
    from_product_key_memory,
    from_transformers,
    from_xlm,
    to_moe_layer,
    to_transformers,
)
from sparse_ffn.layers import SharedExpertMoE
from sparse_ffn.routing import DeepSeekRouter

D, G, E, K = 16, 12, 6, 2
SIZES = {
    "hidden_size": D,
    "moe_intermediate_size": G,
    "intermediate_size": G,
    "num_experts_per_tok": K,
    "num_attention_heads": 2,
}
DEEPSEEK = {"n_routed_experts": E, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
V3 = {**DEEPSEEK, "norm_topk_prob": True, "n_group": 3, "topk_group": 2}
NEMOTRON = {**V3, "moe_shared_expert_intermediate_size": 20, "mamba_num_heads": 2, "layers_block_type": ["moe"]}
LONGCAT = {"n_routed_experts": E, "zero_expert_num": 3, "routed_scaling_factor": 2.5, "moe_topk": 4}
LONGCAT |= {"expert_ffn_hidden_size": G}
# model_type, the block's class, the config's own facts
BLOCKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", {"num_local_experts": E}),
    "olmoe": ("olmoe", "OlmoeSparseMoeBlock", {"num_experts": E, "norm_topk_prob": False}),
    "olmoe, normalised": ("olmoe", "OlmoeSparseMoeBlock", {"num_experts": E, "norm_topk_prob": True}),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        {"num_experts": E, "shared_expert_intermediate_size": 20, "norm_topk_prob": False},
    ),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", {"num_experts": E, "norm_topk_prob": True}),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2Moe", {**DEEPSEEK, "topk_method": "greedy", "norm_topk_prob": False}),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3MoE", V3),
    "deepseek_v3, one group": ("deepseek_v3", "DeepseekV3MoE", {**V3, "n_group": 1, "topk_group": 1}),
    "deepseek_v3, raw gates": ("deepseek_v3", "DeepseekV3MoE", {**V3, "norm_topk_prob": False}),
    "nemotron_h": ("nemotron_h", "NemotronHMoE", NEMOTRON),
    "nemotron_h, latent": ("nemotron_h", "NemotronHMoE", {**NEMOTRON, "moe_latent_size": 8}),
    "longcat_flash": ("longcat_flash", "LongcatFlashMoE", LONGCAT),
    "longcat_flash, no zero experts": ("longcat_flash", "LongcatFlashMoE", {**LONGCAT, "zero_expert_num": 0}),
}


def block(name: str) -> tuple[Any, nn.Module]:
    """A block of transformers with random weights, biases included, and its config."""
    transformers = pytest.importorskip("transformers", minversion="5")
    kind, cls, facts = BLOCKS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **facts)
    config._experts_implementation = "eager"
    module = getattr(getattr(transformers.models, kind), f"modeling_{kind}")
    made: nn.Module = getattr(module, cls)(config)
    for tensor in made.state_dict().values():
        nn.init.normal_(tensor, 0.0, 0.5)
    if kind == "longcat_flash":
        made.experts.gate_up_proj.data[E:] = 0  # nothing reads them
    return config, made.eval()


def one_by_one(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The names of transformers 4: each expert by itself."""
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    split = {n: t for n, t in state.items() if not n.startswith("experts.")}
    if kind == "nemotron_h":
        parts = ("up_proj", "down_proj")
        return split | {f"experts.{e}.{n}.weight": state[f"experts.{n}"][e] for n in parts for e in range(E)}
    for e in range(E):
        fused = state["experts.gate_up_proj"][e]
        split[f"experts.{e}.{gate}.weight"], split[f"experts.{e}.{up}.weight"] = fused[:G], fused[G:]
        split[f"experts.{e}.{down}.weight"] = state["experts.down_proj"][e]
    return split


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "one by one"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_layer_computes_what_the_block_does_and_goes_back(name: str, fused: bool) -> None:
    config, theirs = block(name)
    state = {f"mlp.{n}": t for n, t in theirs.state_dict().items()}
    if not fused:
        state = {f"mlp.{n}": t for n, t in one_by_one(theirs.state_dict(), BLOCKS[name][0]).items()}
    layer = from_transformers({**state, "norm.weight": torch.ones(D)}, config, prefix="mlp.").eval()
    x = torch.randn(2, 25, D)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)

    back = to_transformers(layer, config.to_dict(), prefix="mlp.", fused=fused)
    assert back.keys() == state.keys()
    for key, tensor in back.items():
        torch.testing.assert_close(tensor, state[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in BLOCKS if "nemotron" in name or "longcat" in name])
def test_its_gradients_are_the_blocks(name: str) -> None:
    config, theirs = block(name)
    theirs = theirs.double()
    layer = from_transformers(theirs.state_dict(), config, balance_weight=0.0).double().eval()
    x, factor = torch.randn(2, 25, D, dtype=torch.float64), torch.randn(2, 25, D, dtype=torch.float64)
    ours, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(ours) * factor).sum().backward()
    (theirs(expected) * factor).sum().backward()
    torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-5)
    found = {n.removeprefix("routed.").removeprefix("moe."): p.grad for n, p in layer.named_parameters()}
    wanted = {n: p.grad for n, p in theirs.named_parameters()}
    if "longcat" in name:
        gate, up = wanted["experts.gate_up_proj"][:E].chunk(2, 1)
        pairs = [("gate_keys", gate), ("keys", up), ("router.weight", wanted["router.classifier.weight"])]
        pairs += [("values", wanted["experts.down_proj"].mT)]
    else:
        scale = config.routed_scaling_factor  # values are theirs times it
        pairs = [("keys", wanted["experts.up_proj"]), ("values", wanted["experts.down_proj"].mT / scale)]
        pairs += [("router.weight", wanted["gate.weight"]), ("shared.keys", wanted["shared_experts.up_proj.weight"])]
        pairs += [("shared.values", wanted["shared_experts.down_proj.weight"].mT)]
        projections = {"down.weight": "fc1_latent_proj.weight", "up.weight": "fc2_latent_proj.weight"}
        pairs += [(n, wanted[their]) for n, their in projections.items() if n in found]
    assert found.keys() == dict(pairs).keys()
    for parameter, gradient in pairs:
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=parameter: n + m)


def test_longcats_slices_for_identity_experts_are_read_by_nobody() -> None:
    config, theirs = block("longcat_flash")
    x = torch.randn(40, D)
    before = theirs(x)
    theirs.experts.gate_up_proj.data[E:] = torch.nan
    layer = from_transformers(theirs.state_dict(), config).eval()
    torch.testing.assert_close(theirs(x), before, rtol=0, atol=0)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    assert 0 < sf.routing_stats(layer)[""]["null"] < 1
    bias = layer.router.bias.clone()
    layer.train()(x)
    sf.update_router_bias(layer)
    assert (layer.router.bias[E:] == bias[E:]).all()
    assert (layer.router.bias[:E] != bias[:E]).any()


def test_shared_experts_become_a_layer_of_their_own() -> None:
    config, theirs = block("qwen2_moe")
    layer = from_transformers(theirs.state_dict(), config, balance="switch", aux="attach")
    assert isinstance(layer, SharedExpertMoE)
    assert isinstance(layer.shared, sf.DenseFFN)
    assert layer.shared.d_ff == 20
    layer.train()(torch.randn(5, D))
    assert sf.aux_loss(layer) > 0  # found inside
    assert list(sf.routing_stats(layer)) == ["routed"]
    config, theirs = block("deepseek_v3")
    without = {n: t for n, t in theirs.state_dict().items() if not n.startswith("shared_experts")}
    assert isinstance(from_transformers(without, config), sf.MoE)
    with pytest.raises(ValueError, match=r"shared has \(d_model, d_out\) = \(8, 8\), the routed experts \(16, 16\)"):
        SharedExpertMoE(sf.MoE(16, 4, 8, 2), sf.DenseFFN(8, 16))


def test_deepseeks_bias_is_moved_and_gradients_flow() -> None:
    config, theirs = block("deepseek_v3")
    layer = from_transformers(theirs.state_dict(), config)
    assert isinstance(layer, SharedExpertMoE)
    before = layer.routed.router.bias.clone()
    torch.testing.assert_close(before, theirs.gate.e_score_correction_bias, rtol=0, atol=0)
    layer.train()(torch.randn(40, D)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    sf.update_router_bias(layer)
    assert not torch.equal(layer.routed.router.bias, before)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "moe_layer"])
def test_what_only_training_has_may_be_asked_for(kind: str) -> None:
    options, x = {"balance": "bias", "expert_dropout": 0.5}, torch.randn(40, D)
    if kind == "moe_layer":
        state = moe_layer_state(True)
        plain, layer = from_moe_layer(state, K), from_moe_layer(state, K, **options)
    else:
        config, theirs = block(kind)
        plain, layer = (from_transformers(theirs.state_dict(), config, **o) for o in ({}, options))
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    first, second = (layer.train()(x) for _ in range(2))
    assert not torch.equal(first, second)  # other experts are dropped
    router = next(m.router for m in layer.modules() if isinstance(m, sf.MoE))
    before = router.bias.clone()
    sf.update_router_bias(layer)
    assert not torch.equal(router.bias, before)
    if kind == "mixtral":
        with pytest.raises(ValueError, match="its router's selection bias has no place there"):
            to_transformers(layer, config)
        router.bias.zero_()
        to_transformers(layer, config)


def test_options_that_the_checkpoint_decides_are_refused() -> None:
    config, theirs = block("mixtral")
    for option, shown in (({"router": "sigmoid"}, "router = 'sigmoid'"), ({"k": 3}, "k = 3")):
        with pytest.raises(ValueError, match=f"{shown} is for the checkpoint to say: leave it out"):
            from_transformers(theirs.state_dict(), config, **option)
    config, theirs = block("deepseek_v3")
    with pytest.raises(ValueError, match="balance = 'entropy' must hold 'bias': the checkpoint has a correction bias"):
        from_transformers(theirs.state_dict(), config, balance="entropy")
    with pytest.raises(ValueError, match="bias = True is for the checkpoint to say: leave it out"):
        from_moe_layer(moe_layer_state(False), K, bias=True)
    for load, option in ((from_moe_layer, "dtype"), (from_xlm, "n_heads"), (from_product_key_memory, "query_dim")):
        with pytest.raises(ValueError, match=f"{option} = 2 is for the checkpoint to say: leave it out"):
            load({}, K, **{option: 2})


def test_a_router_wider_than_its_experts_stays_so() -> None:
    config, theirs = block("deepseek_v3")
    state = {n: t if n.startswith("gate.") else t.bfloat16() for n, t in theirs.state_dict().items()}
    layer = from_transformers(state, config)
    assert (layer.routed.keys.dtype, layer.routed.router.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(layer.routed.router.weight, state["gate.weight"])
    x = torch.randn(30, D).bfloat16()
    scale = theirs(x.float()).abs().max()
    torch.testing.assert_close(layer.eval()(x).float() / scale, theirs(x.float()) / scale, rtol=0, atol=0.03)


def test_the_state_is_copied_not_shared() -> None:
    config, theirs = block("mixtral")
    layer = from_transformers(theirs.state_dict(), config)
    before = theirs.gate.weight.clone()
    with torch.no_grad():
        layer.router.weight.zero_()
    assert torch.equal(theirs.gate.weight, before)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", lambda s, c: s.pop("gate.weight"), r"has no 'gate.weight'; it still has \[\]"),
        ("mixtral", lambda s, c: s.pop("experts.gate_up_proj"), "has no 'experts.gate_up_proj'; it still has"),
        ("mixtral", lambda s, c: s.update({"gate.bias": torch.ones(E)}), "no place for: 'gate.bias'"),
        ("olmoe", lambda s, c: c.pop("norm_topk_prob"), "config must say norm_topk_prob"),
        ("olmoe", lambda s, c: c.update(model_type="gpt_oss"), "config.model_type must be one of 'mixtral'.*'gpt_oss'"),
        ("olmoe", lambda s, c: c.update(hidden_act="mish"), "config.hidden_act must be one of 'silu'.*got 'mish'"),
        ("qwen2_moe", lambda s, c: s.pop("shared_expert_gate.weight"), "has no 'shared_expert_gate.weight'"),
        ("qwen3_moe", lambda s, c: s.update({"shared_expert.up_proj.weight": torch.ones(1)}), "no place for"),
        ("deepseek_v2", lambda s, c: c.update(topk_method="group_limited_greedy"), "only 'greedy' without"),
        ("mixtral", lambda s, c: s.update({"gate.weight": torch.ones(3, D)}), "size mismatch for router.weight"),
        ("mixtral", lambda s, c: s.update({"gate.weight": torch.ones(D)}), r"'gate.weight' must have 2 .*got \[16\]"),
        ("mixtral", lambda s, c: s.update({"experts.down_proj": torch.ones(E, D, 5)}), "size mismatch for values"),
        ("mixtral", lambda s, c: c.update(num_local_experts=8), "its n_experts is 6, not 8"),
        ("olmoe", lambda s, c: c.update(hidden_size=5), "its d_model is 16, not 5"),
        ("deepseek_v3", lambda s, c: c.update(n_group=4), "n_groups = 4 must divide n_experts = 6 into groups"),
        ("nemotron_h", lambda s, c: c.update(mlp_bias=True), "config has mlp_bias = True"),
        ("nemotron_h", lambda s, c: c.pop("mlp_hidden_act"), "config must say mlp_hidden_act"),
        ("nemotron_h", lambda s, c: c.update(moe_latent_size=8), "has no 'fc1_latent_proj.weight'"),
        ("nemotron_h, latent", lambda s, c: c.update(moe_latent_size=4), "its d_latent is 8, not 4"),
        ("longcat_flash", lambda s, c: c.update(zero_expert_type="drop"), "zero_expert_type = 'drop'"),
        ("longcat_flash", lambda s, c: c.update(zero_expert_num=2), "size mismatch for router.weight"),
        ("longcat_flash", lambda s, c: c.update(expert_ffn_hidden_size=9), "its expert_size is 12, not 9"),
        ("longcat_flash", lambda s, c: s.update({"router.classifier.bias": torch.ones(9)}), "no place for: 'router.cl"),
        ("deepseek_v3", lambda s, c: c.update(topk_group=4), "topk_groups must be at least 1 and at most n_groups = 3"),
    ],
)
def test_what_has_no_exact_counterpart_is_an_error(name: str, change: Any, message: str) -> None:
    config, theirs = block(name)
    state, facts = dict(theirs.state_dict()), config.to_dict()
    change(state, facts)
    with pytest.raises(ValueError, match=message):
        from_transformers(state, facts)


def test_going_back_refuses_a_layer_that_is_another_function() -> None:
    config, theirs = block("mixtral")
    good = {"router": "softmax_topk", "activation": "silu", "glu": True}
    for change, message in (
        ({"router": "sigmoid"}, "its router is"),
        ({"activation": "relu"}, "its activation is 'relu', not 'silu'"),
        ({"glu": False}, "its glu is False"),
        ({"bias": True}, "its bias is True"),
        ({"d_out": 8}, "its d_out is 8"),
    ):
        with pytest.raises(ValueError, match=message):
            to_transformers(sf.MoE(D, E, G, K, **{**good, **change}), config)
    for sizes, message in (
        ((8, E, G, K), "its d_model is 8, not 16"),
        ((D, 4, G, K), "its n_experts is 4, not 6"),
        ((D, E, 8, K), "its expert_size is 8, not 12"),
    ):
        with pytest.raises(ValueError, match=message):
            to_transformers(sf.MoE(*sizes, **good), config)
    with pytest.raises(TypeError, match="got DenseFFN"):
        to_transformers(sf.DenseFFN(D, G), config)  # type: ignore[arg-type]
    layer = sf.MoE(D, E, G, K, **good)
    theirs.load_state_dict(to_transformers(layer, config))
    torch.testing.assert_close(theirs(torch.ones(1, 3, D)), layer(torch.ones(1, 3, D)))
    with pytest.raises(ValueError, match="shared expert is True, not False"):
        to_transformers(SharedExpertMoE(layer, sf.DenseFFN(D, 8)), config)


@pytest.mark.parametrize("name", ["routed.keys", "routed.router.weight", "shared.values"])
def test_going_back_refuses_what_only_the_next_forward_computes(name: str) -> None:
    config, theirs = block("qwen2_moe")
    layer = from_transformers(theirs.state_dict(), config)
    owner, _, attribute = name.rpartition(".")
    prune.l1_unstructured(layer.get_submodule(owner), attribute, 0.5)
    with pytest.raises(ValueError, match=rf"^{name} is masked .* by torch\.nn\.utils\.prune\.remove"):
        to_transformers(layer, config)
    prune.remove(layer.get_submodule(owner), attribute)
    theirs.load_state_dict(to_transformers(layer, config))
    x = torch.randn(1, 3, D)
    torch.testing.assert_close(theirs(x), layer.eval()(x), rtol=1e-4, atol=1e-5)


def test_going_back_refuses_what_accelerate_holds() -> None:
    accelerate = pytest.importorskip("accelerate")
    config, theirs = block("mixtral")
    layer, own = from_transformers(theirs.state_dict(), config), sf.SigmaMoE(D, E, G, K)
    for held in (layer, own):
        accelerate.cpu_offload(held)
    with pytest.raises(ValueError, match=r"^keys is on meta, since accelerate holds these weights"):
        to_transformers(layer, config)
    with pytest.raises(ValueError, match="is on meta, since accelerate holds these weights"):
        to_moe_layer(own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "its shared expert's activation is 'relu', not 'silu'"),
        ({"glu": False}, "its shared expert's glu is False, not True"),
        ({"bias": True}, "its shared expert's bias is True, not False"),
    ],
)
def test_going_back_refuses_a_shared_expert_that_is_another_function(options: dict[str, Any], message: str) -> None:
    config, _ = block("qwen2_moe")
    routed = sf.MoE(D, E, G, K, router="softmax", activation="silu", glu=True)
    shared = sf.DenseFFN(D, 20, **{"activation": "silu", "glu": True, "bias": False, **options})
    with pytest.raises(ValueError, match=message):
        to_transformers(SharedExpertMoE(routed, shared, gated=True), config)


def test_going_back_refuses_biases_that_have_no_place_and_asks_for_those_that_have_one() -> None:
    config, theirs = block("nemotron_h, latent")
    layer = from_transformers(theirs.state_dict(), config)
    routed = layer.routed if isinstance(layer, SharedExpertMoE) else layer
    routed.down = nn.Linear(routed.down.weight.shape[1], routed.down.weight.shape[0])
    with pytest.raises(ValueError, match="its projections' bias is True, not False"):
        to_transformers(layer, config)
    config, theirs = block("deepseek_v3, one group")
    layer = from_transformers(theirs.state_dict(), config)
    assert isinstance(layer, SharedExpertMoE)
    assert isinstance(layer.routed, sf.MoE)
    layer.routed.router.bias = None
    with pytest.raises(ValueError, match="its selection bias is False, not True"):
        to_transformers(layer, config)


def moe_layer_state(bias: bool) -> dict[str, Tensor]:
    state = {"keys": torch.randn(E, D, G), "values": torch.randn(E, G, 8), "expert_sel": torch.randn(E, D)}
    return state | ({"bias": torch.randn(E, G), "o_bias": torch.randn(8)} if bias else {})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("router", "gates"), [("sigmoid", torch.sigmoid), ("softmax", lambda s: F.softmax(s, -1))])
def test_the_papers_layer_by_its_definition(router: str, gates: Any, bias: bool) -> None:
    state = moe_layer_state(bias)
    layer = from_moe_layer({**state, "kv_sel_counts_100": torch.zeros(E, G)}, K, router=router)
    x, zero = torch.randn(3, 7, D), torch.zeros(())
    gate, index = gates(x @ state["expert_sel"].t()).topk(K, -1)
    h = torch.einsum("btd,btkdg->btkg", x, state["keys"][index]) + (state["bias"][index] if bias else zero)
    expected = torch.einsum("btk,btkg,btkgo->bto", gate, h.relu(), state["values"][index]) + state.get("o_bias", zero)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    back = to_moe_layer(layer, prefix="pkm.")
    assert back.keys() == {f"pkm.{name}" for name in state}
    assert all(torch.equal(back[f"pkm.{name}"], tensor) for name, tensor in state.items())


def test_what_the_papers_code_knows_and_we_do_not_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for: 'sel_bias', 'shared_keys'"):
        from_moe_layer({**moe_layer_state(False), "shared_keys": torch.ones(1), "sel_bias": torch.ones(E)}, K)
    with pytest.raises(ValueError, match=r"size mismatch for router.weight"):
        from_moe_layer({**moe_layer_state(False), "expert_sel": torch.randn(E + 1, D)}, K)
    with pytest.raises(ValueError, match=r"'keys' must have 3 dimensions, got \[6\]"):
        from_moe_layer({**moe_layer_state(False), "keys": torch.randn(E)}, K)
    with pytest.raises(ValueError, match=r"(?s)does not fit the layer: .*gate_keys"):
        from_moe_layer(moe_layer_state(False), K, glu=True)
    with pytest.raises(ValueError, match=r"has no 'a.keys'; it still has \[\]"):
        from_moe_layer(moe_layer_state(False), K, prefix="a.")
    with pytest.raises(ValueError, match="no place for gate_keys"):
        to_moe_layer(sf.SigmaMoE(D, E, G, K, glu=True))
    with pytest.raises(TypeError, match="got DenseFFN"):
        to_moe_layer(sf.DenseFFN(D, G, bias=False))  # type: ignore[arg-type]


H, N, C = 3, 7, 4  # heads, sub-keys, half a query


def read(scores: Tensor, k: int, values: Tensor, weigh: Any) -> Tensor:
    """Of scores [B, H, 2, N] the sum over heads of the k best pairs' values, by comparing all pairs."""
    best = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2).topk(k)
    return torch.einsum("bhk,bhko->bo", weigh(best.values), values[best.indices])


def product_keys(kind: str) -> tuple[dict[str, Tensor], Any]:
    """A foreign memory's state in fp64, and its scores of x [B, D]."""
    if kind == "product-key-memory":
        state = {"keys": (H, N, 2, C), "to_queries.weight": (2 * H * C, D), "norm.weight": (C,), "norm.bias": (C,)}
    else:
        state = {"keys": (N, C) if "shared" in kind else (H, 2, N, C)}
        if "itself" in kind:
            state["keys"] = (1, 2, N, D // 2)
        else:
            state |= {"query_proj.query_mlps.0.weight": (2 * H * C, D), "query_proj.query_mlps.0.bias": (2 * H * C,)}
        if "no bias" in kind:
            del state["query_proj.query_mlps.0.bias"]
        if "batch norm" in kind:
            names = ("weight", "bias", "running_mean", "running_var")
            state |= {f"query_proj.query_mlps.1.{name}": (2 * H * C,) for name in names}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in state.items()}
    if "batch norm" in kind:
        tensors["query_proj.query_mlps.1.running_var"].abs_().add_(0.5)
        tensors["query_proj.query_mlps.1.num_batches_tracked"] = torch.tensor(9)

    def scores(x: Tensor) -> Tensor:
        if kind == "product-key-memory":
            query = (x @ tensors["to_queries.weight"].t()).view(-1, 2, H, C)
            query = F.layer_norm(query, (C,), tensors["norm.weight"], tensors["norm.bias"])
            return torch.einsum("bphd,hnpd->bhpn", query, tensors["keys"])
        weight = tensors.get("query_proj.query_mlps.0.weight")
        query = x if weight is None else F.linear(x, weight, tensors.get("query_proj.query_mlps.0.bias"))
        if "batch norm" in kind:
            norm = [tensors[f"query_proj.query_mlps.1.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
            query = F.batch_norm(query, *norm)
        keys = tensors["keys"].expand(H, 2, N, C) if "shared" in kind else tensors["keys"]
        return torch.einsum("bhpc,hpnc->bhpn", query.view(len(x), len(keys), 2, -1), keys)

    return tensors, scores


@pytest.mark.parametrize("activation", ["softmax", "relu"])
@pytest.mark.parametrize(
    "kind", ["product-key-memory", "XLM", "XLM, no bias", "XLM, batch norm", "XLM, x itself", "XLM, shared keys"]
)
def test_foreign_product_key_memories_by_their_definition(kind: str, activation: str) -> None:
    theirs, scores = product_keys(kind)
    theirs["values.weight"] = torch.randn(N * N, 5, dtype=torch.float64)
    load = from_product_key_memory if kind == "product-key-memory" else from_xlm
    options = {} if activation == "softmax" else {"activation": activation}
    layer = load({f"a.{n}": t for n, t in theirs.items()} | {"b": torch.ones(1)}, K, prefix="a.", **options)
    x = torch.randn(30, D, dtype=torch.float64)
    ours, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    weigh = F.relu if activation == "relu" else lambda s: F.softmax(s, -1)
    values = theirs["values.weight"].requires_grad_()
    y, wanted = layer(ours), read(scores(expected), K, values, weigh)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(ours.grad, expected.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.values.grad, values.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("XLM", lambda s: s.update({"query_proj.query_mlps.2.weight": torch.ones(1)}), "no place for: 'query_proj"),
        ("XLM", lambda s: s.update(head_permutations=torch.ones(H, N)), "no place for: 'head_permutations'"),
        ("XLM", lambda s: s.update({"values.weight": torch.ones(5, 3)}), "size mismatch for values"),
        ("XLM", lambda s: s.update(keys=torch.ones(H, N, 2 * C)), r"'keys' must have 4 dimensions, got \[3, 7, 8\]"),
        ("XLM", lambda s: s.pop("keys"), "has no 'keys'"),
        ("product-key-memory", lambda s: s.pop("norm.bias"), "has no 'norm.bias'"),
        ("product-key-memory", lambda s: s.update({"pre_layernorm.weight": torch.ones(D)}), "no place for: 'pre_lay"),
        ("product-key-memory", lambda s: s.update({"to_queries.weight": torch.ones(9, D)}), r"must have 2·3·4 rows"),
    ],
)
def test_a_product_key_memory_with_more_or_less_is_an_error(kind: str, change: Any, message: str) -> None:
    theirs, _ = product_keys(kind)
    theirs["values.weight"] = torch.randn(N * N, 5, dtype=torch.float64)
    change(theirs)
    with pytest.raises(ValueError, match=message):
        (from_product_key_memory if kind == "product-key-memory" else from_xlm)(theirs, K)


def test_deepseeks_router_survives_expert_dropout_and_refuses_bad_sizes() -> None:
    router = DeepSeekRouter(D, E, K, n_groups=3, topk_groups=1, expert_dropout=0.6).train()
    gate = router(torch.randn(200, D)).gate_TK
    assert gate.isfinite().all()
    total = gate.sum(1)
    assert (((total - 1).abs() < 1e-5) | (total == 0)).all()  # a token whose experts all dropped gets nothing
    assert "n_groups=3, topk_groups=1" in repr(router)
    with pytest.raises(ValueError, match=r"k = 3 must be at most topk_groups·\(n_experts/n_groups\) = 2"):
        DeepSeekRouter(D, E, 3, n_groups=3, topk_groups=1)
    with pytest.raises(ValueError, match=r"k = 3 must be at most topk_groups·\(n_experts/n_groups\) = 2"):
        router.k = 3
    assert router.k == K


def test_a_token_without_a_living_expert_leaves_gradients_of_deepseeks_router_finite() -> None:
    layer = sf.MoE(D, E, G, K, router=DeepSeekRouter, expert_dropout=0.9)
    x = torch.randn(40, D, requires_grad=True)
    (layer(x).square().sum() + sf.aux_loss(layer)).backward()
    assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_only_experts_of_the_best_groups_weigh_something(rate: float) -> None:
    router = DeepSeekRouter(D, 12, 4, n_groups=4, topk_groups=2, normalize=False, expert_dropout=rate)
    logits, index, gate = router(torch.randn(200, D))
    worth = torch.sigmoid(logits).view(200, 4, 3).topk(2).values.sum(2)
    best = worth.topk(2).indices
    reached = (index.div(3, rounding_mode="floor").unsqueeze(2) == best.unsqueeze(1)).any(2)
    assert gate[reached].count_nonzero() > 100
    assert not gate[~reached].any()


def test_deepseeks_router_reaches_the_lower_ones_of_equal_groups() -> None:
    router = DeepSeekRouter(D, 64, 6, n_groups=16, topk_groups=3).eval()
    nn.init.zeros_(router.weight)
    assert torch.equal(router(torch.randn(5, D)).index_TK, torch.arange(6).expand(5, -1))


@pytest.mark.parametrize("normalize", [True, False])
def test_to_dense_knows_the_gates_of_deepseeks_router(normalize: bool) -> None:
    layer = sf.MoE(D, E, G, E, router=DeepSeekRouter(D, E, E, normalize=normalize)).eval()
    nn.init.zeros_(layer.router.weight)
    x = torch.randn(5, D)
    torch.testing.assert_close(to_dense(layer)(x), layer(x))
