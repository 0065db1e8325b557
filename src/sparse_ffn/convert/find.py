"""Finding the FFNs of a model by what modules compute, not by what they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparse_ffn.convert.linears import Linear, as_linear, hooks
from sparse_ffn.convert.probe import Call, Trace, close, probe_copy, probe_input, run, same_outputs
from sparse_ffn.convert.weights import FFNWeights
from sparse_ffn.ops.activations import ACTIVATIONS, hidden


class Unknown(Exception):
    """Why something that looked like an FFN by its shapes is left as it is."""


@dataclass(frozen=True)
class Formula:
    """What was found between the linear maps of an FFN."""

    activation: str
    gate: str
    """Where a GLU's gate is: ``""`` none, ``"first"`` or ``"second"`` of two linear maps, or in one of doubled width
    ``"first half"``, ``"second half"``, ``"even"`` or ``"odd"`` rows."""

    def hidden(self, ups: list[Tensor]) -> Tensor:
        """Hidden units from the linear maps' outputs."""
        up, gate = self.part(ups)
        return hidden(self.activation, *((up, None) if gate is None else (gate, up)), None)

    def part(self, ups: list[Tensor], dim: int = -1) -> tuple[Tensor, Tensor | None]:
        """The plain part and the gate, of outputs, weights or biases whose units lie along ``dim``."""
        if not self.gate:
            return ups[0], None
        if self.gate in ("first", "second"):
            a, b = ups
        elif "half" in self.gate:
            a, b = ups[0].chunk(2, dim)
        else:
            index = torch.arange(0, ups[0].shape[dim], 2, device=ups[0].device)
            a, b = ups[0].index_select(dim, index), ups[0].index_select(dim, index + 1)
        return (b, a) if self.gate in ("first", "first half", "even") else (a, b)


@dataclass(frozen=True)
class Edit:
    """One attribute of a module within the enclosing one that gets a new value when a layer is put in."""

    owner: str
    attribute: str
    value: object


@dataclass(frozen=True)
class Found:
    """An FFN in a model."""

    name: str
    """Where its replacement will be."""
    module: nn.Module
    """What is there now."""
    ups: tuple[Linear, ...]
    down: Linear
    formula: Formula
    dropout: float
    """On the hidden units."""
    out_dropout: float = 0.0
    """On the output; lost with the module unless put back."""
    enclosing: str = ""
    """The module that the edits' owners are relative to."""
    edits: tuple[Edit, ...] = ()
    """What else changes, where the FFN is not one module."""

    @property
    def pattern(self) -> str:
        """In words: the linear maps' names and the formula."""
        names = ", ".join(linear.name.rpartition(".")[2] for linear in (*self.ups, self.down))
        return f"{names}: {self.formula.activation}{' GLU' if self.formula.gate else ''}"

    def weights(self) -> FFNWeights:
        """The parameters, as views in this library's layout."""
        keys, gate_keys = self.formula.part([up.weight for up in self.ups], 0)
        biases = [up.bias for up in self.ups]
        key_bias = gate_bias = None
        if any(bias is not None for bias in biases):
            filled = [up.weight.new_zeros(up.n_out) if b is None else b for up, b in zip(self.ups, biases, strict=True)]
            key_bias, gate_bias = self.formula.part(filled, 0)
            if self.formula.gate in ("first", "second"):
                missing = [bias is None for bias in biases]
                of_key, of_gate = missing[::-1] if self.formula.gate == "first" else missing
                key_bias, gate_bias = (None if of_key else key_bias), (None if of_gate else gate_bias)
        key, gate = self.ups[0], self.ups[-1]
        if self.formula.gate == "first":
            key, gate = gate, key
        trainable = {
            "keys": key.trainable[0], "gate_keys": gate.trainable[0], "key_bias": key.trainable[1],
            "gate_bias": gate.trainable[1], "values": self.down.trainable[0], "out_bias": self.down.trainable[1],
        }  # fmt: skip
        return FFNWeights(
            keys, self.down.weight.t(), self.formula.activation, gate_keys=gate_keys, key_bias=key_bias,
            gate_bias=gate_bias, out_bias=self.down.bias, dropout=self.dropout, trainable=trainable,
        )  # fmt: skip


