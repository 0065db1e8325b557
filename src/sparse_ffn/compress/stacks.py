"""Stacks: where the experts of a model are, and how each of their stacks is exchanged for stored rows and back.

Other libraries' experts are taught in ``KINDS`` and ``CHANGED`` by the module of ``integrations`` that knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_ffn.checks import check_held, check_unadapted
from sparse_ffn.layers.mixed import Bank
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.rows import ExpertRows, QuantizedRows


@dataclass(frozen=True)
class Stack:
    """The attribute of a module that holds a stack of matrices."""

    module: nn.Module
    name: str
    is_values: bool = False
    """Whether its rows are added to the output; else they multiply the input."""
    transposed: bool = False
    """Whether the parameter [E, C, G] has the units' rows as its columns."""

    @property
    def held(self) -> Any:
        """A parameter, stored rows, or None."""
        return getattr(self.module, self.name)

    def rows(self) -> Tensor:
        """The parameter as rows [E, G, C]."""
        held: Tensor = self.held.detach()
        return held.mT if self.transposed else held

    def store(self, rows: ExpertRows) -> None:
        """Put stored rows in the parameter's place."""
        others = (child.order for child in self.module.children() if isinstance(child, ExpertRows))
        rows.order = next(others, tuple(self.module._parameters))
        delattr(self.module, self.name)
        setattr(self.module, self.name, rows)

    def restore(self, made: dict[Tensor, nn.Parameter]) -> None:
        """Put a parameter in the place of stored rows: the one that was made of the same numbers, if it was."""
        rows: ExpertRows = self.held
        number = rows.stored()[0]
        if number not in made:
            dense = rows.dense()
            if dense.is_inference():  # of a model that was made in inference mode: it would not train
                dense = dense.clone()
            made[number] = nn.Parameter(dense.mT.contiguous() if self.transposed else dense)
        delattr(self.module, self.name)
        setattr(self.module, self.name, made[number])
        parameters = self.module._parameters  # optimizers know them by their order
        for name in [name for name in rows.order if name in parameters]:
            parameters[name] = parameters.pop(name)

    def check_whole(self, where: str, then: str) -> None:
        """Raise ValueError unless this is a plain parameter or rows of ``quantize_experts_``, in one process."""
        held = self.held
        plain = self.name in self.module._parameters and not is_traceable_wrapper_subclass(held)
        if getattr(self.module, "_split", None) is not None or not (plain or isinstance(held, QuantizedRows)):
            raise ValueError(
                f"{where} must be a plain parameter or rows of quantize_experts_, got {type(held).__name__} that "
                f"something computes or distributes: {then}"
            )


def stacks_of_moe(module: nn.Module) -> list[Stack]:
    """The stacks of one of our layers, or of a bank of its experts; none of another module."""
    names = ("keys", "gate_keys", "values") if isinstance(module, (MoE, Bank)) else ()
    return [Stack(module, name, name == "values") for name in names if getattr(module, name) is not None]


KINDS: list[Callable[[nn.Module], list[Stack]]] = [stacks_of_moe]
"""Of each kind of modules with experts, what their stacks are; none of other modules."""

CHANGED: list[Callable[[nn.Module], None]] = []
"""Called with a model in which experts were quantised, offloaded, or made dense again."""


def tell(model: nn.Module) -> None:
    """Say that a model's experts are stored in another form now."""
    for told in CHANGED:
        told(model)


def untaught(model: nn.Module) -> str:
    """What to add to the words that a model has no experts: perhaps it has some that nobody has taught."""
    others = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "is_transposed")})
    if not others:
        return ""
    if len(KINDS) == 1:
        return "; for the experts of transformers' models import sparse_ffn.integrations.transformers first"
    return f"; {', '.join(others)}: no plain stacks of numbers; another library's codes are to be loaded dequantised"


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Stack]]]:
    """The modules with experts in a model, each once, by name, with their stacks."""
    for name, module in model.named_modules():
        if stacks := next((found for stacks_of in KINDS if (found := stacks_of(module))), None):
            yield name, module, stacks


def check_here(model: nn.Module, places: Iterable[tuple[str, nn.Module, list[Stack]]]) -> None:
    """Raise ValueError where accelerate holds a stack or peft adapts one; ``places`` are of ``experts_of``."""
    places = list(places)
    check_unadapted(model, [(module, [stack.name for stack in stacks]) for _, module, stacks in places])
    for name, _, stacks in places:
        for stack in stacks:
            held = stack.held
            for tensor in held.stored() if isinstance(held, ExpertRows) else [held]:
                check_held(model, f"{name}.{stack.name}" if name else stack.name, tensor)
