"""Probing: a copy of a module runs on a small random input, with random weights in fp64, to show what it computes.

The weights of the copy are random, so that a model whose weights are zero or on meta shows as much as any other.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparse_ffn.convert.batches import first_of
from sparse_ffn.convert.find.edits import switch_off_fast_path
from sparse_ffn.convert.outputs import tensors_in


class Arguments(NamedTuple):
    """What a module is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}


TOLERANCE = 1e-6  # constants of an activation that are rounded differently differ less; gelu and gelu_tanh far more
FP64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


class Unknown(Exception):
    """Why something that looked like an FFN by its shapes is left as it is."""


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two fp64 tensors of a probe are the same but for rounding."""
    if a.shape != b.shape or not (a.is_floating_point() and b.is_floating_point()):
        return False
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    return bool(((a.double() - b.double()).abs() <= TOLERANCE * scale).all())


def probe_copy(module: nn.Module, *, numbers: bool = True) -> nn.Module:
    """A copy on the CPU in fp64 and evaluation mode, without hooks, and with the same random weights in every copy.

    Without ``numbers`` all weights are one number, which takes no memory and is enough to see what is called.
    """
    try:
        copied = copy.deepcopy(module, _tensors(module, numbers)).eval()
    except Exception as error:
        raise Unknown(f"{type(module).__name__} cannot be copied to probe it ({error})") from error
    for inner in copied.modules():
        switch_off_fast_path(inner)
        if hasattr(inner, "_hf_hook"):
            vars(inner)["forward"] = inner._old_forward  # accelerate's would bring the model's own weights
        for kind in HOOKS:
            getattr(inner, kind, {}).clear()
    return copied


def _tensors(module: nn.Module, numbers: bool) -> dict[int, Any]:
    """The copy's parameters and buffers, by the id of the module's."""
    generator = torch.Generator().manual_seed(0)
    # accelerate's hooks hold the weights of the whole model
    memo: dict[int, Any] = {id(m._hf_hook): m._hf_hook for m in module.modules() if hasattr(m, "_hf_hook")}
    for name, parameter in module.named_parameters():
        if not numbers:
            value = torch.full((), 0.5, **FP64).expand(parameter.shape)
        elif parameter.dim() == 2:
            value = _matrix(parameter.shape[0], parameter.shape[1], generator)
        elif parameter.dim() > 2:
            value = torch.randn(parameter.shape, generator=generator, **FP64) / parameter.shape[-1] ** 0.5
        else:
            value = 0.5 + torch.rand(parameter.shape, generator=generator, **FP64)
            if value.dim() and name.endswith("bias"):  # of both signs: small tokens would else be on one side of a ReLU
                value[1::2] *= -1
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for buffer in module.buffers():
        dtype = torch.float64 if buffer.is_floating_point() and not buffer.is_meta else buffer.dtype
        zeros = torch.zeros(buffer.shape, dtype=dtype, device="cpu")
        memo[id(buffer)] = zeros if buffer.is_meta else buffer.to("cpu", dtype, copy=True)
    return memo


def _matrix(n_out: int, n_in: int, generator: torch.Generator) -> Tensor:
    """A random matrix whose rows overlap in memory: an independent one of a large model takes too long to draw."""
    drawn: Tensor = torch.randn(2 * n_out + n_in, generator=generator, **FP64) / max(n_in, 1) ** 0.5
    return drawn.as_strided((n_out, n_in), (2, 1))  # the row stride of 2 makes it differ from its transpose


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
    """Rate and input of every dropout, which drops nothing in a probe, so that training compares with evaluation."""
    outputs: list[Tensor] = field(default_factory=list)
    bare: bool = False
    """Whether the output was a tensor, and not something that holds tensors."""
    drawn: tuple[Tensor, Any] | None = None
    """After a run in training: what torch's and Python's generators were left in."""

    def only(self, module: nn.Module) -> Call | None:
        """The one call of a module, None if there was none or there were several."""
        calls = self.calls.get(module, [])
        return calls[0] if len(calls) == 1 else None


class _Dropouts(TorchFunctionMode):
    """Notes every dropout in training and lets its input pass."""

    def __init__(self, seen: list[tuple[float, Tensor]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout):
            given = {**dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
            rate = given.get("p", 0.5)
            if rate > 0 and given.get("training", given.get("train", True)):
                self.seen.append((rate, given["input"].clone()))
                return given["input"]
        return func(*args, **kwargs)


def run(copied: nn.Module, given: Arguments, watch: Iterable[nn.Module] = (), train: bool = False) -> Trace:
    """Run what ``probe_copy`` returned, in training mode if asked, and note the calls of the modules to watch."""
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
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too, for good
            stack.callback(random.setstate, random.getstate())
            random.seed(0)
            stack.enter_context(_Dropouts(trace.dropouts))
        output = copied(*given.args, **given.kwargs)
        if train:
            trace.drawn = (torch.default_generator.get_state(), random.getstate())
    trace.bare = isinstance(output, Tensor)
    trace.outputs = tensors_in(output)
    return trace


def same_outputs(a: Trace, b: Trace) -> bool:
    """Whether two runs gave the same tensors."""
    return len(a.outputs) == len(b.outputs) and all(_same(x, y) for x, y in zip(a.outputs, b.outputs, strict=True))


def same_draws(a: Trace, b: Trace) -> bool:
    """Whether two runs in training left the generators alike; dropouts, which drop nothing in a probe, draw nothing."""
    if a.drawn is None or b.drawn is None:
        return a.drawn is b.drawn
    return torch.equal(a.drawn[0], b.drawn[0]) and a.drawn[1] == b.drawn[1]


def gradient(copied: nn.Module, given: Arguments) -> Tensor | None:
    """Of a random projection of the outputs, with respect to the tokens; None where none reaches them."""
    copied.eval()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        floating = (t for t in (*given.args, *given.kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
        tokens = next(floating, None)
        if tokens is None:
            return None
        leaf = tokens.clone().requires_grad_()
        # clones: some modules write into their tokens, and a memory may be them
        args = [leaf.clone() if t is tokens else t for t in given.args]
        kwargs = {name: leaf.clone() if t is tokens else t for name, t in given.kwargs.items()}
        outputs = [y for y in tensors_in(copied(*args, **kwargs)) if y.requires_grad]
        if not outputs:
            return None
        generator = torch.Generator().manual_seed(2)
        weighed = [(y * torch.randn(y.shape, generator=generator, **FP64)).sum() for y in outputs]
        found: Tensor | None = torch.autograd.grad(torch.stack(weighed).sum(), leaf, allow_unused=True)[0]
        return found


def same_dropouts(a: Trace, b: Trace) -> bool:
    """Whether two runs dropped from the same tensors at the same rates, in any order."""
    rest = list(b.dropouts)
    for rate, x in a.dropouts:
        at = next((i for i, (other, y) in enumerate(rest) if other == rate and _same(x, y)), None)
        if at is None:
            return False
        del rest[at]
    return not rest


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are close, or equal: flags, counts and scores of -inf are never close."""
    return close(a, b) or torch.equal(a, b)


def probe_input(width: int) -> Tensor:
    """Random tokens [2, 3, width] in fp64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, width, generator=generator, **FP64)


def probe_arguments(width: int) -> list[Arguments]:
    """What a block or a layer may take: tokens alone, with empty places for masks, with a memory, with a mask."""
    x, mask = probe_input(width), torch.ones(2, 1, 3, 3, **FP64)
    return [Arguments(args) for args in ((x,), (x, None), (x, None, None), (x, x), (x, mask))]


def run_first(
    copied: nn.Module, choices: Iterable[Arguments], watch: Iterable[nn.Module], train: bool = False
) -> tuple[Trace, Arguments]:
    """Run with the first of some arguments that the copy takes; returns them too."""
    failed: list[str] = []
    watch = list(watch)
    for args in choices:
        try:
            return run(copied, args, watch, train=train), args
        except Exception as error:  # noqa: PERF203
            failed.append(f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")
    raise Unknown(f"{type(copied).__name__} does not run by itself ({'; '.join(dict.fromkeys(failed))})")
