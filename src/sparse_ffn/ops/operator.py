"""Operators out of what their backends implement: schema, fake, autograd and vmap follow from the signatures.

The functions in between are written out as source and compiled, as dataclasses do it: a loop over the arguments would
cost a tenth of a small layer's time. ``Operator.source`` shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from sparse_ffn.ops.autocast import without_autocast
from sparse_ffn.ops.autograd import differentiable, once_differentiable
from sparse_ffn.ops.indices import Indices, check_indices
from sparse_ffn.ops.library import define, under_transforms

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    Sequence[int]: "SymInt[]",
    str: "str",
    bool: "bool",
    torch.dtype: "ScalarType",
}


class Part(NamedTuple):
    """An argument or a result of a backend's function."""

    name: str
    kind: type | None
    """The NamedTuple that it is; None for one tensor or option."""
    types: dict[str, str]
    """The names and types that it has in a schema."""
    optional: bool = False
    """Whether a NamedTuple may be None as a whole."""


class Operator:
    """``torch.ops.sparse_ffn.<name>``, ``<name>_backward`` and, where backends have it, ``<name>_inference``.

    They are called with the backend's arguments in their order, each NamedTuple (``Units``) unpacked, and with the
    name of the backend last. Schemas know no optional results: one that a backend leaves out (None) is an empty vector,
    so that what is kept and may be left out must have two dimensions. A backward op cannot be differentiated again.

    Args:
        name: in ``torch.ops.sparse_ffn``.
        backend: a Protocol of three functions, or the only backend itself.
            ``forward(operands, options)`` returns the output, or a tuple of it and a NamedTuple of what is kept for
            the backward pass, or a NamedTuple of outputs and of what is kept.
            ``inference``, which not every op has, takes the same and returns the first of the results.
            ``backward(gradients, tensors, options)`` returns a NamedTuple of a gradient for each trained operand, by
            its name, or the gradient of the first operand. Its arguments are named after what they are: ``grad`` of
            the first output, ``grad_<output>`` of another, operands, outputs and options of the forward pass,
            ``<operand>_size`` or ``<operand>_stride`` of an operand that need not be kept, and between tensors and
            options ``needs_<operand>``: whether its gradient is asked for, which else is None. (Those of other
            operands are computed in any case.)
        shapes: what ``forward`` returns for these arguments and, where there are several, this backend, uninitialised.
        implementation: the module of the backend that a name means.
        indices: of ``forward`` and of ``backward``: the indices that must be checked, for these arguments.
        gradient: an uninitialised gradient of a tensor.
    """

    def __init__(
        self,
        name: str,
        backend: Any,
        shapes: Callable[..., Any],
        *,
        implementation: Callable[[str], Any] | None = None,
        indices: tuple[Callable[..., Iterable[Indices]] | None, Callable[..., Iterable[Indices]] | None] = (None, None),
        gradient: Callable[[Tensor], Tensor] = lambda t: t.new_empty(t.shape),
    ) -> None:
        self.source = ""
        self._names = {
            **{"module": backend, "implementation": implementation, "shapes": shapes, "gradient": gradient},
            **{"forward_indices": indices[0], "inference_indices": indices[0], "backward_indices": indices[1]},
            **{"check_indices": check_indices, "without_autocast": without_autocast},
        }
        choice = {} if implementation is None else {"backend": "str"}
        operands, outputs = _arguments(backend.forward), _results(backend.forward, "out")
        arguments, gradients = _arguments(backend.backward), _results(backend.backward, operands[0].name)
        passed, back = _types(operands) | choice, _types(arguments) | choice

        backward = define(
            _schema(f"{name}_backward", back, gradients),
            self._kernel("backward", arguments, gradients, choice, kept=_types(outputs)),
            self._backward_fake(back, gradients),
        )
        self._names["backward"] = once_differentiable(backward)
        self.forward = differentiable(
            define(
                _schema(name, passed, outputs),
                self._kernel("forward", operands, outputs, choice),
                self._fake("forward_fake", operands, outputs, outputs, choice),
            ),
            self._formula(operands, list(passed), outputs, back, gradients),
            self._setup_context(passed, outputs, back),
        )
        """The outputs, with a gradient, and what is kept."""
        if hasattr(backend, "inference"):
            first = _results(backend.inference, "out")
            self.inference = define(
                _schema(f"{name}_inference", passed, first),
                self._kernel("inference", operands, first, choice),
                self._fake("inference_fake", operands, outputs, first, choice),
            )
            """The first outputs, without a gradient."""

    def _kernel(
        self, name: str, arguments: list[Part], results: list[Part], choice: Iterable[str], kept: Iterable[str] = ()
    ) -> Callable[..., Any]:
        """The op itself: a call of a backend's function."""
        packed, lines = self._packed(arguments, kept), []
        if self._names[f"{name}_indices"] is not None:
            lines += ['if backend != "cpu":  # the core checks them itself']
            lines += [f"    check_indices(*{name}_indices({packed}))"]
        call = f"{'implementation(backend)' if choice else 'module'}.{name}({packed})"
        lines += _unpacked(call, results, results)
        if name == "backward":  # which may be called inside of an autocast that the forward pass was not
            tensor = next(argument for argument, kind in _types(arguments).items() if kind == "Tensor")
            lines = [f"with without_autocast({tensor}):", *(f"    {line}" for line in lines)]
        return self._function(name, [*_types(arguments), *choice], lines)

    def _fake(
        self, name: str, arguments: list[Part], outputs: list[Part], returned: list[Part], choice: Iterable[str]
    ) -> Callable[..., Any]:
        lines = _unpacked(f"shapes({', '.join([self._packed(arguments), *choice])})", outputs, returned)
        return self._function(name, [*_types(arguments), *choice], lines)

    def _backward_fake(self, arguments: dict[str, str], gradients: list[Part]) -> Callable[..., Any]:
        def of(name: str) -> str:
            if name not in arguments:
                return f"grad.new_empty_strided({name}_size, {name}_stride)"
            there = self._there(name, arguments, gradients)
            return f"gradient({name}) if {there} else {first}.new_empty(0)" if there else f"gradient({name})"

        names, first = _types(gradients), _always_there(gradients)
        return self._function("backward_fake", [*arguments], [f"return {', '.join(map(of, names))}"])

    def _setup_context(self, passed: dict[str, str], outputs: list[Part], back: dict[str, str]) -> Callable[..., Any]:
        """What a forward pass keeps: what the backward op is called with."""

        def found(name: str) -> str:
            if name in passed or name in results:
                return name
            operand, _, method = name.rpartition("_")
            return f"{operand}.{method}()"

        results, grads = list(_types(outputs)), _gradients(back)
        constant = [name for i, name in enumerate(results) if (f"grad_{name}" if i else "grad") not in grads]
        kept = [name for name, kind in back.items() if kind.startswith("Tensor") and name not in grads]
        options = [found(name) for name in back if name not in (*kept, *grads) and not name.startswith("needs_")]
        return self._function(
            "setup_context",
            ["ctx", "inputs", "output"],
            [
                f"{', '.join(passed)} = inputs",
                f"{', '.join(results)} = output",
                f"ctx.save_for_backward({', '.join(kept)})",
                f"ctx.options = [{', '.join(options)}]",
                f"ctx.mark_non_differentiable({', '.join(constant)})",
                "ctx.set_materialize_grads(False)",
            ],
        )

    def _formula(
        self,
        operands: list[Part],
        passed: list[str],
        outputs: list[Part],
        back: dict[str, str],
        gradients: list[Part],
    ) -> Callable[..., Any]:
        """The gradients of the forward op's arguments, by the backward op."""

        def of(name: str) -> str:
            if name not in trained:
                return "None"
            there = self._there(name, back, gradients)
            return f"d{name} if {there} else None" if there else f"d{name}"

        def needs(part: Part) -> str:
            asked = " or ".join(f"ctx.needs_input_grad[{passed.index(name)}]" for name in part.types)
            return f"needs_{part.name} = {asked}"

        grads, trained = _gradients(back), _types(gradients)
        kept = [name for name, kind in back.items() if kind.startswith("Tensor") and name not in grads]
        flags = [name for name in back if name.startswith("needs_")]
        arguments, results = ", ".join([*grads, *kept, *flags]), ", ".join(f"d{name}" for name in trained)
        given = [f"grad_{name}" if i else "grad" for i, name in enumerate(_types(outputs))]
        return self._function(
            "formula",
            ["ctx", *given],
            [
                f"if {' and '.join(f'{grad} is None' for grad in grads)}:",
                f"    return {', '.join('None' for _ in passed)}",
                f"[{', '.join(kept)}] = ctx.saved_tensors",
                *(needs(part) for part in operands if f"needs_{part.name}" in flags),
                f"{results} = backward({arguments}, *ctx.options)",
                f"return {', '.join(map(of, passed))}",
            ],
        )

    def _there(self, name: str, arguments: dict[str, str], gradients: list[Part]) -> str:
        """The condition for a gradient to be there; empty if it always is."""
        flag = next(f"needs_{part.name}" for part in gradients if name in part.types)
        conditions = [flag] if flag in arguments else []
        return " and ".join([*conditions, f"{name} is not None"] if arguments.get(name) == "Tensor?" else conditions)

    def _packed(self, parts: list[Part], kept: Iterable[str] = ()) -> str:
        """A schema's arguments as a backend takes them; what a forward pass left out is None again."""

        def one(name: str, kind: str) -> str:
            return f"None if {name}.ndim == 1 else {name}" if kind == "Tensor?" and name in kept else name

        def of(part: Part) -> str:
            fields = ", ".join(one(*field) for field in part.types.items())
            if part.kind is None:
                return fields
            self._names[part.kind.__name__] = part.kind
            return f"{part.kind.__name__}({fields})"

        return ", ".join(map(of, parts))

    def _function(self, name: str, arguments: list[str], lines: list[str]) -> Callable[..., Any]:
        source = "\n    ".join((f"def {name}({', '.join(arguments)}):", *lines, "\n"))
        self.source += source
        made: dict[str, Callable[..., Any]] = {}
        exec(source, self._names, made)
        return made[name]


