"""pooled_balance: one balance loss for all the calls of a layer that a model uses several times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from sparse_ffn.checks import called, check_module
from sparse_ffn.layers.balanced import Balanced, Calls, balanced_in
from sparse_ffn.routing.base import Routing


@contextmanager
def pooled_balance(model: nn.Module) -> Iterator[None]:
    """Balance a layer over the tokens of all its training forwards within the context, not over the last one's.

    MoEUT (arXiv 2405.16039, section 2.2) shares layers over depth and takes the entropy of the mean over time and over
    the repeats of a layer. The mean of the repeats' entropies, which ``aux="inject"`` gives, pushes harder: it wants
    balance in each repeat. The loss is that of one call on the calls' tokens together (with
    ``balance_over="sequence"``, on those of each sequence); after the context ``aux_loss`` has it as any other:

        with sparse_ffn.pooled_balance(model):
            logits = model(tokens)
        loss = task(logits) + sparse_ffn.aux_loss(model)

    For eager models. Within the context the router and the experts are computed one after the other, as with the z
    loss. A forward that checkpointing repeats counts once, and a context that an error leaves has no loss. After it
    ``routing_stats``, too, is of all the calls' tokens.

    Args:
        model: any module.

    Raises:
        TypeError: the model is no module.
        ValueError: a layer has ``aux="inject"``, which adds its gradient at once; or, at the end, a layer with
            ``balance_over="sequence"`` was called with different numbers of sequences, or k changed.
        RuntimeError: a layer is within such a context already; or, at the end, a backward pass ran within it that
            did not retain the graph.
    """
    check_module("model", model)
    layers = balanced_in(model)
    for name, layer in layers.items():
        if layer.aux == "inject":
            raise ValueError(f"pooled_balance needs aux='attach', but {called(name)} has aux='inject'")
        if layer._calls is not None and layer._calls.open:
            raise RuntimeError(f"{called(name)} is within pooled_balance already")
    for layer in layers.values():
        layer._calls = Calls(open=True)
    try:
        yield
    except BaseException:
        for layer in layers.values():
            layer._calls = None
        raise
    finished = [(name, layer, layer._calls) for name, layer in layers.items()]
    for _, layer, _ in finished:
        layer._calls = Calls(open=False)
    pooled = [
        (layer, _of_all(called(name), layer, calls))
        for name, layer, calls in finished
        if calls is not None and calls.routings
    ]
    for layer, kept in pooled:  # when none was refused
        layer._keep(*kept)


def _of_all(
    name: str, layer: Balanced, calls: Calls
) -> tuple[Tensor | None, Tensor, Tensor | None, tuple[Tensor | Node | None, ...]]:
    """What the layer is to keep of its calls."""
    n_sequences = set(calls.n_sequences)
    if len(n_sequences) > 1:
        raise ValueError(f"pooled_balance: {name} got different numbers of sequences, {sorted(map(str, n_sequences))}")
    if len(ks := {routing.index_TK.shape[1] for routing in calls.routings}) > 1:
        raise ValueError(f"pooled_balance: the k of {name} changed between its calls, {sorted(ks)}")
    if calls.freed:
        raise RuntimeError(
            f"pooled_balance: a backward pass within the context has freed the graph of a call of {name}: run it after"
        )
    groups = calls.n_sequences[0]
    masks = calls.masks
    mask_T: Tensor | None = None
    if any(mask is not None for mask in masks):
        pairs = zip(calls.routings, masks, strict=True)
        real = [torch.ones_like(r.index_TK[:, 0], dtype=torch.bool) if m is None else m for r, m in pairs]
        mask_T = _joined(real, groups)
    routing = Routing(*(_joined(list(parts), groups) for parts in zip(*calls.routings, strict=True)))
    loss = layer._weighted_loss(routing, mask_T, groups)
    return loss, routing.index_TK, mask_T, (*calls.nodes, loss)


def _joined(parts: list[Tensor], groups: int | None) -> Tensor:
    """The calls' tokens together; with groups those of each group."""
    if groups is None:
        return torch.cat(parts)
    lengths = [part.shape[0] // max(groups, 1) for part in parts]
    pairs = zip(parts, lengths, strict=True)
    return torch.cat([part.reshape(groups, length, *part.shape[1:]) for part, length in pairs], dim=1).flatten(0, 1)
