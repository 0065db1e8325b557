"""mask_padding: the attention mask that a model gets becomes that of the layers in it, which get tokens alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparse_ffn.checks import check_module
from sparse_ffn.convert.batches import decoder_of, first_of, of_tokens
from sparse_ffn.layers import LatentMoE
from sparse_ffn.layers.routed import Routed
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.ops.library import in_backward

MASKS = ("attention_mask", "decoder_attention_mask")


def mask_padding(model: nn.Module) -> Callable[[], None]:
    """Let padding take no part in balance and statistics: the batch's attention mask becomes the mask of its layers.

    While the model runs, each mixture of experts in it gets ``attention_mask`` [batch, length] as its ``mask`` (in the
    decoder of an encoder-decoder ``decoder_attention_mask``), where it is given none and its tokens are so many: not in
    decoding with a cache. Gradient checkpointing computes layers again with the mask of the last forward pass, so there
    each forward pass must be followed by its backward pass. Hooks do it, which no checkpoint holds: call this after
    loading and after every conversion.

    Args:
        model: what is called with the mask, such as a ``transformers.PreTrainedModel``, with layers of this library.

    Returns:
        What takes it off again.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it takes no attention mask, or holds no mixture of experts.
    """
    check_module("model", model)
    parameters = list(inspect.signature(model.forward).parameters)
    places = {name: parameters.index(name) for name in MASKS if name in parameters}
    if not places:
        raise ValueError(f"model, a {type(model).__name__}, takes no attention_mask: give it to what takes one")
    kinds = (Routed, LatentMoE, SharedExpertMoE)
    whole = [module for module in model.modules() if isinstance(module, kinds)]
    parts = {part for module in whole for part in module.modules() if part is not module}
    layers = [module for module in whole if module not in parts]
    if not layers:
        raise ValueError(f"model, a {type(model).__name__}, holds no mixture of experts: convert it first")
    decoder, held = decoder_of(model), _Held()

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held.masks = {name: args[at] if at < len(args) else kwargs.get(name) for name, at in places.items()}
        held.running = True

    def done(*_: Any) -> None:
        held.running = False

    def give(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = of_tokens(held.masks.get(name), first := first_of(args, kwargs))
        if mask is None or kwargs.get("mask") is not None or not (held.running or in_backward()):
            return None
        return args, {**kwargs, "mask": mask.view(first.shape[:-1])}

    handles = [model.register_forward_pre_hook(keep, with_kwargs=True), model.register_forward_hook(done)]
    for layer in layers:
        name = MASKS[layer in decoder]
        handles.append(layer.register_forward_pre_hook(partial(give, name), with_kwargs=True))

    def take_off() -> None:
        for handle in handles:
            handle.remove()

    return take_off


class _Held:
    """The masks of the last forward pass, and whether it is still under way."""

    masks: dict[str, Tensor | None]
    running = False

    def __init__(self) -> None:
        self.masks = {}
