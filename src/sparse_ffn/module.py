"""What our modules share: parametrisations, parameters by name, and whether a module is plain."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globally
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_ffn.checks import is_dtensor, shown

M = TypeVar("M", bound=nn.Module)

_METHODS = ("keys", "values")


class Parametrizations(nn.ModuleDict):
    """A ModuleDict in which "keys" and "values" may be names: as attributes they then hide the methods.

    torch adds parametrisations to a plain ModuleDict, which refuses the names of its own methods, after it has taken
    the parameter away; peft's ``target_parameters`` does the same.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As Module's."""
        if name not in _METHODS:
            super().add_module(name, module)
            return
        self._modules[name] = module  # type: ignore[assignment]
        self.__dict__[name] = module  # what getattr finds, and so torch.func.functional_call

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without the attributes: they are in ``_modules`` too."""
        return {name: value for name, value in super().__getstate__().items() if name not in _METHODS}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.update({name: self._modules[name] for name in _METHODS if name in self._modules})


class WithProperties(nn.Module):
    """A module whose properties see all that is set: Module takes modules past them, which they would refuse."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As Module's."""
        if isinstance(value, nn.Module) and isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class Parametrizable(nn.Module):
    """A module with parameters of these names that torch.nn.utils.parametrize takes."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As Module's; torch.nn.utils.parametrize gets a table that accepts the names of our parameters."""
        super().__setattr__(name, Parametrizations() if name == "parametrizations" else value)


@torch.no_grad()
def normal_(parameter: Tensor, std: float) -> None:
    """Draw normal numbers as one process would.

    Of a DTensor on the CPU every process draws the whole and keeps its shard: torch would draw the shards from one
    seed there, so that expert 0 equals the first expert of each other process. On accelerators it keeps count.
    """
    if not is_dtensor(parameter) or not parameter.is_cpu:
        parameter.normal_(0.0, std)
        return
    from torch.distributed.tensor import distribute_tensor

    made: Any = parameter
    whole = torch.empty(made.shape, dtype=made.dtype, device=made.device).normal_(0.0, std)
    parameter.copy_(distribute_tensor(whole, made.device_mesh, made.placements, src_data_rank=None))


def tensors_of(module: nn.Module, *names: str) -> list[Any]:
    """Attributes of a module that are parameters or buffers unless someone put another tensor in their place.

    Module.__getattr__ would cost 0.7 microseconds for each, a tenth of a decode step together.
    """
    own, buffers = module._parameters, module._buffers
    return [own[n] if n in own else buffers[n] if n in buffers else getattr(module, n) for n in names]


def lost_in_copies(balance: str) -> RuntimeError:
    """The error for balancing in a copy that ``nn.DataParallel`` made, which takes with it what balances the original.

    Its loss would be lost with ``aux="attach"`` and count once a copy with ``"inject"``.
    """
    return RuntimeError(
        f"balance = {balance!r} does not work in torch.nn.DataParallel, whose copies of a layer are gone before "
        'aux_loss and update_router_bias look: use DistributedDataParallel (torchrun), or balance = "none"'
    )


def unwrapped(name: str, module: nn.Module, kind: type[M]) -> M:
    """The module of this kind, which may be within another: LoRA wraps it, and the wrapper has no attribute of it.

    Args:
        name: the module's, for the error.
        module: what is in its place now.
        kind: its class.

    Raises:
        TypeError: there is none.
    """
    if isinstance(module, kind):  # nearly always, and much cheaper than the loop
        return module
    for found in module.modules():
        if isinstance(found, kind):
            return found
    raise TypeError(f"{name} must be a {kind.__name__} or wrap one, got {shown(module)}")


def is_plain(module: nn.Module, weight: str = "weight") -> bool:
    """Whether calling the module would do nothing that its own class does not do.

    False with hooks on it (pruning, FSDP, profilers), with a ``forward`` of its own (accelerate's offload), and for a
    weight that computes by itself (torchao's quantised tensors). The class is the caller's to check, exactly: a
    subclass may do more, and parametrisation, FSDP and LoRA change it.
    """
    hooked = "forward" in module.__dict__ or any(_hooks(module))
    return not hooked and not is_traceable_wrapper_subclass(getattr(module, weight))


def is_called_alone(module: nn.Module) -> bool:
    """Whether other work that is done within the module's call is not taken for the module's own.

    Checkpointing would compute it again, or without a gradient, and a compiler would make it part of the module's code.
    FSDP2's hooks only bring parameters.
    """
    foreign = (hook for hooks in _hooks(module) for hook in hooks.values() if not _of_fsdp(hook))
    return not any(foreign) and "forward" not in module.__dict__ and module._compiled_call_impl is None


def is_brought(part: nn.Module, weight: Tensor) -> bool:
    """Whether a part's weights come when the part is called: accelerate's offload, FSDP2 around the part alone.

    Before that, device and dtype of one of them say nothing of what it will compute with.
    """
    return weight.device.type == "meta" or any(_of_fsdp(hook) for hook in part._forward_pre_hooks.values())


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
        globally._global_forward_hooks, globally._global_forward_pre_hooks,
        globally._global_backward_hooks, globally._global_backward_pre_hooks,
    )  # fmt: skip


def _of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")
