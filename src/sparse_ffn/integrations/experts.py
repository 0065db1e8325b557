"""The experts of transformers' MoE models, computed by this library's kernels."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sparse_ffn import ops
from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.checks import shown
from sparse_ffn.layers.rows import ExpertRows, OffloadedRows

NAME = "sparse_ffn"
MOE = re.compile(r"(Experts|Mo[eE](Block|Layer)?|SparseMLP)$")
"""What transformers calls its classes of experts and of the blocks that hold them."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def register() -> None:
    """Offer the kernels to the MoE models of transformers 5 as the experts implementation ``"sparse_ffn"``.

    Choose it with ``from_pretrained(..., experts_implementation="sparse_ffn")`` or, at any time, with
    ``model.set_experts_implementation("sparse_ffn")``. The model keeps its router, parameters and checkpoint format;
    outputs and gradients are those of the ``"eager"`` implementation to rounding. A few families compute their experts
    themselves, whatever is chosen (Llama 4, Switch, ...): for these it is a ``SparseFFNWarning``. Where transformers
    splits experts over processes, ``DistributedConfig(ep_implementation="sparse_ffn")`` brings tokens to them by this
    library's exchanges, with any experts implementation (transformers 5.24 has the interface, older versions do not).
    Calling this again changes nothing.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    _leave_codes_alone()
    _register_expert_parallelism()
    _call_after("post_init", _check_made)
    _call_after("set_experts_implementation", _check_chosen)


def _leave_codes_alone() -> None:
    """Let experts of transformers' own 8-bit floats compute as they do, where the rest of a model chooses ours."""
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:  # of other versions
        return
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _own_forward)


def _own_forward(experts: Any, *args: Any, **kwargs: Any) -> Any:
    return type(experts).forward.__wrapped__(experts, *args, **kwargs)