def find(model: nn.Module) -> tuple[list[Found], dict[str, str]]:
    """All FFNs of a model, in its order, and the names and reasons of what looked like one and is none."""
    linears = {
        module: linear
        for name, module in model.named_modules()
        if (linear := as_linear(name, module)) is not None
    }  # fmt: skip
    found: list[Found] = []
    unknown: dict[str, str] = {}
    done: set[nn.Module] = set()
    names = dict(model.named_modules())
    for name, module in reversed(names.items()):  # from the inside out
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or module in linears:
            continue
        inside = [linears[m] for m in module.modules() if m in linears]
        reasons: list[str] = []
        block = _block_roles(module, inside) if name and not done & {linear.module for linear in inside} else None
        if block is not None:
            try:
                found.append(_block(name, module, *block))
                done |= {linear.module for linear in inside}
                continue
            except Unknown as why:
                reasons.append(str(why))
        for up, down in _pairs(name, module, inside):
            if done & {up.module, down.module}:
                continue
            try:
                found.append(_pair(name, module, up, down, inside))
                reasons.clear()
            except Unknown as why:
                reasons.append(str(why))
                unknown[up.name] = f"{', '.join(dict.fromkeys(reasons))}; {_seen(module)}"
            done |= {up.module, down.module}
        if reasons and block is not None and not done & {linear.module for linear in inside}:
            unknown[name] = f"{reasons[0]}; {_seen(module)}"
            done |= {linear.module for linear in inside}
    order = {name: i for i, name in enumerate(names)}
    return sorted(found, key=lambda f: order[f.name]), {n: unknown[n] for n in sorted(unknown, key=order.__getitem__)}


def find_one(module: nn.Module) -> Found:
    """A module that is an FFN itself.

    Raises:
        ValueError: it is none; the message says why and what was seen.
    """
    inside = [linear for name, m in module.named_modules() if (linear := as_linear(name, m)) is not None]
    roles = _block_roles(module, inside)
    try:
        if roles is None:
            raise Unknown("its matrices are not those of a two-layer FFN")
        return _block("", module, *roles)
    except Unknown as why:
        raise ValueError(f"{why}; {_seen(module)}") from None


def _seen(module: nn.Module) -> str:
    kinds = [type(m).__name__ for m in module.modules() if not any(True for _ in m.children())]
    return f"seen in {type(module).__name__}: {', '.join(dict.fromkeys(kinds))}"


# ------------------------------------------------------------------------------- an FFN that is a module of its own


def _block_roles(module: nn.Module, inside: list[Linear]) -> tuple[list[Linear], Linear] | None:
    """The linear maps of a module that by its shapes can be an FFN and nothing else: the first ones, the last one."""
    if len(inside) not in (2, 3) or sum(1 for _ in module.parameters()) != sum(
        1 for linear in inside for _ in linear.module.parameters()
    ):
        return None
    for down in reversed(inside):
        ups = [linear for linear in inside if linear is not down]
        widths = {(up.n_in, up.n_out) for up in ups}
        if len(widths) == 1 and ups[0].n_out in ((down.n_in, 2 * down.n_in) if len(ups) == 1 else (down.n_in,)):
            return ups, down
    return None


def _block(name: str, module: nn.Module, ups: list[Linear], down: Linear) -> Found:
    if (why := hooks(module)) is not None:
        raise Unknown(f"not replaced, since {why}")
    if next(module.buffers(), None) is not None:
        raise Unknown("not replaced, since it has buffers: " + ", ".join(n for n, _ in module.named_buffers()))
    copied = _copy(module)
    inside = [copied.get_submodule(_relative(linear.name, name)) for linear in (*ups, down)]
    x = probe_input(ups[0].n_in)
    trace = _run(copied, [(x,)], inside)
    calls = [trace.only(m) for m in inside]
    if None in calls or len(trace.outputs) != 1:
        raise Unknown("its linear maps are not called once each, or it returns more than a tensor")
    *first, last = [call for call in calls if call is not None]
    if not all(close(call.input, x) for call in first) or not close(trace.outputs[0], last.output):
        raise Unknown(f"more than {', '.join(u.name.rpartition('.')[2] for u in (*ups, down))} and an activation")
    formula = _formula([call.output for call in first], last.input)
    dropout = out_dropout = 0.0
    trace = _run(copied, [(x,)], inside, train=True)
    first = [call for m in inside[:-1] if (call := trace.only(m)) is not None]
    h, y = formula.hidden([call.output for call in first]), trace.calls[inside[-1]][0].output
    for rate, dropped in trace.dropouts:
        if close(dropped, h) and not dropout:
            dropout = rate
        elif close(dropped, y) and not out_dropout:
            out_dropout = rate
        else:
            raise Unknown(f"dropout {rate} is neither on the hidden units nor on the output")
    return Found(name, module, tuple(ups), down, formula, dropout, out_dropout)


