"""Probing: a module is run on small random inputs, with random weights in fp64, to see what it computes.

Nothing of the module itself is touched: a copy runs, whose parameters are random, so that zero or meta weights tell as
much as any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-6  # above what differently rounded constants do, far below the difference of gelu and gelu_tanh
FP64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two fp64 tensors of a probe are the same but for rounding."""
    if a.shape != b.shape or not (a.is_floating_point() and b.is_floating_point()):
        return False
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    return bool(((a.double() - b.double()).abs() <= TOLERANCE * scale).all())


def probe_copy(module: nn.Module, *, numbers: bool = True) -> nn.Module:
    """A copy on the CPU in fp64 and evaluation mode, with random weights: the same ones in every copy.

    Args:
        module: what is copied.
        numbers: without, all weights are one number that takes no memory, for who only asks what is called.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        if not numbers:
            value = torch.full((), 0.5, **FP64).expand(parameter.shape)
        elif parameter.dim() == 2:
            value = _matrix(parameter.shape[0], parameter.shape[1], generator)
        elif parameter.dim() > 2:
            value = torch.randn(parameter.shape, generator=generator, **FP64) / parameter.shape[-1] ** 0.5
        else:
            value = 0.5 + torch.rand(parameter.shape, generator=generator, **FP64)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for buffer in module.buffers():
        if buffer.is_meta:
            memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
        else:
            memo[id(buffer)] = buffer.to(
                "cpu", torch.float64 if buffer.is_floating_point() else buffer.dtype, copy=True
            )
    copied = copy.deepcopy(module, memo).eval()
    for inner in copied.modules():
        for kind in HOOKS:  # what users hang on their model is not for probes
            getattr(inner, kind, {}).clear()
    return copied


def _matrix(n_out: int, n_in: int, generator: torch.Generator) -> Tensor:
    """Random, but with rows that overlap in memory: that of a large model would not fit, nor be drawn in good time."""
    drawn: Tensor = torch.randn(2 * n_out + n_in, generator=generator, **FP64) / max(n_in, 1) ** 0.5
    return drawn.as_strided((n_out, n_in), (2, 1))  # by 2: it must differ from its transpose


@dataclass
class Call:
    """What one call of a module got and gave."""

    input: Tensor
    output: Tensor


@dataclass
class Trace:
    """What was seen while a copy ran."""

    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    dropouts: list[tuple[float, Tensor]] = field(default_factory=list)
    """Rate and input of every dropout. It drops nothing in a probe: training can be compared with evaluation."""
    outputs: list[Tensor] = field(default_factory=list)
    bare: bool = False
    """Whether the output was a tensor, and not something that holds tensors."""

    def only(self, module: nn.Module) -> Call | None:
        """The one call of a module, None if there was none or there were several."""
        calls = self.calls.get(module, [])
        return calls[0] if len(calls) == 1 else None


class _Dropouts(TorchFunctionMode):
    def __init__(self, seen: list[tuple[float, Tensor]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout):
            names = ("input", "p", "training") if func is F.dropout else ("input", "p", "train")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            rate, training = given.get("p", 0.5), given.get(names[2], True)
            if training and rate > 0:
                self.seen.append((rate, given["input"].clone()))
                return given["input"]
        return func(*args, **kwargs)


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, by position or by name; None without any."""
    return args[0] if args else next(iter(kwargs.values()), None)


def run(
    copied: nn.Module, args: Iterable[Tensor | None], watch: Iterable[nn.Module] = (), train: bool = False
) -> Trace:
    """Run a probe copy and watch some of its modules.

    Args:
        copied: what ``probe_copy`` returned.
        args: its positional arguments.
        watch: modules of the copy whose inputs and outputs are wanted.
        train: run in training mode, with a random state that is put back afterwards.
    """
    from torch.utils._pytree import tree_leaves  # here: it would double the library's import time

    trace = Trace()

    def note(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(first_of(inputs, kwargs), Tensor) and isinstance(output, Tensor):
            trace.calls[module][-1].output = output.clone()

    def note_input(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = first_of(inputs, kwargs)
        given = first.clone() if isinstance(first, Tensor) else torch.empty(0)
        trace.calls.setdefault(module, []).append(Call(given, torch.empty(0)))

    copied.train(train)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        for module in watch:
            for handle in (
                module.register_forward_pre_hook(note_input, with_kwargs=True),
                module.register_forward_hook(note, with_kwargs=True),
            ):
                stack.callback(handle.remove)
        if train:
            torch.manual_seed(0)
            stack.enter_context(_Dropouts(trace.dropouts))
        output = copied(*args)
    trace.bare = isinstance(output, Tensor)
    trace.outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    return trace


def same_outputs(a: Trace, b: Trace) -> bool:
    """Whether two runs gave the same tensors."""
    return len(a.outputs) == len(b.outputs) and all(close(x, y) for x, y in zip(a.outputs, b.outputs, strict=True))


def probe_input(width: int, seed: int = 1) -> Tensor:
    """[2, 3, width] in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, width, generator=generator, **FP64)