def wanted(*operands: Tensor | None) -> bool:
    """Whether the gradient of an operand may be asked for, so that the forward pass must keep what it needs."""
    asked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    # where dynamo traces a transform its tensors do not tell: without this torch.func.grad would be 0, not refused
    return asked or under_transforms() or torch._C._are_functorch_transforms_active()


def _unpacked(call: str, results: list[Part], returned: list[Part]) -> list[str]:
    """A call of a backend's function, and what a schema knows of its results."""
    if len(results) == 1:
        return [f"return {call}"]
    first = _always_there(results)
    optional = [part for part in results if part.optional]
    targets = (f"({', '.join(part.types)})" if part.kind and not part.optional else part.name for part in results)
    values = (
        name if kind == "Tensor" else f"{first}.new_empty(0) if {name} is None else {name}"
        for name, kind in _types(returned).items()
    )
    return [
        f"{', '.join(targets)} = {call}",
        *(f"{', '.join(part.types)} = {part.name} or (None,) * {len(part.types)}" for part in optional),
        f"return {', '.join(values)}",
    ]


def _always_there(results: list[Part]) -> str:
    return next(name for name, kind in _types(results).items() if kind == "Tensor")


def _gradients(arguments: Iterable[str]) -> list[str]:
    return [name for name in arguments if name == "grad" or name.startswith("grad_")]


