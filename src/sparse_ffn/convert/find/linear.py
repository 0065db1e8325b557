"""Linear maps of any library: which modules are one, and which way round their weight lies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from sparse_ffn.checks import GIVE_BACK
from sparse_ffn.convert.find.probe import HOOKS, Arguments, close, probe_copy, probe_input, run


@dataclass(frozen=True)
class Linear:
    """A module that computes W x + b: ``nn.Linear``, or one that proved to, as GPT-2's Conv1D whose weight is Wᵀ."""

    module: nn.Module
    name: str
    transposed: bool
    parameters: tuple[str, str] = ("weight", "bias")
    """What the module calls them."""
    stated: tuple[int, int] | None = None
    """Input and output width, if the module only says that it is a linear map and has no plain weight."""

    def within(self, base: str) -> str:
        """Its name relative to a module that holds it."""
        return self.name.removeprefix(f"{base}.")

    @property
    def attribute(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def weight(self) -> Tensor:
        """[out, in]: a view of the module's parameter."""
        weight = getattr(self.module, self.parameters[0])
        assert isinstance(weight, Tensor)
        return weight.detach().t() if self.transposed else weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """[out], if there is one."""
        bias = getattr(self.module, self.parameters[1], None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def n_in(self) -> int:
        """Input width."""
        return self.weight.shape[1] if self.stated is None else self.stated[0]

    @property
    def n_out(self) -> int:
        """Output width."""
        return self.weight.shape[0] if self.stated is None else self.stated[1]

    @property
    def trainable(self) -> tuple[bool, bool]:
        """Whether weight and bias want gradients."""
        weight, bias = (getattr(self.module, name, None) for name in self.parameters)
        return bool(weight is not None and weight.requires_grad), bool(bias is not None and bias.requires_grad)

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be replaced, if it only says that it is a linear map: what it is and holds."""
        if self.stated is None:
            return None
        kind = f"{type(self.module).__module__}.{type(self.module).__qualname__}"
        holds = ", ".join(name for name, _ in self.module.named_parameters()) or "no parameters"
        return f"{self.name} has no plain weight: it is a {kind} with {holds}"


def linear_maps(model: nn.Module) -> dict[nn.Module, Linear]:
    """The linear maps of a model, without those within another one, as LoRA's are.

    Raises:
        ValueError: a parameter has no shape yet.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet: run the model once, so that its lazy modules get theirs")
    found: dict[nn.Module, Linear] = {}
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inner and (linear := as_linear(name, module)) is not None:
            found[module] = linear
            inner |= set(module.modules())
    return found


def as_linear(name: str, module: nn.Module) -> Linear | None:
    """The module as a linear map, None if it is none.

    Unless it is an ``nn.Linear``, a copy runs. A map that is wrapped, parametrised, pruned or quantised is known by the
    widths that it states, and has an obstacle.
    """
    return _plain(name, module) or _stated(name, module)


def _stated(name: str, module: nn.Module) -> Linear | None:
    """A linear map that only says so by its widths."""
    n_in, n_out = (getattr(module, width, None) for width in ("in_features", "out_features"))
    if type(n_in) is not int or type(n_out) is not int:
        return None
    parts = [part for part in module.children() if next(part.parameters(), None) is not None]
    if parts and not isinstance(module, nn.Linear):  # a wrapper holds such a linear map, an FFN holds none
        inner = [linear for part in parts if (linear := as_linear("", part)) is not None]
        if n_in == n_out or all((linear.n_in, linear.n_out) != (n_in, n_out) for linear in inner):
            return None
    return Linear(module, name, transposed=False, stated=(n_in, n_out))


def _plain(name: str, module: nn.Module) -> Linear | None:
    """A linear map with a matrix of numbers for its weight."""
    parameters = dict(module.named_parameters(recurse=False))
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or set(parameters) - {"weight", "bias"}:
        return None
    if isinstance(module, nn.Embedding) or next(module.children(), None) is not None:
        return None
    if type(module) is nn.Linear:
        return Linear(module, name, transposed=False)
    for transposed in (False, True):
        n_out, n_in = weight.shape[::-1] if transposed else weight.shape
        if bias is not None and bias.shape != (n_out,):
            continue
        try:
            copied = probe_copy(module)
            x = probe_input(n_in)
            y = run(copied, Arguments((x,))).outputs
        except Exception:  # it takes no such input, so it is no linear map this way round
            continue
        found = Linear(copied, name, transposed)
        if len(y) == 1 and close(y[0], F.linear(x, found.weight, found.bias)):
            return Linear(module, name, transposed)
    return None


def patched(module: nn.Module) -> str | None:
    """That the module has a ``forward`` of its own, and who may have given it one."""
    forward = vars(module).get("forward")
    if forward is None or getattr(forward, "__func__", module) is getattr(type(module), "forward", None):
        return None  # the class's own is what accelerate's hooks leave when they are removed
    by = f", by accelerate: {GIVE_BACK}" if hasattr(module, "_hf_hook") else ""
    return f"forward of {type(module).__name__} is patched{by}"


def hooks(module: nn.Module) -> str | None:
    """What would be lost if the module, or one inside it, went away: hooks, or parameters of a special kind."""
    for inner in module.modules():
        for kind in HOOKS:
            if getattr(inner, kind, None):
                return f"{type(inner).__name__} has {kind.strip('_').replace('_', ' ')}"
        if (why := patched(inner)) is not None:
            return why
        for name, parameter in inner.named_parameters(recurse=False):
            if type(parameter) is not nn.Parameter:  # it is quantised or sharded, and its numbers are not at hand
                return f"{name} of {type(inner).__name__} is a {type(parameter).__name__}"
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return f"{name} of {type(inner).__name__} has gradient hooks"
    return None
