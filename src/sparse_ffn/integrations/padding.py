"""mask_padding: the attention mask that a model gets becomes that of the layers in it, which get tokens alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
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
    each forward pass must be followed by its backward pass. Hooks do it, which no checkpoint and no pickle holds: call
    this after loading and after every conversion. What torch.compile has made before does not run them: call this
    before the first compiled pass, or ``torch.compiler.reset()`` after this. A deep copy of the model has hooks of its
    own, which stay.

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
    decoder, held = decoder_of(model), _Held(places)
    handles = [
        model.register_forward_pre_hook(_Keep(held), with_kwargs=True),
        model.register_forward_hook(_Done(held), always_call=True),
    ]
    handles += [
        layer.register_forward_pre_hook(_Give(held, MASKS[layer in decoder]), with_kwargs=True) for layer in layers
    ]

    def take_off() -> None:
        for handle in handles:
            handle.remove()

    return take_off


class _Held:
    """The masks of the last forward pass, and whether it is still under way.

    Args:
        places: of the masks among the model's arguments.
    """

    def __init__(self, places: dict[str, int]) -> None:
        self.places = places
        self.masks: dict[str, Tensor | None] = {}
        self.running = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return _Held(self.places)  # a copy of the model runs by itself


class _Hook:
    """One of the hooks; in a pickle, as in a checkpoint, it is none."""

    def __init__(self, held: _Held) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self), held=copy.deepcopy(self.held, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    """What a hook is in a model that was pickled."""

    def __call__(self, *_: Any) -> None:
        return None


class _Keep(_Hook):
    """Before the model runs."""

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places = self.held.places.items()
        self.held.masks = {name: args[at] if at < len(args) else kwargs.get(name) for name, at in places}
        self.held.running = True


class _Done(_Hook):
    """After it, and after an error."""

    def __call__(self, *_: Any) -> None:
        self.held.running = False


class _Give(_Hook):
    """Before a layer runs."""

    def __init__(self, held: _Held, name: str) -> None:
        super().__init__(held)
        self.name = name

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = of_tokens(self.held.masks.get(self.name), first := first_of(args, kwargs))
        if mask is None or kwargs.get("mask") is not None or not (self.held.running or in_backward()):
            return None
        return args, {**kwargs, "mask": mask.view(first.shape[:-1])}
