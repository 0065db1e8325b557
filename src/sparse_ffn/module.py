"""What our modules share: options checked by name, parametrisations, plain or not; how a model runs on a batch."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, Union

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globally
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_ffn.checks import is_dtensor, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:  # Python 3.10 has none: there typing.get_type_hints gives the TypedDict itself
    Unpack = Union

T = TypeVar("T", bound="CheckedOptions")
M = TypeVar("M", bound=nn.Module)


class _Signature:
    """What ``inspect.signature`` and ``help`` show of a class: ``__init__``, with the options by name.

    An option's default is that of the base which has it; an ellipsis where a part of the class has it.
    """

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None:  # a layer is called with what its forward takes
            raise AttributeError("__signature__")
        init: Any = owner.__init__  # type: ignore[misc]
        signature = inspect.signature(init)
        parameters = list(signature.parameters.values())[1:]
        names = _options(owner)
        if names is not None and parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            shown = {parameter.name for parameter in parameters}
            bases: list[Any] = [base.__init__ for base in owner.__mro__[1:] if "__init__" in vars(base)]  # type: ignore[misc]
            known = [inspect.signature(base).parameters for base in bases]
            parameters[-1:] = [
                next(
                    (p[name] for p in known if name in p),
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=...),
                )
                for name in names
                if name not in shown
            ]
        return signature.replace(parameters=parameters)


class CheckedOptions:
    """A base that checks the names of options before ``__init__``, where it is still known which class was called."""

    __signature__ = _Signature()

    def __new__(cls: type[T], *args: Any, **options: Any) -> T:
        """Check the names of the options."""
        if options:  # copies and pickles have none
            check_options(cls, options)
        return super().__new__(cls)


_ELSEWHERE = {
    "top_k": "k", "topk": "k", "num_experts_per_tok": "k",
    "num_experts": "n_experts", "num_local_experts": "n_experts", "n_routed_experts": "n_experts",
    "moe_intermediate_size": "expert_size", "intermediate_size": "d_ff", "dim_feedforward": "d_ff",
    "hidden_features": "d_ff", "hidden_size": "d_model", "dim": "d_model", "in_features": "d_model",
    "out_features": "d_out", "hidden_act": "activation", "num_keys": "n_sub_keys",
    "router_aux_loss_coef": "balance_weight",
}  # fmt: skip
"""Our names of what other libraries' configs call otherwise (docs/names.md), which no likeness of letters tells."""


def check_options(cls: type, options: Iterable[str]) -> None:
    """Raise unless ``cls(...)`` takes all these names, and say which are meant or which base takes them."""
    allowed = _options(cls)
    if allowed is None:
        return
    for name in options:
        if name in allowed:
            continue
        base = next((base for base in cls.__mro__[1:] if name in (_options(base) or ())), None)
        own = _ELSEWHERE.get(name)
        near = [own] if own in allowed else difflib.get_close_matches(name, allowed, n=1)
        hint = f" ({base.__name__} has it)" if base else f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(f"{cls.__name__} has no argument {name!r}{hint}; it takes {', '.join(allowed)}")


def _options(cls: Any) -> list[str] | None:
    """Names that a class takes by keyword; None if it does not say what its ``**options`` are."""
    found: list[str] = []
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if parameter.kind is not parameter.VAR_KEYWORD:
            found.append(name)
            continue
        try:
            options = typing.get_type_hints(cls.__init__).get(name)
        except Exception:  # annotations of a user's class need not mean anything at run time
            return None
        if not typing.is_typeddict(options):
            return None
        found += options.__annotations__
    return found


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
        return {name: value for name, value in self.__dict__.items() if name not in _METHODS}

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


class OptionOf:
    """An option of a module that its parts have: read from the first of them, set and checked in all.

    Args:
        parts: of the module.
    """

    def __init__(self, parts: Callable[[Any], Sequence[nn.Module]]) -> None:
        self.parts = parts

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type) -> Any:
        return self if module is None else getattr(self.parts(module)[0], self.name)

    def __set__(self, module: Any, value: Any) -> None:
        for part in self.parts(module):
            setattr(part, self.name, value)


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

    Raises:
        TypeError: its ``forward`` does not take so many.
    """
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