def _register_expert_parallelism() -> None:
    if not torch.distributed.is_available():
        return
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:
        return
    from sparse_ffn.integrations.expert_parallel import TokenExchange

    EPImplementationInterface.register(NAME, TokenExchange)


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a module of experts computes, in two products: up (with its gate's half) and down.

    Between them the model's own code runs, so that every activation, clamp, bias and norm is the model's.

    Args:
        experts: the module, in transformers' convention: ``gate_up_proj`` (``up_proj`` where ``has_gate`` is False) and
            ``down_proj``, stacks of [out, in] matrices ([in, out] where ``is_transposed``), perhaps with ``*_bias``.
        hidden_states: [T, D].
        top_k_index: int64 [T, K]; n_experts stands for none, as for an expert of another process: such a slot adds 0.
        top_k_weights: [T, K].

    Returns:
        [T, D] in the dtype of ``hidden_states``.

    Raises:
        ValueError: the weights' shape is not the indices'.
    """
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(f"top_k_weights must have the shape of top_k_index, {list(top_k_index.shape)}, "
                         f"got {list(top_k_weights.shape)}")  # fmt: skip
    names = stack_names(experts)
    stacks = {name: getattr(experts, name) for name in names}
    biases = {name: getattr(experts, f"{name}_bias") for name in names if experts.has_bias}
    down = stacks["down_proj"]
    if not isinstance(down, OffloadedRows):
        return _ffn(experts, stacks, biases, hidden_states, top_k_index, top_k_weights)

    def of_cache(stacks: dict[str, Any], place: Tensor, expert: Tensor) -> Tensor:
        here = {name: bias[expert] for name, bias in biases.items()}
        return _ffn(experts, stacks, here, hidden_states, place, top_k_weights)

    return down.in_waves(top_k_index, of_cache, hidden_states, top_k_weights, *biases.values())


def _ffn(
    experts: Any, stacks: dict[str, Any], biases: dict[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """The experts' function with these stacks and biases in the place of their own: [T, D]."""
    (tokens, k), expert, weight = index_TK.shape, index_TK.reshape(-1), weight_TK.reshape(-1, 1)
    token = torch.arange(tokens * k, device=expert.device) // k

    def product(name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        """Each slot's row of x times its expert's matrix, plus its bias: [slots, out]."""
        matrices = stacks[name]
        if isinstance(matrices, ExpertRows):
            up = name != "down_proj"
            y = matrices.up(x, expert, rows) if up else matrices.down(x, expert, None, None, expert.shape[0])
        else:
            y = ops.cvmm(x.to(matrices.dtype), matrices if experts.is_transposed else matrices.mT, expert, gather=rows)
        return y + F.pad(biases[name], (0, 0, 0, 1))[expert] if name in biases else y  # of no expert: zero

    if "gate_up_proj" in stacks:
        h = experts._apply_gate(product("gate_up_proj", x_TD, token))
    else:
        h = experts.act_fn(product("up_proj", x_TD, token))
    y = product("down_proj", h, None)
    if _flag(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    return (y * weight).view(tokens, k, y.shape[1]).sum(1).to(x_TD.dtype)


def stack_names(experts: Any) -> tuple[str, str]:
    """What transformers calls the two stacks of some experts."""
    return ("gate_up_proj" if _flag(experts, "has_gate", True) else "up_proj"), "down_proj"


def _flag(experts: Any, name: str, default: bool) -> bool:
    """A fact about the experts; versions of transformers that do not state it have the default."""
    return bool(getattr(experts, name, default))


def dispatches(module: nn.Module) -> bool:
    """Whether these are experts that ask for the implementation: transformers tells such ones how their weights lie.

    Those of its own quantisation ask another registry, and hold codes.
    """
    if not hasattr(module, "is_transposed"):
        return False
    stacks = (getattr(module, name, None) for name in stack_names(module))
    return not any(isinstance(stack, Tensor) and stack.dtype not in FLOATS for stack in stacks)


def stores_rows(module: nn.Module) -> bool:
    """Whether these are such experts as stored rows, with which only our implementation computes."""
    return dispatches(module) and any(isinstance(child, ExpertRows) for child in module.children())


def _moe_modules(module: nn.Module, submodels: bool) -> Iterator[nn.Module]:
    """The outermost MoE modules, those of models within the model only with ``submodels``."""
    for child in module.children():
        if MOE.search(type(child).__name__) or dispatches(child):
            yield child
        elif submodels or not isinstance(child, transformers.PreTrainedModel):
            yield from _moe_modules(child, submodels)


def _check_made(model: Any) -> None:
    if getattr(model.config, "_experts_implementation", None) == NAME:
        _warn_of_bypass(model, submodels=False)  # the models within have warned themselves


def _check_chosen(model: Any, experts_implementation: str | dict[str, str]) -> None:
    chosen = experts_implementation
    configs: list[Any] = [module.config for module in model.modules() if stores_rows(module)]
    if others := [config for config in configs if config._experts_implementation != NAME]:
        for config in others:
            config._experts_implementation = NAME  # as it was
        raise ValueError(
            f"experts_implementation must be {NAME!r} for experts that are stored rows, got {shown(chosen)}: call "
            "dequantize_experts_ first"
        )
    if NAME in (chosen.values() if isinstance(chosen, dict) else (chosen,)):
        _warn_of_bypass(model, submodels=True)


def _warn_of_bypass(model: nn.Module, submodels: bool) -> None:
    """Warn of MoE modules that compute their experts themselves, whatever implementation is chosen."""
    modules = _moe_modules(model, submodels)
    if classes := {type(m).__name__ for m in modules if not any(map(dispatches, m.modules()))}:
        warnings.warn(
            f"in {type(model).__name__} {', '.join(sorted(classes))} never asks transformers for an experts "
            f"implementation: it computes as before, and not by {NAME!r}",
            SparseFFNWarning,
            stacklevel=4,
        )


def _call_after(name: str, action: Callable[..., None]) -> None:
    """Make a method of all transformers' models call the action at its end, once."""
    method = getattr(transformers.PreTrainedModel, name)
    if hasattr(method, "before_sparse_ffn"):
        return

    @functools.wraps(method)
    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        action(self, *args, **kwargs)
        return result

    extended.before_sparse_ffn = method  # type: ignore[attr-defined]
    setattr(transformers.PreTrainedModel, name, extended)
