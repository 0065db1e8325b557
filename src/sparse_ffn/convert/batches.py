"""Batches: run a model on them in evaluation, watch what some of its modules get, and put everything back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_type, shown
from sparse_ffn.convert.find.edits import set_attribute
from sparse_ffn.running import in_evaluation, run_batch

Watch = Callable[[tuple[Any, ...], dict[str, Any], "Tensor | None"], None]
"""Gets a call's arguments, those by keyword, and the batch's mask of the tokens [T] of the first; None without one."""


@torch.no_grad()
def run(model: nn.Module, batches: Iterable[Any], watched: Iterable[tuple[nn.Module, Watch]]) -> None:
    """Run a model on batches without gradients; before each call of a watched module its function is called.

    Args:
        model: it runs in evaluation mode, and its modes are as before afterwards.
        batches: each a mapping (keyword arguments), a tuple or list (positional arguments), or one argument. A mask is
            a mapping's ``attention_mask``, or its ``decoder_attention_mask`` for modules in the decoder of an
            encoder-decoder of transformers. It is a module's if it has the shape of its tokens, or their number where
            they come as rows.
        watched: modules of the model, each with what watches it.

    Raises:
        TypeError: ``batches`` cannot be iterated over, or is itself a batch.
    """
    _check(batches)
    batch: Any = None

    def before(watch: Watch, mask_name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        mask: Any = batch.get(mask_name) if isinstance(batch, Mapping) else None
        watch(args, kwargs, of_tokens(mask, first_of(args, kwargs)))

    decoder = decoder_of(model)
    handles = []
    for module, watch in watched:
        mask_name = "decoder_attention_mask" if module in decoder else "attention_mask"
        handles.append(module.register_forward_pre_hook(partial(before, watch, mask_name), with_kwargs=True))
    try:
        with evaluated(model):
            for batch in batches:
                run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without the nested tensors that torch.nn's encoders make of padded batches."""
    encoders = [m for m in model.modules() if vars(m).get("use_nested_tensor")]
    undo = [set_attribute(encoder, "use_nested_tensor", False) for encoder in encoders]
    try:
        with in_evaluation(model):
            yield
    finally:
        for step in undo:
            step()


class Batches:
    """Batches that are iterated over once, of which the first stays.

    Args:
        batches: as ``run``'s.

    Raises:
        TypeError: ``batches`` cannot be iterated over, or is itself a batch.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        _check(batches)
        self._rest = iter(batches)
        self.first = list(itertools.islice(self._rest, 1))
        """The first one, if there is one."""

    def __iter__(self) -> Iterator[Any]:
        yield from self.first
        yield from self._rest


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, by position or by name; None without any."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _check(batches: Any) -> None:
    check_type("batches", batches, Iterable, "batches to iterate over")
    if isinstance(batches, (Mapping, str, Tensor)):
        raise TypeError(f"batches must be batches to iterate over, got one, {shown(batches)}: put it into a list")


def of_tokens(mask: Any, x: Any) -> Tensor | None:
    """A mask as that of the tokens of x [..., D], [T]; None if it is another's."""
    if not isinstance(mask, Tensor) or not isinstance(x, Tensor):
        return None
    if mask.dim() == 2 and mask.shape != x.shape[:-1] and mask.t().shape == x.shape[:-1]:  # the length comes first
        mask = mask.t()
    as_rows = x.dim() == 2 and mask.numel() == len(x)  # in the mask's order, we trust
    return real(mask).flatten().to(x.device) if as_rows or mask.shape == x.shape[:-1] else None


def real(mask: Tensor) -> Tensor:
    """Where a mask has tokens: numbers that are added to scores are 0 there, others are not."""
    added = mask.is_floating_point() and not bool((mask > 0).any())  # to scores: 0 all over where nothing is padding
    return mask == 0 if added else mask.bool()


def decoder_of(model: nn.Module) -> set[nn.Module]:
    """The modules of an encoder-decoder's decoder, whose tokens have a mask of their own."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    get: Any = getattr(model, "get_decoder", lambda: None)
    decoder = get()  # an encoder by itself has none, or gives itself
    if not isinstance(decoder, nn.Module) or decoder is model:
        return set()
    encoder: Any = getattr(model, "get_encoder", lambda: None)()
    parts = set(decoder.modules())  # of a model of images and text it is a whole encoder-decoder
    return parts - set(encoder.modules()) if encoder in parts and encoder is not decoder else parts
