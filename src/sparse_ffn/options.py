"""Options by name: checked where a class is called, shown by its signature, and set on the parts that have them."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Union

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:  # Python 3.10 has none: there typing.get_type_hints gives the TypedDict itself
    Unpack = Union

T = TypeVar("T", bound="CheckedOptions")


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
