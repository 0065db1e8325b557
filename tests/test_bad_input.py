"""Bad input of everything public: an error, a sentence with the argument's name, and nothing changed.

``WRONG`` holds for each name of an argument the values that no public function or constructor takes under that name. A
callable's rows follow from its signature, so that a new argument without a row, or a reason in ``EXEMPT``, is an error.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import sparse_ffn as sf
from sparse_ffn import compress, convert, functional, info, integrations, layers, parallel, plot, routing
from sparse_ffn.integrations import peft
from sparse_ffn.integrations.product_keys import QUERY
from sparse_ffn.layers import LatentMoE, LowRankMoE, MixedMoE, SharedExpertMoE, SwitchHeadAttention
from sparse_ffn.layers.balanced import Balanced
from sparse_ffn.routing import Routing
from sparse_ffn.tune.__main__ import main as tune

try:
    from sparse_ffn.integrations import transformers as hf
except ImportError:  # the extra "hf" is not installed
    hf = None

# --------------------------------------------------------------------------------------------------- wrong values

SIZE = (0, -1, 1.5, math.nan, "2", True, [2], torch.tensor(2), None)
RATE = (-0.1, 1.5, math.nan, "0.1", True, [0.1], torch.tensor(0.1), None)
SCALE = (-1.0, math.inf, math.nan, "1", True, [1.0], 1j, None)
WORD = ("nonsense", 3, ["relu"], {}, torch.ones(2), nn.ReLU(), None)
FLAG = (1, 0.0, "yes", [True], torch.tensor(True), None)
TEXT = (3, ["x"], b"x", None)
FUNCTION = ("nonsense", 3, [1])
MODULE = (3, "nonsense", [nn.Linear(2, 2)], nn.Linear, None)
NO_TENSOR = (3, 1.5, "nonsense", [1.0], np.ones(3), None)


def odd_layouts(x: Tensor) -> Iterator[Tensor]:
    """The same numbers, not laid out as kernels read them."""
    if x.dim() > 0:
        yield x.to_sparse()
    if x.dim() == 2 and x.is_floating_point():
        yield x.to_sparse_csr()
        yield torch.nested.nested_tensor(list(x), layout=torch.jagged)


def numbers(x: Tensor) -> list[Any]:
    """Of a matrix or vector of numbers that has a dtype of its own."""
    shapes = [x[..., :-1], x.unsqueeze(0).unsqueeze(-1), torch.tensor(1.0)]
    return [*NO_TENSOR, *odd_layouts(x), x.long(), x.bool(), x.cfloat(), x.to("meta"), *shapes]


def floating(x: Tensor) -> list[Any]:
    """Of numbers that share the dtype of the other arguments."""
    return [*numbers(x), x.double()]


def index(x: Tensor) -> list[Any]:
    shapes = [x[..., :-1], x.unsqueeze(0), torch.tensor(1)]
    return [*NO_TENSOR, *odd_layouts(x), x.int(), x.float(), x.bool(), x.to("meta"), *shapes, x - 1, x + 2**32, x + 99]


def free(x: Tensor) -> list[Any]:
    """As ``floating`` or ``index``, but for a last dimension that may have any size."""
    values = floating(x) if x.is_floating_point() else index(x)
    return [v for v in values if not isinstance(v, Tensor) or v.shape != x[..., :-1].shape]


def mask(x: Tensor) -> list[Any]:
    shapes = [x[..., :-1], x.unsqueeze(-1), torch.tensor(True)]
    return [*NO_TENSOR, *odd_layouts(x), x.long(), x.float(), x.to("meta"), *shapes]


LOSSES = ("nonsense", 3, {}, (), ("entropy", "nonsense"), ("entropy", "entropy"), ("z", "none"), [3], None)


class Maker:
    """A factory, whatever it is asked for."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def __call__(self, *sizes: int, **options: Any) -> Any:
        return self.made