def _formula(ups: list[Tensor], h: Tensor) -> Formula:
    """The activation, and a GLU's arrangement, that give h from the outputs of the first linear maps."""
    if len(ups) == 2:
        gates = ("first", "second")
    elif ups[0].shape[-1] == 2 * h.shape[-1]:
        gates = ("first half", "second half", "even", "odd")
    else:
        gates = ("",)
    for gate in gates:
        for activation in ACTIVATIONS:
            formula = Formula(activation, gate)
            if (gate or activation != "identity") and close(formula.hidden(ups), h):
                return formula
    raise Unknown(f"the hidden units are not one of {', '.join(ACTIVATIONS)} of the first linear map's output")


# ----------------------------------------------------------------- an FFN whose two linear maps lie in a larger module


def _pairs(name: str, module: nn.Module, inside: list[Linear]) -> Iterator[tuple[Linear, Linear]]:
    """Neighbouring linear maps, at most two steps down, whose innermost common module this is."""
    for up, down in zip(inside, inside[1:], strict=False):
        if up.n_out != down.n_in or (up.n_in == up.n_out and not isinstance(module, nn.Sequential)):
            continue
        a, b = (_relative(linear.name, name).split(".") for linear in (up, down))
        if len(a) <= 2 and len(b) <= 2 and (a[0] != b[0] or len(a) == 1 or len(b) == 1):
            yield up, down


def _pair(name: str, module: nn.Module, up: Linear, down: Linear, inside: list[Linear]) -> Found:
    a, b = _relative(up.name, name), _relative(down.name, name)
    owners = list(dict.fromkeys(["", a.rpartition(".")[0], b.rpartition(".")[0]]))
    for linear in (up, down):
        if (why := hooks(linear.module)) is not None:
            raise Unknown(f"not replaced, since {why}")
    copied = _copy(module)
    leaves = [m for m in copied.modules() if not any(True for _ in m.children())]
    x = probe_input(up.n_in)
    trace = _run(copied, [(x,), (x, x)], leaves)
    first, last = trace.only(copied.get_submodule(a)), trace.only(copied.get_submodule(b))
    if first is None or last is None:
        raise Unknown(f"{a} and {b} are not called once each")
    formula = _formula([first.output], last.input)
    args = (x,) if trace.n_args == 1 else (x, x)
    trained = _run(copied, [args], leaves, train=True)
    edits = [*_activation_slot(copied, owners, trace, first, last, b, args)]
    dropout = 0.0
    first_trained = trained.only(copied.get_submodule(a))
    assert first_trained is not None
    h = formula.hidden([first_trained.output])
    for rate, dropped in trained.dropouts:
        if close(dropped, h) and not dropout:
            dropout = rate
            edits.append(_dropout_slot(copied, owners, trained, h, rate))
    owner, _, attribute = b.rpartition(".")
    edits.append(Edit(owner, attribute, nn.Identity))
    found = Found(up.name, up.module, (up,), down, formula, dropout, enclosing=name, edits=tuple(edits))
    _verify(found, module, a, args, trace, trained)
    return found


def _activation_slot(
    copied: nn.Module, owners: list[str], trace: Trace, first: Call, last: Call, down: str, args: tuple[Tensor, ...]
) -> Iterator[Edit]:
    """The attribute that holds the activation."""
    for owner in owners:
        for attribute, child in copied.get_submodule(owner).named_children():
            call = trace.only(child)
            if call is not None and close(call.input, first.output) and close(call.output, last.input):
                yield Edit(owner, attribute, nn.Identity)
                return
    for owner in owners:
        module = copied.get_submodule(owner)
        for attribute, value in list(vars(module).items()):
            if not callable(value) or isinstance(value, (type, nn.Module)):
                continue
            setattr(module, attribute, nn.Identity())
            try:
                again = run(copied, args, [copied.get_submodule(down)]).only(copied.get_submodule(down))
            except Exception:  # not the activation, then
                again = None
            module._modules.pop(attribute)
            setattr(module, attribute, value)
            if again is not None and close(again.input, first.output):
                yield Edit(owner, attribute, nn.Identity)
                return
    kind = type(copied).__name__
    raise Unknown(f"the activation is written into forward of {kind}: make it an attribute, or the FFN a module")


