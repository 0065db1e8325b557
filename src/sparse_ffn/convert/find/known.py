"""Known FFNs: what was found by an example, as plain values, for a model of the same class that cannot run one.

So is a model that is being loaded: its weights are on meta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparse_ffn.convert.find.edits import Edit
from sparse_ffn.convert.find.found import Formula, Found
from sparse_ffn.convert.find.linear import Linear


def to_values(f: Found) -> dict[str, Any]:
    """A pair of linear maps in a larger module, ready for JSON; ``from_values`` goes back."""
    return {
        "down": f.down.name,
        "activation": f.formula.activation,
        "scale": f.formula.scale,
        "dropout": f.dropout,
        "enclosing": f.enclosing,
        "edits": [[e.owner, e.attribute, None if e.value is nn.Identity else e.value] for e in f.edits],
    }


def from_values(model: nn.Module, name: str, values: Any, linears: Mapping[str, Linear]) -> Found:
    """The pair whose first linear map has this name.

    Args:
        model: what holds it.
        name: of the first linear map.
        values: of ``to_values``; they may come from anywhere.
        linears: the model's, by name.

    Raises:
        ValueError: no such pair is in the model, or the values are damaged.
    """
    try:
        up, down = linears[name], linears[values["down"]]
        edits = tuple(Edit(o, a, nn.Identity if value is None else float(value)) for o, a, value in values["edits"])
        enclosing = model.get_submodule(values["enclosing"])
        here = all(hasattr(enclosing.get_submodule(edit.owner), edit.attribute) for edit in edits)
        formula = Formula(str(values["activation"]), "", float(values["scale"]))
        found = Found(
            name, up.module, (up,), down, formula, float(values["dropout"]), enclosing=values["enclosing"], edits=edits,
            by_example=True,
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what is known of the FFN at {name!r} does not fit this model: {error!r}") from error
    if not here or up.n_out != down.n_in:
        raise ValueError(f"what is known of the FFN at {name!r} does not fit this model: {values}")
    return found
