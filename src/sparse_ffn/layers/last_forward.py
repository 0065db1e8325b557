"""What a forward of a MoE layer leaves behind: its routing, and its balance loss while that has a graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from sparse_ffn.ops.library import under_transforms


class LastForward:
    """Selected experts and mask of a forward, and its weighted balance loss until a backward pass frees the graph.

    The loss could not be differentiated again then, and a layer that does not run in the next step (LayerDrop) would
    add it to that step's. Hooks on the graph tell of the pass. A compiled forward has none, but the node of a compiled
    graph knows whether it was freed.

    Args:
        loss: the loss, if there is one.
        index_TK: the selected experts.
        mask_T: the mask, if there is one.
        results: every backward pass through the loss or the layer's output reaches one of these tensors or nodes.
    """

    def __init__(
        self, loss: Tensor | None, index_TK: Tensor, mask_T: Tensor | None, results: tuple[Tensor | Node | None, ...]
    ) -> None:
        self._loss, self._index_TK, self._mask_T = loss, index_TK, mask_T
        self._watched = False
        if loss is not None and loss.requires_grad and not torch.compiler.is_compiling() and not under_transforms():
            self._watch(results)

    @property
    def loss(self) -> Tensor | None:
        """The loss, or None if there is none (any more)."""
        self._check_alive()
        loss = self._loss
        if loss is None or not loss.requires_grad or torch.compiler.is_compiling():
            return loss
        if not self._watched and not under_transforms():  # the forward was compiled: loss and output have one node
            if not isinstance(loss.grad_fn, BackwardCFunction):
                self._watch((loss,))
            elif _freed(loss.grad_fn):
                self.forget_loss()
        return self._loss

    @property
    def routed(self) -> tuple[Tensor, Tensor | None]:
        """The selected experts, and the mask if there was one."""
        self._check_alive()
        return self._index_TK, self._mask_T

    def _watch(self, results: tuple[Tensor | Node | None, ...]) -> None:
        self._watched = True
        watch(self, nodes_of(results))

    def forget_loss(self) -> None:
        """Count 0 from now on."""
        self._loss = None

    def _check_alive(self) -> None:
        """Raise if the forward ran in a transform of torch.func that is over, with which its tensors ended."""
        for tensor in (self._loss, self._index_TK, self._mask_T):
            if tensor is not None and torch._C._functorch.unwrap_if_dead(tensor) is not tensor:
                raise RuntimeError(
                    "the last forward of this layer ran inside a transform of torch.func (vmap, grad, ...) that is "
                    "over: ask for aux_loss and routing_stats inside the transformed function"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Nothing: copies of a layer start clean."""


class Forgets(Protocol):
    """What is told that its graph is being freed."""

    def forget_loss(self) -> None: ...


def watch(owner: Forgets, nodes: list[Node]) -> None:
    """Tell the owner of a backward pass that frees what it passes, once it reaches one of the nodes."""
    for node in nodes:
        with suppress(RuntimeError):  # of torch 2.9 where the graph is gone, with the outputs that nobody kept
            node.register_prehook(partial(_passed, weakref.ref(owner)))  # weak: a cycle would keep graphs alive


def nodes_of(results: tuple[Tensor | Node | None, ...]) -> list[Node]:
    """The nodes of those results that have one."""
    return [node for r in results if (node := r.grad_fn if isinstance(r, Tensor) else r) is not None]


def _freed(node: Node) -> bool:
    try:
        node._raw_saved_tensors  # type: ignore[attr-defined] # noqa: B018 # an error if they were freed; unpacks none
    except RuntimeError:
        return True
    return False


def _passed(owner: weakref.ref[Forgets], gradients: tuple[Tensor | None, ...]) -> None:
    told = owner()
    if told is not None and not _keeps_graph():
        told.forget_loss()


_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: False)
"""Whether the backward pass that runs now was asked to retain the graph."""
