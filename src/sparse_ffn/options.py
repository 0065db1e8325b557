"""Keyword arguments of layers and routers: typed where they are handed on, and errors that say who takes what."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, Union

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:  # Python 3.10 has none: there typing.get_type_hints gives the TypedDict itself
    Unpack = Union

T = TypeVar("T", bound="CheckedOptions")


class CheckedOptions:
    """A base that refuses options before ``__init__`` hands them to a class that does not know where they came from.

    ``__new__`` has a class of its own so that ``inspect.signature`` finds the ``__init__`` of all that inherit.
    """

    def __new__(cls: type[T], *args: Any, **options: Any) -> T:
        """Check the names of the options."""
        if options:  # copies and pickles have none
            check_options(cls, options)
        return super().__new__(cls)


def check_options(cls: type, options: Iterable[str]) -> None:
    """Raise unless ``cls(...)`` takes all these names, and say which are near or which base takes them."""
    allowed = _options(cls)
    if allowed is None:
        return
    for name in options:
        if name in allowed:
            continue
        base = next((base for base in cls.__mro__[1:] if name in (_options(base) or ())), None)
        near = difflib.get_close_matches(name, allowed, n=1)
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
