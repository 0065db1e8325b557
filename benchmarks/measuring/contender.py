"""What a benchmark is made of: contenders, each with its float64 oracle, and the cases that they meet in."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.measuring.memory import available_bytes
from sparse_ffn import backend

Gradients = dict[str, Tensor]
Loss = Callable[[nn.Module], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NotInstalled(Exception):
    """A peer's package is missing."""


class TooLarge(Exception):
    """A contender would need more memory than there is."""


def require(module: str, package: str) -> ModuleType:
    """Import a peer's module, which is in a package that pip can install.

    Raises:
        NotInstalled: it cannot be found, or its import fails.
    """
    return imported(module, f"pip install {package}")


def imported(module: str, hint: str) -> ModuleType:
    """Import a module; ``hint`` is what to do where it cannot be found.

    Raises:
        NotInstalled: it cannot be found, or its import fails.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotInstalled(f"{error}; {hint}") from error
    except Exception as error:  # what a package does while it is imported, a missing library of its own included
        first = str(error).strip().splitlines()[:1]
        raise NotInstalled(f"{type(error).__name__}: {''.join(first)}") from error


def require_memory(needed: int, device: torch.device) -> None:
    """Refuse what would not fit in half of the free memory.

    Raises:
        TooLarge: it would not.
    """
    free = available_bytes(device)
    if needed > free // 2:
        raise TooLarge(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


class Oracle:
    """The same function in float64, and its gradients; computed once, when first asked.

    On the reference backend; where sizes are beyond its dense arithmetic (``large``, a GPU), on the one of torch's
    products.
    """

    def __init__(self, module: nn.Module, loss: Loss | None = None, *, large: bool = False) -> None:
        self.module = copy.deepcopy(module).double().train()
        self.loss, self.large = loss, large
        self._answers: dict[int, tuple[Gradients, Gradients]] = {}

    def answer(self, x: Tensor, cotangent: Tensor, *, with_loss: bool) -> Gradients:
        """Output ``y`` and the gradients of ``x`` and of each parameter, for these tokens."""
        if len(x) not in self._answers:
            self._answers[len(x)] = self._compute(x.detach().double().requires_grad_(), cotangent.double())
        plain, of_loss = self._answers[len(x)]
        return {name: value + of_loss[name] for name, value in plain.items()} if with_loss else plain

    def forget(self) -> None:
        """Free the answers; they are computed again if asked for."""
        self._answers.clear()

    def _compute(self, x: Tensor, cotangent: Tensor) -> tuple[Gradients, Gradients]:
        with backend("torch" if self.large or x.device.type == "cuda" else "reference"):
            y = self.module(x)
        inputs = {"x": x, **dict(self.module.named_parameters())}

        def gradients(tensor: Tensor, weight: Tensor | None) -> Gradients:
            found = torch.autograd.grad(tensor, [*inputs.values()], weight, retain_graph=True, materialize_grads=True)
            return dict(zip(inputs, found, strict=True))

        plain = {"y": y.detach(), **gradients(y, cotangent)}
        if self.loss is None:
            return plain, {}
        return plain, {"y": torch.zeros_like(y), **gradients(self.loss(self.module), None)}


def own_gradients(module: nn.Module) -> Gradients:
    """Gradients of a module whose parameters bear the oracle's names."""
    return {name: _gradient(p) for name, p in module.named_parameters()}


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


@dataclass(frozen=True)
class Contender:
    """A module x -> y that is checked and timed.

    Attributes:
        module: what is timed.
        oracle: what it must compute.
        loss: its auxiliary loss after a training forward, which then takes part in the backward pass.
        unchecked_loss: the same, for a loss that the oracle does not have: timed, but left out of the check.
        gradients: its parameters' gradients under the oracle's names.
        checked: what is checked where that is not ``module`` itself: the same weights in fp32, say.
        tokens: how many tokens to check; None for all.
        inference: whether it has no backward pass.
    """

    module: nn.Module
    oracle: Oracle
    loss: Loss | None = None
    unchecked_loss: Loss | None = None
    gradients: Callable[[nn.Module], Gradients] = own_gradients
    checked: nn.Module | None = None
    tokens: int | None = None
    inference: bool = False


@dataclass(frozen=True)
class Entry:
    """A contender's name in the tables, and how to build it.

    Attributes:
        name: its name.
        kind: ``"ours"``, ``"baseline"`` or ``"peer"``.
        about: what it computes and what was made equal.
        build: builds it; may raise anything, which the table then reports.
    """

    name: str
    kind: str
    about: str
    build: Callable[[], Contender]


def checked_on(entry: Entry, tokens: int) -> Entry:
    """The same, checked on so many tokens at most."""
    return replace(entry, build=lambda: replace(entry.build(), tokens=tokens))


@dataclass(frozen=True)
class Experts:
    """Our experts without a router, and the bytes that another library's keep for the backward pass beyond x."""

    module: nn.Module
    bound: int


@dataclass(frozen=True)
class Case:
    """Contenders on one input.

    Attributes:
        group: which table it belongs to.
        shape: the sizes, as text.
        dtype: ``"fp32"`` or ``"bf16"``.
        x: the input [T, D], a leaf.
        out: shape of the output.
        baseline: the entry that ratios are taken to.
        entries: the contenders; the first is ours.
        saved_bound: elements that ours may keep for the backward pass.
        experts: our experts by themselves, if their memory is to be compared.
    """

    group: str
    shape: str
    dtype: str
    x: Tensor
    out: tuple[int, int]
    baseline: str
    entries: tuple[Entry, ...]
    saved_bound: int | None = None
    experts: Experts | None = None


def backward(y: Tensor, cotangent: Tensor, loss: Tensor | None) -> None:
    """Backward from the output and, if there is one, from the auxiliary loss."""
    if loss is None:
        torch.autograd.backward([y], [cotangent])
    else:
        torch.autograd.backward([y, loss], [cotangent, torch.ones_like(loss)])


def separated(
    n: int, width: int, dtype: torch.dtype, device: torch.device, margin: Callable[[Tensor], Tensor]
) -> Tensor:
    """Normal tokens [n, width] whose selection is no near-tie: there fp32 and fp64 may honestly differ.

    Args:
        n: tokens.
        width: d_model.
        dtype: of the tokens.
        device: of the tokens.
        margin: float64 tokens [m, width] -> [m], the score of the last one selected minus that of the first one not.
    """
    kept: list[Tensor] = []
    while sum(map(len, kept)) < n:
        x = torch.randn(n + 8, width, device=device).to(dtype)
        with torch.no_grad():
            kept.append(x[margin(x.double()) > 2e-5])
    return torch.cat(kept)[:n].clone().requires_grad_()


def gap(scores: Tensor, k: int) -> Tensor:
    """Distance of the k-th and the next largest of the last dimension; infinite if there is no next."""
    if k >= scores.shape[-1]:
        return scores.new_full(scores.shape[:-1], torch.inf)
    top: Tensor = scores.topk(k + 1).values
    return top[..., k - 1] - top[..., k]
