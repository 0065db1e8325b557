"""Argument checks whose messages name the argument, its value and what is allowed.

Those of numbers and flags return Python's own: NumPy's are taken, but would not go into JSON or a readable repr.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_ffn.backends.libraries import DTYPES


def check_positive(name: str, value: Any, at_most: int | None = None, limit: str = "") -> int:
    """The value, if it is an int >= 1 and at most ``at_most`` (named ``limit`` in the message)."""
    number = _int(name, value)
    if number < 1 or (at_most is not None and number > at_most):
        upper = "" if at_most is None else f" and at most {limit} = {at_most}"
        raise ValueError(f"{name} must be at least 1{upper}, got {number}")
    return number


def check_count(name: str, value: Any) -> int:
    """The value, if it is an int >= 0."""
    number = _int(name, value)
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {number}")
    return number


def _int(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, (bool, Tensor)):  # a tensor would wait for its device
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be an int, got {shown(value)}")


def check_rate(name: str, value: Any, inclusive: bool = False) -> float:
    """The value, if 0 <= value < 1 (<= 1 if inclusive)."""
    allowed = f"in [0, 1{']' if inclusive else ')'}"
    number = _float(name, value, allowed)
    if not (0 <= number < 1 or (inclusive and number == 1)):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return number


def called(name: str) -> str:
    """A module's name in a model as a sentence can hold it: a Sequential names its modules by numbers."""
    return repr(name) if name else "the layer"


def check_real(name: str, value: Any) -> float:
    """The value, if it is a finite number."""
    number = _float(name, value, "a finite number")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {shown(value)}")
    return number


def check_finite(name: str, value: Any, positive: bool = False) -> float:
    """The value, if it is a finite number >= 0 (> 0 if positive)."""
    allowed = f"finite and {'>' if positive else '>='} 0"
    number = _float(name, value, allowed)
    if not 0 <= number < math.inf or (positive and number == 0):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return number


def _float(name: str, value: Any, allowed: str) -> float:
    """The value, if it is a number."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {allowed}, got more than the largest float") from None


def check_flag(name: str, value: Any) -> bool:
    """The value, if it is True or False."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return flag


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise unless value is one of the allowed words."""
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def check_type(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raise unless value is of a kind that is called ``what`` in the message."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got a value of type {type(value).__name__}")


def check_function(name: str, value: Any, of: str) -> None:
    """Raise unless value can be called; ``of`` says with what."""
    if not callable(value):
        raise TypeError(f"{name} must be a function of {of}, got {shown(value)}")


def check_module(name: str, value: Any) -> None:
    """Raise unless value is a module."""
    check_type(name, value, nn.Module, "a torch.nn.Module")


def check_changeable(name: str, model: Any) -> None:
    """Raise unless the parameters of a model may be replaced: it is a module, and no reducer holds the old ones."""
    check_module(name, model)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{name} holds a DistributedDataParallel, which would average the parameters of before: change the module "
            "that it wraps, and wrap it anew"
        )


GIVE_BACK = "call accelerate.hooks.remove_hook_from_submodules(model), or load without offload, first"


def held(model: nn.Module, tensor: Tensor) -> str | None:
    """Why nothing can be made of a tensor of a model: accelerate holds it, on meta but while its module runs.

    What was made of it would have no numbers, or accelerate would go on computing with the old ones.
    """
    if tensor.is_meta and any(hasattr(module, "_hf_hook") for module in model.modules()):
        return f"on meta, since accelerate holds these weights: {GIVE_BACK}"
    return None


def check_held(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Raise ValueError if accelerate holds a tensor of a model."""
    if (why := held(model, tensor)) is not None:
        raise ValueError(f"{name} is {why}")


def check_loaded(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor of a model has no numbers."""
    check_held(model, name, tensor)
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta: load the weights first")


def check_current(layer: nn.Module, name: str) -> None:
    """Raise ValueError unless a tensor of a layer, if it has one, is there whole, and what its next forward takes."""
    tensor: Tensor | None = operator.attrgetter(name)(layer)
    if tensor is None:
        return
    check_held(layer, name, tensor)
    if is_dtensor(tensor):
        raise ValueError(f"{name} is sharded over processes: give a layer with its full_tensor()")
    owner, _, attribute = name.rpartition(".")
    if attribute in vars(layer.get_submodule(owner)):  # neither parameter nor buffer: a hook sets it in each forward
        raise ValueError(
            f"{name} is masked or normalised by a hook, and may be a step old: make it permanent first, by "
            "torch.nn.utils.prune.remove or remove_weight_norm"
        )


def check_plain(module: nn.Module, name: str, where: str, then: str) -> None:
    """Raise ValueError unless a tensor is the module's own parameter, which a change in place or a copy is enough for.

    What a mask, a parametrisation or weight_norm makes is computed anew, by some of them in the next forward only.
    """
    if name not in module._parameters or is_traceable_wrapper_subclass(module._parameters[name]):
        raise ValueError(f"{where}: {name} is no plain parameter, but masked, parametrised or sharded: {then}")


def check_unadapted(model: nn.Module, parameters: Iterable[tuple[nn.Module, Iterable[str]]]) -> None:
    """Raise ValueError if one of some modules' parameters has an adapter by peft's ``target_parameters``.

    Such a wrapper is around the module, finds the parameter by its name in each forward, and merges into it.
    """
    names = {module: {*some} for module, some in parameters}
    for place, wrapper in model.named_modules():
        base = getattr(wrapper, "get_base_layer", None)
        name: Any = getattr(wrapper, "parameter_name", None)
        if base is not None and name in names.get(base(), ()):
            raise ValueError(f"{called(place)}: {name} has an adapter of peft: call merge_and_unload() or unload()")


def check_tensor(name: str, x: Any) -> None:
    """Raise unless x is a tensor of numbers that lie in memory by strides, as kernels read them."""
    check_type(name, x, Tensor, "a tensor")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested one" if x.layout is torch.strided else f"one of layout {_word(x.layout)}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def check_floating(name: str, x: Any) -> None:
    """Raise unless x is a dense tensor of real numbers."""
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {_word(x.dtype)}")
    if x.dtype.itemsize < 2:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {_word(x.dtype)}")


def check_mask(mask: Any, x: Tensor) -> None:
    """Raise unless a mask is bool and says of each token of x [..., width] whether it is real."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = real token), got {_word(mask.dtype)}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must have x's shape without its last dimension, {list(x.shape[:-1])}, "
                         f"got {list(mask.shape)}")  # fmt: skip
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, x is on {x.device}")


