"""How a model runs on a batch: its modes, the random state, and what a batch is to its forward."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def fork_random(device: torch.device) -> AbstractContextManager[None]:
    """A block after which the random state of the CPU and of a device is what it was; others may not be ours."""
    own = [] if device.type == "cpu" else [device]
    forked: AbstractContextManager[None] = torch.random.fork_rng(own, device_type=device.type if own else "cuda")
    return forked


def seed_random(device: torch.device, seed: int) -> None:
    """Seed what ``fork_random`` puts back; ``torch.manual_seed`` would seed all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        own: Any = torch.get_device_module(device)
        with own.device(device):
            own.manual_seed(seed)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a mapping (keyword arguments), a tuple or list (positional arguments), or one argument.

    Eagerly, if a module of it is compiled: that would run no hooks that came later.

    Raises:
        TypeError: its ``forward`` does not take so many.
    """
    with torch.compiler.set_stance("force_eager") if _is_compiled(model) else nullcontext():
        return _called(model, batch)


def _is_compiled(model: nn.Module) -> bool:
    """By torch.compile of a module, or its own ``compile()``; a compiled function that it calls has no hooks."""
    if "torch._dynamo" not in sys.modules:
        return False
    wrapper = torch._dynamo.OptimizedModule
    return any(isinstance(part, wrapper) or part._compiled_call_impl is not None for part in model.modules())


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if not isinstance(batch, (tuple, list)):
        return model(batch)
    try:
        return model(*batch)
    except TypeError as error:
        if _takes(model, batch):
            raise
        raise TypeError(
            f"a batch that is a {type(batch).__name__} is the model's positional arguments, and {len(batch)} do not "
            f"fit its forward ({error}): of pairs of inputs and labels give (x for x, label in loader)"
        ) from error


def _takes(model: nn.Module, batch: Iterable[Any]) -> bool:
    """Whether a model's ``forward`` takes these arguments; True where it does not tell."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*batch)
    except TypeError:
        return False
    return True