STATS, OTHER_STATS = (sf.expert_stats(sf.SigmaMoE(4, n, 5, 2), [torch.randn(9, 4)])[""] for n in (6, 5))
FOREIGN = routing.SigmoidRouter(4, 6, 1)  # of other sizes than the layer's
WRONG: dict[str, Sequence[Any] | Callable[[Any], list[Any]]] = {
    **dict.fromkeys(("d_model", "d_ff", "n_experts", "expert_size", "k", "n_sub_keys", "n_heads", "n_iters"), SIZE),
    **dict.fromkeys(("d_out", "query_dim", "n_layers", "n_groups", "topk_groups", "max_tokens", "pad", "d_head"), SIZE),
    **dict.fromkeys(("d_router", "d_latent", "d_state", "ranks", "ranks_per_node", "rank"), SIZE),
    "sizes": (3, "nonsense", [], [3], [(3,)], [(0, 2)], [(3, 1.5)], [("3", 4)], {}, None),
    "scale": (*SCALE, 0.0),
    "active": (*SCALE, 0.0, 7.0),
    "shared_size": (-1, 1.5, math.nan, "2", True, [2], torch.tensor(2)),
    "null_experts": (-1, 1.5, math.nan, "2", True, [2], torch.tensor(2), None),
    "null_share": (*RATE, 0.0, 1.0),
    **dict.fromkeys(("activation", "value_init", "query_norm", "balance_over", "aux", "init", "null_kind"), WORD),
    **dict.fromkeys(("cluster_by", "router_init", "gradients", "rest", "shard", "rank_by"), WORD),
    **dict.fromkeys(("glu", "bias", "norm_aware", "sparse_grad", "sync_balance", "selection_bias", "gated"), FLAG),
    **dict.fromkeys(("projection_bias", "forced", "prefetch", "normalize", "fused", "sync", "mode", "pin"), FLAG),
    **dict.fromkeys(("query_bias", "norm_affine", "balance_cost", "experts", "causal", "refit"), FLAG),
    **dict.fromkeys(("title", "prefix", "package"), TEXT),
    **dict.fromkeys(("dropout", "rotary"), RATE),
    "expert_dropout": (*RATE, 1.0),
    "reinit": RATE,
    "init_scale": SCALE,
    "rate": (*SCALE, 0.0),
    "balance": LOSSES,
    "balance_weight": (*SCALE, (), (1.0, 1.0), (math.nan,)),
    "router": ("nonsense", 3, nn.Linear(4, 6), ["sigmoid"], None, Maker(nn.Identity()),
               Maker(None), routing.SigmoidRouter(4, 5, 2), Maker(FOREIGN)),
    "device": ("nonsense", 1.5, [0], "cuda:x", -1, torch.float32),
    "dtype": (torch.int64, torch.complex64, torch.float8_e4m3fn, "float32", float, np.float32),
    "name": ("fast", "", "CPU", 3, ["cpu"], {}, None),
    "n_out": (-1, 1.5, "3", True, [3], torch.tensor(3)),
    "n_sequences": (-1, 0, 1.5, "3", True, [3], 2),
    "terms": (None, 3, "entropy", (), (("nonsense", 1.0),), (("entropy",),), ("entropy",), (("entropy", math.nan),),
              (("entropy", "1"),), ((3, 1.0),), {"entropy": 1.0}),
    "routing": (None, 3, "nonsense", (1, 2, 3), torch.ones(3)),
    **dict.fromkeys(("x", "keys", "values", "weight", "gate_keys", "key_bias", "first", "second"), floating),
    **dict.fromkeys(("gate", "reduction_weight"), numbers),
    **dict.fromkeys(("index", "expert_index", "gather_index", "scatter_index"), index),
    **dict.fromkeys(("router_input", "value_input"), floating),
    "mask": mask,
    "x_TD": numbers,
    "mask_T": mask,
    "model": MODULE,
    "ffn": (*MODULE, nn.Linear(4, 4)),
    "filter_fn": FUNCTION,
    "batches": (None, 3, nn.Linear(2, 2)),
    "stats": (None, 3, "nonsense", [], {"": 3}, {}, {"nowhere": STATS}, {"": OTHER_STATS}),
    "keep": (0, -1, 0.0, 1.5, math.nan, "0.5", True, [2], torch.tensor(0.5), None, 1, 7),
    "by": ("nonsense", 3, ["error"], {}, None),
    **dict.fromkeys(("scope", "replace"), WORD),
    "protect": (3, "nonsense", ["nonsense"], {"": [6]}, {"": ["0"]}, {"": 0}, [3], [[]]),
    "layer_cls": (None, 3, "SigmaMoE", nn.Linear, nn.Linear(2, 2), sf.SparseFFN, SharedExpertMoE),
    "state_dict": (None, 3, "nonsense", [torch.ones(2)], nn.Linear(2, 2)),
    "shared": (None, 3, nn.Linear(4, 4), sf.DenseFFN(4, 6, d_out=3)),
    "routed": (None, 3, nn.Linear(4, 4), sf.SigmaMoE(6, 6, 5, 2)),
    "ax": (None, 3, "nonsense", nn.Linear(2, 2)),
    "report": (None, 3, "nonsense", {}),
    "path": (None, 3, ["x"]),
    "model_class": (3, "LlamaForCausalLM", nn.Linear, nn.Linear(2, 2)),
    "inputs": lambda x: [*numbers(x), x[:0], x * math.nan],
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- right arguments


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@dataclass(frozen=True)
class Entry:
    """A public callable, arguments that it takes, made anew for each call, and what it refuses beyond ``WRONG``."""

    call: Callable[..., Any]
    right: Callable[[], dict[str, Any]]
    wrong: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    signature: Callable[..., Any] | None = None

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """All arguments, those behind ``**options`` too."""
        return dict(parameters(self.signature or self.call))

    def values(self, argument: str) -> list[Any]:
        given: Any = self.wrong.get(argument, WRONG.get(argument, ()))
        if callable(given):
            given = given(self.right()[argument])
        parameter = self.parameters[argument]
        optional = parameter.default is None or str(parameter.annotation).endswith("None")
        return [value for value in given if value is not None or not optional]


def parameters(call: Callable[..., Any]) -> Iterator[tuple[str, inspect.Parameter]]:
    for name, parameter in inspect.signature(call).parameters.items():
        if name != "self":  # of an option that a part has the part says more
            yield name, inspect.signature(sf.MoE).parameters[name] if parameter.default is ... else parameter


MOE = {"d_model": 4, "n_experts": 6, "expert_size": 5, "k": 2}
TOKENS, REAL = torch.randn(3, 4), torch.ones(3, dtype=torch.bool)
SIZES: dict[type, dict[str, Any]] = {
    sf.SparseFFN: {"d_model": 4, "d_out": 4, "activation": "relu", "dropout": 0.1, "init_scale": 1.0, "n_layers": None,
                   "bias": True, "device": None, "dtype": None},
    sf.DenseFFN: {"d_model": 4, "d_ff": 6},
    sf.TopKFFN: {"d_model": 4, "d_ff": 6, "k": 2},
    sf.ProductKeyMemory: {"d_model": 4, "n_sub_keys": 3, "k": 2, "query_dim": 2},
    sf.MoE: {**MOE, "router": routing.SinkhornRouter},
    **dict.fromkeys((sf.SigmaMoE, sf.SoftmaxMoE, sf.SwitchMoE, sf.SBaseMoE, sf.NoisyTopKMoE), MOE),
    LatentMoE: {**MOE, "d_latent": 3},
    LowRankMoE: {**MOE, "rank": 2},
    MixedMoE: {"d_model": 4, "sizes": [(4, 5), (2, 4)], "k": 2},
}  # fmt: skip
SMALL = {"d_model": 4, "n_experts": 6, "k": 2}
ROUTERS = (
    routing.Router, routing.SigmoidRouter, routing.SoftmaxRouter, routing.SoftmaxTopKRouter, routing.SinkhornRouter,
    routing.NoisyTopKRouter, routing.UnweightedRouter, routing.DeepSeekRouter, routing.LongCatRouter,
    routing.ReLURouter,
)  # fmt: skip
CONFIGS: dict[type, dict[str, Any]] = {
    sf.DenseFFNConfig: {}, sf.TopKFFNConfig: {"k": 2}, sf.ProductKeyMemoryConfig: {"k": 2},
    **{cls: {"k": 2} for cls in (sf.MoEConfig, sf.SigmaMoEConfig, sf.SoftmaxMoEConfig, sf.SwitchMoEConfig,
                                 sf.SBaseMoEConfig, sf.NoisyTopKMoEConfig, convert.LowRankMoEConfig)},
}  # fmt: skip
OPEN = sf.MoEConfig(router="unweighted", expert_size=4, k=2)
PAPERS = {"keys": torch.randn(3, 4, 5), "values": torch.randn(3, 5, 4), "expert_sel": torch.randn(3, 4)}
MIXTRAL = {"model_type": "mixtral", "num_experts_per_tok": 2, "hidden_act": "silu"}
BLOCK = {
    "gate.weight": torch.randn(3, 4), "experts.gate_up_proj": torch.randn(3, 10, 4),
    "experts.down_proj": torch.randn(3, 4, 5),
}  # fmt: skip


def routed(layer: sf.MoE) -> sf.MoE:
    layer(TOKENS)
    return layer


def forced(name: str) -> None:
    with sf.backend(name):
        pass


def with_pooled(model: nn.Module) -> None:
    with sf.pooled_balance(model):
        pass


def with_inner_first(model: nn.Module) -> None:
    with peft.inner_first(model):
        pass


def set_k(module: Any, k: int) -> None:
    module.k = k


def set_option(module: Any, **option: Any) -> None:
    [(name, value)] = option.items()
    setattr(module, name, value)


def settable(cls: type) -> list[str]:
    """The properties of a class that may be set."""
    static = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    return [name for name, value in static.items() if isinstance(value, property) and value.fset is not None]


@functools.cache
def entries() -> dict[str, Entry]:
    found: dict[str, Entry] = {}

    def add(
        name: str, call: Callable[..., Any], right: Callable[[], dict[str, Any]] | dict[str, Any], **more: Any
    ) -> None:
        found[name] = Entry(call, right if callable(right) else lambda: dict(right), **more)

    for cls, sizes in SIZES.items():
        add(cls.__name__, cls, sizes)
        made = cls(**sizes)
        for option in settable(cls):
            if (cls, option) != (sf.DenseFFN, "k"):
                add(f"{cls.__name__}.{option}", functools.partial(set_option, made), {option: getattr(made, option)},
                    wrong={"k": (*SIZE, 99), "balance_weight": (-1.0, math.nan, math.inf, "1", None, (1.0, 2.0))},
                    signature=inspect.getattr_static(cls, option).fset)  # fmt: skip
        if cls is sf.SparseFFN:
            continue
        tensors = {"x": TOKENS, "mask": REAL}
        mixture = issubclass(cls, (Balanced, LatentMoE))
        if mixture:
            tensors["router_input"] = TOKENS + 1
        layer = cls(**{**sizes, "dropout": 0.5})
        layer(TOKENS)  # what it left behind must stay, too
        add(f"{cls.__name__}.forward", layer.forward, tensors,
            wrong={} if mixture else {"router_input": ()})  # fmt: skip
    add("MixedMoE.flops_per_token", MixedMoE(**SIZES[MixedMoE]).flops_per_token, {"load": torch.ones(6) / 6},
        wrong={"load": (*NO_TENSOR[:-1], torch.ones(4), torch.ones(6, 1), torch.ones(6).to_sparse())})  # fmt: skip
    offloaded = sf.SigmaMoE(**MOE).eval()
    sf.offload_experts_(offloaded, cache=3, device="cpu")
    add("MoE.prefetch", offloaded.prefetch, {"x": TOKENS, "router_input": TOKENS + 1})
    for cls in ROUTERS:
        add(cls.__name__, cls, SMALL)
        router = cls(**SMALL)
        if cls is not routing.Router:
            add(f"{cls.__name__}.forward", router.forward, {"x_TD": TOKENS, "mask_T": REAL})
        for option in settable(cls):
            add(f"{cls.__name__}.{option}", functools.partial(set_option, router), {option: getattr(router, option)},
                wrong={"k": (*SIZE, 99)}, signature=inspect.getattr_static(cls, option).fset)  # fmt: skip
    for cls, given in CONFIGS.items():
        add(cls.__name__, cls, given, wrong={"router": ("nonsense", 3, ["sigmoid"], nn.Linear(2, 2), FOREIGN, None)})
    shared = {"routed": sf.SigmaMoE(**MOE, dropout=0.5), "shared": sf.DenseFFN(4, 6, dropout=0.5)}
    add("SharedExpertMoE", SharedExpertMoE, shared)
    both = SharedExpertMoE(**shared, gated=True)
    add("SharedExpertMoE.forward", both.forward, {"x": TOKENS, "mask": REAL, "router_input": TOKENS + 1})
    add("SharedExpertMoE.k", functools.partial(set_k, both), {"k": 2}, wrong={"k": (*SIZE, 99)})

    chain = routing.RouterChain(4, 3, 2)
    add("RouterChain", routing.RouterChain, {"d_model": 4, "d_state": 3, "n_layers": 2}, wrong={"n_layers": SIZE})
    add("RouterChain.forward", chain.forward, {"x": TOKENS, "state": torch.randn(3, 3), "layer": 1},
        wrong={"x": numbers(TOKENS), "state": numbers(torch.randn(3, 3)),
               "layer": (-1, 2, 1.5, "1", True, [1], None)})  # fmt: skip

    heads = {"d_model": 4, "n_heads": 2, "n_experts": 3}
    add("SwitchHeadAttention", SwitchHeadAttention, heads, wrong={"k": (*SIZE, 4), "expert_dropout": (*RATE, 1.0)})
    attention = SwitchHeadAttention(**heads, dropout=0.5)
    add("SwitchHeadAttention.forward", attention.forward,
        {"x": TOKENS, "router_input": TOKENS + 1, "value_input": TOKENS + 2, "mask": REAL})  # fmt: skip
    add("SwitchHeadAttention.k", functools.partial(set_k, attention), {"k": 2}, wrong={"k": (*SIZE, 4)})
    for option in ("dropout", "expert_dropout", "rotary"):
        add(f"SwitchHeadAttention.{option}", functools.partial(set_option, attention),
            {option: getattr(attention, option)},
            signature=inspect.getattr_static(SwitchHeadAttention, option).fset)  # fmt: skip

    rows = torch.tensor([0, 2, 1])
    add("cvmm", functional.cvmm, {
        "x": TOKENS, "weight": torch.randn(4, 4, 3), "expert_index": rows, "gather_index": rows,
        "scatter_index": rows, "reduction_weight": torch.rand(3), "n_out": 3,
    }, wrong={"weight": free(torch.randn(4, 4, 3)), "expert_index": free(rows)})  # fmt: skip
    ffn = {"keys": torch.randn(4, 5, 4), "values": torch.randn(4, 5, 3), "gate_keys": torch.randn(4, 5, 4)}
    slots = {"index": torch.tensor([[0, 1], [2, 3], [3, 1]]), "gate": torch.rand(3, 2)}
    add("expert_ffn", functional.expert_ffn, {"x": TOKENS, **ffn, **slots, "key_bias": torch.randn(4, 5)},
        wrong={"values": free(ffn["values"])})  # fmt: skip
    add(
        "weighted_bag",
        functional.weighted_bag,
        {"values": torch.randn(4, 3), "index": slots["index"], "weight": torch.rand(3, 2)},
        wrong={"weight": numbers(torch.rand(3, 2)), "values": [v for v in free(torch.randn(4, 3)) if not is_double(v)]},
    )
    add("product_key_topk", functional.product_key_topk,
        {"first": torch.randn(2, 3), "second": torch.randn(2, 3), "k": 2}, wrong={"k": (*SIZE, 10)})  # fmt: skip
    units = {"keys": torch.randn(6, 4), "values": torch.randn(6, 3), "gate_keys": torch.randn(6, 4)}
    add("topk_ffn", functional.topk_ffn, {"x": TOKENS, **units, "k": 2, "key_bias": torch.randn(6)},
        wrong={"k": (*SIZE, 7), "values": free(units["values"])})  # fmt: skip

    add("aux_loss", sf.aux_loss, lambda: {"model": sf.SigmaMoE(**MOE)})
    add("routing_stats", sf.routing_stats, lambda: {"model": sf.SigmaMoE(**MOE)})
    add("update_router_bias", sf.update_router_bias, lambda: {"model": routed(sf.SigmaMoE(**MOE, balance="bias"))})
    add("RoutingMeter", sf.RoutingMeter, lambda: {"model": sf.SigmaMoE(**MOE)})
    add("RoutingMeter.stats", sf.RoutingMeter(sf.SigmaMoE(**MOE)).stats, {"sync": False})
    add("pooled_balance", with_pooled, lambda: {"model": sf.SigmaMoE(**MOE)}, signature=sf.pooled_balance)
    add("router_parameters", sf.router_parameters, lambda: {"model": sf.SigmaMoE(**MOE)})
    add("routing_agreement", sf.routing_agreement,
        lambda: {"first": sf.SigmaMoE(**MOE), "second": sf.SigmaMoE(**MOE), "batch": TOKENS},
        wrong={"first": MODULE, "second": MODULE, "batch": ()})  # fmt: skip
    add("parameter_equal", sf.parameter_equal, {"layer_cls": sf.TopKFFN, "d_model": 4, "d_ff": 6, "k": 2})
    add("backend", forced, {"name": "torch"}, signature=sf.backend)
    add("chosen", info.chosen, {"device": "cpu"})
    add("report", info.report, {})
    add("version", info.version, {"package": "torch"})

    add("sparsify_", sf.sparsify_, lambda: {
        "model": nn.Sequential(Mlp()), "config": OPEN, "calibration": {"0": torch.randn(9, 4)},
    }, wrong={
        "config": (None, 3, "SigmaMoEConfig", sf.SigmaMoEConfig, {"0": 3}, {"nowhere": OPEN}, [OPEN]),
        "calibration": (3, "nonsense", torch.ones(9, 4), {"0": [1.0]}, *(
            {"0": value} for value in WRONG["inputs"](torch.randn(9, 4)) if isinstance(value, Tensor))),  # type: ignore[operator]
    })  # fmt: skip
    add("from_dense", sf.from_dense, lambda: {"ffn": Mlp(), "config": OPEN, "inputs": torch.randn(9, 4)},
        wrong={"config": (None, 3, "SigmaMoEConfig", sf.SigmaMoEConfig, {})})  # fmt: skip
    add("to_dense", sf.to_dense, {"layer": sf.DenseFFN(4, 6)}, wrong={"layer": MODULE})
    add("calibrate", sf.calibrate, lambda: {"model": nn.Sequential(Mlp()), "batches": [TOKENS]})
    add("expert_stats", sf.expert_stats, lambda: {"model": sf.SigmaMoE(**MOE), "batches": [TOKENS]})
    add("prune_experts_", sf.prune_experts_, lambda: {"model": sf.SigmaMoE(**MOE), "stats": {"": STATS}, "keep": 0.5})
    add("compress_experts_", compress.compress_experts_,
        lambda: {"model": nn.Sequential(sf.SigmaMoE(**MOE)), "rank": 2, "iterations": 1},
        wrong={"rank": (*SIZE, 5), "iterations": (-1, 1.5, "3", True, [3], None)})  # fmt: skip
    add("map_experts_", sf.map_experts_, lambda: {"model": sf.SigmaMoE(**MOE), "path": stored()})
    add(
        "offload_experts_",
        sf.offload_experts_,
        lambda: {"model": sf.SigmaMoE(**MOE), "cache": 3, "device": "cpu"},
        wrong={"cache": (0, -1, 1, 1.5, 0.0, math.nan, "2", True, [2], None), "device": (*WRONG["device"], "meta")},
    )  # type: ignore[misc]
    add("offload_stats", sf.offload_stats, lambda: {"model": sf.SigmaMoE(**MOE)})
    add("quantize_experts_", sf.quantize_experts_, lambda: {
        "model": sf.SigmaMoE(**MOE), "config": sf.ExpertQuantization(group_size=None), "batches": [TOKENS],
    }, wrong={"config": (3, "nonsense", sf.ExpertQuantization, {"bits": 4})})  # fmt: skip
    add("quantization_error", compress.quantization_error,
        {"layer": sf.SigmaMoE(**MOE), "config": sf.ExpertQuantization(group_size=None), "inputs": TOKENS},
        wrong={"layer": (*MODULE, sf.DenseFFN(4, 6)), "config": (3, "nonsense", sf.ExpertQuantization, {"bits": 4}),
               "inputs": [*NO_TENSOR, TOKENS[:, :3], TOKENS[:0], TOKENS.long(), TOKENS.to_sparse()]})  # fmt: skip
    real = (math.inf, math.nan, "1", True, [1.0], 1j, None)
    add("polynomial_units_", compress.polynomial_units_,
        lambda: {"layer": sf.DenseFFN(4, 6), "a": 0.5, "b": 1.0, "c": 0.1},
        wrong={"layer": (*MODULE, nn.Linear(4, 4)), "a": (*real, 0.0), "b": real, "c": real})  # fmt: skip
    blocks = (3, "ab", (3,), (0, 2), (3, 1.5), (4, 2), None)
    add("block_mask_", compress.block_mask_, lambda: {"layer": sf.DenseFFN(4, 6), "share": 0.5, "block": (3, 2)},
        wrong={"layer": (*MODULE, nn.Linear(4, 4)), "share": RATE, "block": blocks})  # fmt: skip
    add("dequantize_experts_", sf.dequantize_experts_, lambda: {"model": sf.SigmaMoE(**MOE)})
    add("ExpertQuantization", sf.ExpertQuantization, {}, wrong={
        "bits": (3, 16, "4", 4.0, True, None), "values_bits": (2, "8", 8.0), "symmetric": FLAG,
        "group_size": (0, -8, 1.5, "wide", True, [8]), "scale": (*WORD, "Max"),
    })  # fmt: skip
    add("config_from_dict", convert.config_from_dict, {"values": OPEN.to_dict()}, wrong={"values": (
        None, 3, "nonsense", [("config", "MoEConfig")], {"config": "nonsense"}, {"config": "MoEConfig", "gain": 1},
    )})  # fmt: skip
    add("ConstantInput", convert.ConstantInput, {"pad": 4})
    add("ConstantInput.forward", convert.ConstantInput(4).forward, {"x": TOKENS},
        wrong={"x": (*NO_TENSOR, *odd_layouts(TOKENS), torch.tensor(1.0))})  # fmt: skip
    add("from_moe_layer", integrations.from_moe_layer, {"state_dict": PAPERS, "k": 2, "prefix": ""},
        wrong={"k": (*SIZE, 9)})  # fmt: skip
    xlm = {"keys": torch.randn(2, 2, 3, 2), "values.weight": torch.randn(9, 4), f"{QUERY}.weight": torch.randn(8, 4)}
    pkm = {"keys": torch.randn(2, 3, 2, 2), "values.weight": torch.randn(9, 4), "to_queries.weight": torch.randn(8, 4),
           "norm.weight": torch.ones(2), "norm.bias": torch.zeros(2)}  # fmt: skip
    for name, theirs in (("from_xlm", xlm), ("from_product_key_memory", pkm)):
        add(name, getattr(integrations, name), {"state_dict": theirs, "k": 2, "prefix": ""}, wrong={"k": (*SIZE, 10)})
    add("config_of", convert.config_of, {"layer": sf.DenseFFN(4, 6)}, wrong={"layer": MODULE})
    add("to_moe_layer", integrations.to_moe_layer, {"layer": sf.SigmaMoE(**MOE)}, wrong={"layer": MODULE})
    wrong_words = ({**MIXTRAL, word: "nonsense"} for word in ("model_type", "hidden_act"))
    foreign = (None, 3, "mixtral", [], {"model_type": None}, *wrong_words)
    add("from_transformers", integrations.from_transformers, {"state_dict": BLOCK, "config": MIXTRAL},
        wrong={"config": foreign})  # fmt: skip
    add("to_transformers", integrations.to_transformers,
        lambda: {"layer": integrations.from_transformers(BLOCK, MIXTRAL), "config": MIXTRAL},
        wrong={"layer": MODULE, "config": foreign})  # fmt: skip

    decided = Routing(torch.randn(3, 6), torch.randint(0, 6, (3, 2)), torch.rand(3, 2))
    add("balance_loss", routing.balance_loss,
        {"routing": decided, "terms": (("entropy", 1.0),), "mask_T": REAL, "n_sequences": 3})  # fmt: skip
    layer = routed(sf.SigmaMoE(**MOE))
    for drawn in ("plot_load", "plot_coactivation"):
        add(drawn, getattr(plot, drawn), lambda: {"ax": axes(), "layer": layer}, wrong={"layer": MODULE})
    add("routing_figure", plot.routing_figure, {"model": layer})
    for name, call, right in of_transformers() if hf else ():
        add(name, call, right)
    styles = {"experts": parallel.ExpertParallel(), "hidden": None, "memory": None}
    no_style = {name: (3, "nonsense", nn.Linear(2, 2), parallel.ExpertParallel) for name in styles}
    lies = (None, 3, "Shard(0)", Shard(1), [Shard(0)])
    add("ExpertParallel", parallel.ExpertParallel, {"exchange": "auto", "input_layouts": Shard(0)},
        wrong={"exchange": ("nonsense", 3, None, nn.Linear), "input_layouts": lies})  # fmt: skip
    add("HiddenParallel", parallel.HiddenParallel, {"input_layouts": Shard(0)}, wrong={"input_layouts": lies})
    add("MemoryParallel", parallel.MemoryParallel, {"shard": "rows"})
    add("plan", parallel.plan, {"model": sf.SigmaMoE(**MOE), **styles}, wrong=no_style)
    add("traffic", parallel.traffic,
        {"layer": sf.SigmaMoE(**MOE), "tokens": 3, "ranks": 2, "ranks_per_node": 8, "dtype": torch.float32},
        wrong={"layer": (*MODULE, sf.DenseFFN(4, 6)), "tokens": (-1, 1.5, "3", True, [3], None)})  # fmt: skip
    add("register_exchange", parallel.register_exchange, {"name": "gather", "cls": parallel.exchanges.GatherExchange},
        wrong={"name": ("", "auto", "two words", 3, None), "cls": (None, 3, "gather", nn.Linear)})  # fmt: skip
    add("clip_grad_norm_", parallel.clip_grad_norm_,
        lambda: {"parameters": trained_parameters(), "max_norm": 0.5, "norm_type": 2.0},
        wrong={"parameters": (None, 3, "nonsense", [3], nn.Linear(2, 2)), "foreach": FLAG,
               "max_norm": (-1.0, math.nan, "1", True, [1.0], 1j, None),
               "norm_type": (-1.0, 0.0, math.nan, "2", [2.0], None), "error_if_nonfinite": FLAG,
               "pp_group": ("nonsense", 3, True)})  # fmt: skip
    add("inner_first", with_inner_first, {"model": nn.Linear(2, 2)}, signature=peft.inner_first)
    return found


FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def stored() -> str:
    """A file with a layer's weights, in a folder that goes with the process."""
    path = f"{FOLDER.name}/layer.pt"
    torch.save(sf.SigmaMoE(**MOE).state_dict(), path)
    return path


def trained_parameters() -> list[nn.Parameter]:
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    return list(layer.parameters())


def is_double(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.double


def of_transformers() -> Iterator[tuple[str, Callable[..., Any], Callable[[], dict[str, Any]]]]:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=9, **sizes))
    report = sf.sparsify_(model, OPEN)
    yield "record_conversion", hf.record_conversion, lambda: {"model": model, "report": report}
    yield "mask_padding", hf.mask_padding, lambda: {"model": copy.deepcopy(model)}
    folder = tempfile.TemporaryDirectory()  # removed with the last reference, which is in the table
    hf.record_conversion(model, report)
    model.save_pretrained(folder.name)
    yield "from_pretrained", hf.from_pretrained, lambda folder=folder: {"path": folder.name}


