"""What torch.nn.utils.parametrize keeps on a layer, able to hold parameters that are named keys and values."""

from __future__ import annotations

from typing import Any

from torch import nn

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