def is_dtensor(x: Any) -> bool:
    """Whether x is a tensor that a mesh of processes holds, told without the import that makes one."""
    return type(x) not in (Tensor, nn.Parameter) and isinstance(x, Tensor) and hasattr(x, "device_mesh")


def check_places(x: Tensor, parameters: Mapping[str, Tensor | None]) -> None:
    """Raise unless all, by name, are where x is: kernels trust pointers, and loaders leave parameters on meta.

    Raises:
        ValueError: a parameter on another device.
        TypeError: a DTensor.
    """
    for name, parameter in parameters.items():
        if parameter is not None:
            _check_place(x, name, parameter, False)


def check_parameters(
    x: Tensor, parameters: Mapping[str, Tensor | None], any_kind: tuple[str, ...] = (), split: bool = False
) -> None:
    """The same of a layer's parameters, which must be memory that kernels read.

    A quantiser's tensor keeps its numbers in other tensors, and computes in torch's operators alone.

    Args:
        x: the tokens.
        parameters: by name.
        any_kind: names of those that may be a quantiser's tensors.
        split: whether the layer knows what to do with DTensors.
    """
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        _check_place(x, name, parameter, split)
        kind = type(parameter)
        if kind is nn.Parameter or kind is type(x) or not is_traceable_wrapper_subclass(parameter):
            continue
        if name not in any_kind and not is_dtensor(parameter):
            raise TypeError(
                f"{name} must be a parameter whose memory holds its numbers, got torchao's or another library's "
                f"{kind.__name__}: leave {name} out of what is quantised, or set it back by "
                f"layer.{name} = torch.nn.Parameter(layer.{name}.dequantize())"
            )


def _check_place(x: Tensor, name: str, parameter: Tensor, split: bool) -> None:
    if parameter.device != x.device:
        raise ValueError(f"x is on {x.device}, but the layer's {name} is on {parameter.device}")
    if is_dtensor(parameter) and not split:
        raise TypeError(
            f"the layer's {name}, of shape {list(parameter.shape)}, is a DTensor, which this layer does not compute "
            "with: split layers with the styles of sparse_ffn.parallel, or shard them with fully_shard"
        )


def shape_error(tensors: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> ValueError:
    """The error for tensors that do not fit each other: names those that have not the shape they were made with."""
    wrong = (
        f"{name} must have shape {list(shape)}, got {list(tensor.shape)}"
        for name, (tensor, shape) in tensors.items()
        if tensor is not None and tensor.shape != shape
    )
    return ValueError("; ".join(wrong))


def check_dtype(dtype: Any) -> None:
    """Raise unless dtype is None or one that parameters can have."""
    allowed = (*DTYPES, torch.float64)
    if dtype is not None and dtype not in allowed:
        raise TypeError(f"dtype must be one of {', '.join(map(str, allowed))} or None, got {shown(dtype)}")


def check_device(device: Any) -> None:
    """Raise unless torch takes it for a device; None is its default."""
    try:
        torch.device("cpu" if device is None else device)
    except (TypeError, RuntimeError) as error:
        reason = f" ({str(error).splitlines()[0]})" if isinstance(error, RuntimeError) else ""
        raise TypeError(
            f"device must be a torch.device, the name of one such as 'cpu' or 'cuda:1', or None, got {shown(device)}"
            f"{reason}"
        ) from None


def plain(value: Any) -> Any:
    """NumPy's scalars as Python's, in tuples and lists too; all else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value))
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def shown(value: Any) -> str:
    """A value as a sentence can hold it: short, on one line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {_word(value.dtype)}"
    text = repr(value)
    return text if len(text) < 100 and "\n" not in text else f"a value of type {type(value).__name__}"


def _word(fact: torch.dtype | torch.layout) -> str:
    return str(fact).removeprefix("torch.")