def axes() -> Any:
    from matplotlib.figure import Figure

    return Figure().subplots()


EXEMPT = {
    "SparseFFNWarning": "a warning's class",
    "Report": "a result of sparsify_",
    "QuantizationReport": "a result of quantize_experts_",
    "QuantizedLayer": "as QuantizationReport",
    "ExpertQuantization.bits_of": "called by quantize_experts_ with what it found",
    "ExpertQuantization.group_of": "as bits_of",
    "ExpertQuantization.symmetric_at": "as bits_of",
    "Replacement": "a result of sparsify_",
    "ExpertStats": "a result of expert_stats; prune_experts_ checks it",
    "PruningReport": "a result of prune_experts_",
    "PrunedLayer": "as PruningReport",
    "CompressionReport": "a result of compress_experts_",
    "CompressedLayer": "as CompressionReport",
    "FFNConfig": "the configs' base: what it checks is tried on each of them",
    "ExpertsConfig": "as FFNConfig",
    "Routing": "a result of routers; the layer and balance_loss check it",
    **{f"{name}(example_inputs)": "the model's own business, if it is asked" for name in ("sparsify_", "calibrate")},
    "SparseFFN.forward": "tried on each layer",
    "SparseFFN(extra_activations)": "for subclasses",
    **{
        f"{name}.forward(router_input)": "no right value: test_contract.py"
        for name in ("DenseFFN", "TopKFFN", "ProductKeyMemory")
    },
    **{f"{name}MoE.prefetch": "MoE's" for name in ("Sigma", "Softmax", "Switch", "SBase", "NoisyTopK")},
    "Router.forward": "the base has no gate; tried on each router",
    "from_pretrained(options)": "transformers' own arguments, handed on",
    "from_moe_layer(options)": "MoE's own arguments, handed on",
    "from_xlm(options)": "ProductKeyMemory's own arguments, handed on",
    "from_product_key_memory(options)": "as from_xlm",
    "from_transformers(options)": "MoE's own arguments, handed on",
    "routing_agreement(batch)": "the model's own argument, handed on",
    "parameter_equal(choices)": "the layer's own arguments, handed on",
    "Traffic": "a result of traffic",
    "Exchange": "made by ExpertParallel",
    "Exchange.dispatch": "called by a layer with what its router gave",
    "Exchange.combine": "as Exchange.dispatch",
    "shard_placement_fn": "takes meshes of processes: test_parallel_training.py",
    "ddp_ignore": "as shard_placement_fn",
    "ProductKeyMemory.param_groups": "the optimizer's options, which it checks",
}
HOOKS = {
    "train": "torch checks the argument of its own method",
    "perturb": "called by Router.forward with tensors of its own",
    "rank": "as perturb",
    "limit": "as perturb",
    "select": "as perturb",
    "gate": "as perturb",
    "count": "called by the layer with what its router gave",
    "count_active": "as count",
    "add_load": "as count",
    "adapt": "called by update_router_bias with what the router counted",
    "resolve": "called by sparsify_ with what it found",
    "make": "as resolve",
}