def _dropout_slot(copied: nn.Module, owners: list[str], trained: Trace, h: Tensor, rate: float) -> Edit:
    """The attribute that holds the dropout of the hidden units: a module, or a rate."""
    for owner in owners:
        for attribute, child in copied.get_submodule(owner).named_children():
            call = trained.only(child)
            if isinstance(child, nn.Dropout) and call is not None and close(call.input, h):
                return Edit(owner, attribute, nn.Identity)
    for owner in owners:
        rates = [n for n, v in vars(copied.get_submodule(owner)).items() if isinstance(v, float) and v == rate]
        for attribute in sorted(rates, key=lambda n: "activation" not in n):  # the common name first; verified anyway
            return Edit(owner, attribute, 0.0)
    raise Unknown(f"the dropout {rate} of the hidden units is not an attribute")


def _verify(
    found: Found, module: nn.Module, up: str, args: tuple[Tensor, ...], trace: Trace, trained: Trace
) -> None:
    """Put a dense layer in as a converted one will be, and compare outputs and dropouts."""
    copied = _copy(module)
    linear = replace(found.ups[0], module=copied.get_submodule(up))
    down = replace(found.down, module=copied.get_submodule(_relative(found.down.name, found.enclosing)))
    weights = replace(found, ups=(linear,), down=down).weights()
    owner, _, attribute = up.rpartition(".")
    put(copied, (Edit(owner, attribute, lambda: _Stand(weights)), *found.edits))
    try:
        same = same_outputs(run(copied, args), trace)
        rates = sorted(rate for rate, _ in run(copied, args, train=True).dropouts)
    except Exception as error:
        raise Unknown(f"{type(module).__name__} does not run with the FFN replaced ({error})") from error
    if not same or rates != sorted(rate for rate, _ in trained.dropouts):
        raise Unknown(f"{type(module).__name__} does not compute the same with the FFN replaced")


class _Stand(nn.Module):
    """The dense function where a converted layer will stand."""

    def __init__(self, weights: FFNWeights) -> None:
        super().__init__()
        self.of = weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.of.output(x)
        scale = nn.functional.dropout(torch.ones_like(y), self.of.dropout, self.training)
        return y + 0 * scale


def put(root: nn.Module, edits: Iterable[Edit]) -> list[Callable[[], None]]:
    """Make the edits; returns what undoes each, to be called in reverse."""
    undo: list[Callable[[], None]] = []
    for edit in edits:
        owner = root.get_submodule(edit.owner)
        value = edit.value() if callable(edit.value) else edit.value
        undo.append(set_attribute(owner, edit.attribute, value))
    return undo


def set_attribute(owner: nn.Module, attribute: str, value: object) -> Callable[[], None]:
    """Set an attribute that may hold a module, a function or a number; returns what undoes it."""
    modules, plain = dict(owner._modules), dict(owner.__dict__)

    def undo() -> None:
        owner._modules.clear()
        owner._modules.update(modules)
        for name in owner.__dict__.keys() - plain.keys():
            del owner.__dict__[name]
        owner.__dict__.update(plain)

    if isinstance(value, nn.Module):
        owner.__dict__.pop(attribute, None)
        owner._modules[attribute] = value
    else:
        setattr(owner, attribute, value)
    return undo


def _relative(name: str, base: str) -> str:
    return name[len(base) + 1 :] if base else name


def _copy(module: nn.Module) -> nn.Module:
    try:
        copied = probe_copy(module)
    except Exception as error:
        raise Unknown(f"{type(module).__name__} cannot be copied to probe it ({error})") from error
    for inner in copied.modules():
        switch_off_fast_path(inner)
    return copied


def switch_off_fast_path(module: nn.Module) -> list[Callable[[], None]]:
    """torch.nn's Transformer layers read ``linear1.weight`` in evaluation unless these say no; returns what undoes it."""
    flags = {"activation_relu_or_gelu": 0, "use_nested_tensor": False}
    return [set_attribute(module, name, off) for name, off in flags.items() if vars(module).get(name)]


def _run(copied: nn.Module, choices: list[tuple[Tensor, ...]], watch: Iterable[nn.Module], train: bool = False) -> Trace:
    """Run with the first arguments that it takes."""
    failed: Exception | None = None
    watch = list(watch)
    for args in choices:
        try:
            trace = run(copied, args, watch, train=train)
        except Exception as error:
            failed = failed or error
        else:
            trace.n_args = len(args)
            return trace
    text = str(failed).strip().split("\n")[0]
    raise Unknown(f"{type(copied).__name__} does not run by itself ({type(failed).__name__}: {text})")