def _arguments(function: Callable[..., Any]) -> list[Part]:
    return [_part(name, hint) for name, hint in get_type_hints(function).items() if name != "return"]


def _results(function: Callable[..., Any], first: str) -> list[Part]:
    """Results by their name in a NamedTuple; without one the first of them has this name."""
    hint = get_type_hints(function)["return"]
    if hint in _TYPES:
        return [_part(first, hint)]
    if get_origin(hint) is tuple:
        return [_part(first if i == 0 else "saved", part) for i, part in enumerate(get_args(hint))]
    return [_part(name, part) for name, part in get_type_hints(hint).items()]


def _part(name: str, hint: Any) -> Part:
    if hint in _TYPES:
        return Part(name, None, {name: _TYPES[hint]})
    kind, *none = get_args(hint) or (hint,)
    types = {field: _TYPES[Tensor | None if none else of] for field, of in get_type_hints(kind).items()}
    return Part(name, kind, types, bool(none))


def _types(parts: list[Part]) -> dict[str, str]:
    """The names and types of all parts in a schema."""
    return dict(chain.from_iterable(part.types.items() for part in parts))


def _schema(name: str, arguments: dict[str, str], results: list[Part]) -> str:
    taken = ", ".join(f"{kind} {argument}" for argument, kind in arguments.items())
    return f"{name}({taken}) -> ({', '.join('Tensor' for _ in _types(results))})"