# ------------------------------------------------------------------------------------------------------- the tests


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All public callables: functions, constructors, methods, and setters of properties."""
    for module in (
        sf,
        functional,
        routing,
        compress,
        convert,
        integrations,
        layers,
        parallel,
        plot,
        info,
        peft,
        *([hf] if hf else []),
    ):
        for name, value in vars(module).items():
            home = getattr(value, "__module__", "")
            offers_others = hasattr(module, "__path__") or module is hf
            own = home.startswith("sparse_ffn") if offers_others else home == module.__name__
            if name.startswith("_") or not callable(value) or not own:
                continue
            yield name, value
            if isinstance(value, type):
                yield from methods(value)


def methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property) and value.fset is not None:
            yield f"{cls.__name__}.{name}", value.fset
        of_ours = str(getattr(value, "__module__", "")).startswith("sparse_ffn")
        if not name.startswith("_") and inspect.isfunction(value) and of_ours and len(dict(parameters(value))):
            yield f"{cls.__name__}.{name}", value


CELLS = [
    (name, argument) for name, entry in entries().items() for argument in entry.parameters if entry.values(argument)
]


def test_every_argument_of_everything_public_has_wrong_values_or_a_reason() -> None:
    cells, missing = set(CELLS), []
    for name, call in public():
        if name in EXEMPT or name.rpartition(".")[2] in HOOKS:
            continue
        missing += [
            f"{name}({argument})"
            for argument in dict(parameters(call))
            if (name, argument) not in cells and f"{name}({argument})" not in EXEMPT
        ]
    assert not missing


def test_no_exemption_is_left_over() -> None:
    names = dict(public())
    for exempt in EXEMPT:
        name, _, argument = exempt.rstrip(")").partition("(")
        assert name in names
        assert not argument or argument in dict(parameters(names[name]))


@pytest.mark.parametrize("name", entries())
def test_the_right_arguments_are_right(name: str) -> None:
    entry = entries()[name]
    entry.call(**entry.right())


@pytest.mark.parametrize(("name", "argument"), CELLS, ids=[f"{name}({argument})" for name, argument in CELLS])
def test_wrong_values_are_refused_in_a_sentence_and_change_nothing(name: str, argument: str) -> None:
    entry = entries()[name]
    spoken = re.sub("_[A-Z]+$", "", argument)  # sentences leave the suffix of the shape out
    problems = []
    for value in entry.values(argument):
        arguments = {**entry.right(), argument: value}
        before = state(entry, arguments)
        shown = f"{type(value).__name__} {str(value)[:60]}"
        try:
            entry.call(**arguments)
        except (TypeError, ValueError, IndexError) as error:
            sentence = str(error)
            if not re.search(rf"\b{spoken}\b", sentence):
                problems.append(f"{shown}: does not name it: {type(error).__name__}: {sentence}")
            elif not any(words in sentence for words in described(value)):
                problems.append(f"{shown}: does not tell the value: {sentence}")
        except Exception as error:
            problems.append(f"{shown}: {type(error).__name__}: {error}")
        else:
            problems.append(f"{shown}: taken")
        if state(entry, arguments) != before:
            problems.append(f"{shown}: something changed")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--seconds", value) for value in ("nan", "-1", "0", "inf", "soon")),
        *(("--device", value) for value in ("nonsense", "cuda:x", "")),
        ("--dtype", "int8"),
        ("--kernels", "three"),
    ],
)
def test_wrong_options_of_tuning_are_refused_in_a_sentence(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tune([option, value, "--dry-run"])
    assert ended.value.code == 2
    sentence = capsys.readouterr().err
    assert f"argument {option}: " in sentence
    assert repr(value) in sentence


NUMBERS = [
    (name, argument)
    for name, entry in entries().items()
    for argument, parameter in entry.parameters.items()
    if type(entry.right().get(argument, parameter.default)) in (int, float)
]


@pytest.mark.parametrize(("name", "argument"), NUMBERS, ids=[f"{name}({argument})" for name, argument in NUMBERS])
def test_numpy_scalars_are_taken_and_plain_numbers_kept(name: str, argument: str) -> None:
    entry = entries()[name]
    value = entry.right().get(argument, entry.parameters[argument].default)
    for kind in (np.int64, np.uint16) if type(value) is int else (np.float64, np.float32, np.float16):
        made = entry.call(**{**entry.right(), argument: kind(value)})
        kept = made.get(argument, value) if isinstance(made, dict) else getattr(made, argument, value)
        for number in kept if isinstance(kept, tuple) else (kept,):
            assert type(number) is type(value)
            assert number == pytest.approx(value, rel=1e-3)


def described(value: Any) -> set[str]:
    """Words of which a sentence about a wrong value must have one."""
    words = {repr(value), type(value).__name__, getattr(value, "__name__", repr(value))}
    if isinstance(value, Tensor):
        words |= {str(value.dtype).removeprefix("torch."), str(value.device), str(value.layout).removeprefix("torch.")}
        if value.layout == torch.strided:
            words.add(str(list(value.shape)))
        if value.layout == torch.strided and value.device.type == "cpu" and value.dtype == torch.int64:
            words |= {str(value.min().item()), str(value.max().item())}
        words |= {"finite", "to fit"}
    if isinstance(value, (list, tuple, dict)):
        members = [*value, *value.values()] if isinstance(value, dict) else value
        words |= {word for member in members for word in described(member)}
    if isinstance(value, Maker):
        words |= described(value.made)
    if isinstance(value, routing.Router):
        words.add(str((value.d_model, value.n_experts, value.k)))
    if isinstance(value, sf.SparseFFN):
        words.add(str((value.d_model, value.d_out)))
    return words


def state(entry: Entry, arguments: dict[str, Any]) -> Any:
    """All that an error must leave as it was."""
    random_states = torch.get_rng_state().numpy().tobytes(), random.getstate()
    owner = getattr(entry.call, "__self__", None) or getattr(entry.call, "args", None)
    return random_states, torch.get_default_dtype(), sf.backends.choice._forced, look(owner), look(arguments)


def look(value: Any) -> Any:
    """What a value holds, so that two looks compare equal only if nothing changed."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            return id(value)
        numbers = repr(value.detach().tolist())
        return id(value), value._version, value.dtype, tuple(value.shape), value.requires_grad, value.grad, numbers
    if isinstance(value, nn.Module):
        return id(value), look(value.__dict__)
    if isinstance(value, Mapping):
        return [(key, look(member)) for key, member in value.items()]
    if isinstance(value, (list, tuple)):
        return [look(member) for member in value]
    return repr(value) if isinstance(value, (bool, int, float, str)) else id(value)
