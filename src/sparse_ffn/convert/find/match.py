"""Matching: whether linear maps are a two-layer FFN, and where a layer can stand, by what copies of modules compute.

A match that fails raises Unknown with the reason.
"""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.convert.find.edits import Edit, apply, set_attribute
from sparse_ffn.convert.find.examples import Examples
from sparse_ffn.convert.find.found import Formula, Found, find_formula
from sparse_ffn.convert.find.linear import Linear, hooks, patched
from sparse_ffn.convert.find.probe import (
    Arguments,
    Call,
    Trace,
    Unknown,
    close,
    gradient,
    probe_arguments,
    probe_copy,
    probe_input,
    run,
    run_first,
    same_draws,
    same_dropouts,
    same_outputs,
)
from sparse_ffn.convert.init.weights import FFNWeights
from sparse_ffn.layers import DenseFFN


def match_dense(name: str, layer: DenseFFN) -> Found:
    """This library's own dense layer, whose formula is known."""
    refuse(hooks(layer))
    ups = [Linear(layer, f"{name}.keys", transposed=False, parameters=("keys", "key_bias"))]
    if layer.gate_keys is not None:
        ups.append(Linear(layer, f"{name}.gate_keys", transposed=False, parameters=("gate_keys", "")))
    down = Linear(layer, f"{name}.values", transposed=True, parameters=("values", "out_bias"))
    formula = Formula(layer.activation, "" if layer.gate_keys is None else "second")
    return Found(name, layer, tuple(ups), down, formula, layer.dropout)


def match_block(name: str, module: nn.Module, ups: list[Linear], down: Linear) -> Found:
    """A module that is an FFN of these linear maps and nothing else: Sequential, Mlp, gate/up/down, wi/wo."""
    try:
        return _match_block(name, module, ups, down)
    except Unknown:
        if len(ups) == 1 and down.n_out == ups[0].n_in and down.n_in == ups[0].n_out:
            with suppress(Unknown):  # they may have been registered the other way round
                return _match_block(name, module, [down], ups[0])
        raise


def _match_block(name: str, module: nn.Module, ups: list[Linear], down: Linear) -> Found:
    linears = (*ups, down)
    refuse(*(linear.obstacle for linear in linears), hooks(module), _buffers(module), _own_mask(module))
    x = probe_input(ups[0].n_in)
    seen = observe(module, [linear.within(name) for linear in linears], [Arguments((x,))])
    y = seen.down.output
    if not seen.trace.bare:
        raise Unknown("it returns something else than a tensor")
    if not all(close(call.input, x) for call in seen.ups) or not close(seen.trace.outputs[0], y):
        raise Unknown(f"more than {', '.join(linear.attribute for linear in linears)} and an activation")
    if seen.trace.outputs[0].dtype != x.dtype or _casts(seen.copied, x):
        raise Unknown("it changes the dtype of its tokens or of its output, which a layer does not")
    formula = seen.formula()
    seen.check_large(x)
    trained, h = seen.train(formula)
    if not (same_outputs(trained, seen.trace) and same_draws(trained, run(nn.Identity(), seen.args, train=True))):
        raise Unknown("in training it does more than dropout")
    dropout = out_dropout = 0.0
    for rate, dropped in trained.dropouts:
        if close(dropped, h) and not dropout:
            dropout = rate
        elif close(dropped, y) and not out_dropout:
            out_dropout = rate
        else:
            raise Unknown(f"dropout {rate} is neither on the hidden units nor on the output")
    found = Found(name, module, tuple(ups), down, formula, dropout, out_dropout)
    inside = [replace(up, module=m) for up, m in zip((*ups, down), seen.linears, strict=True)]
    stand_in = _DenseStandIn(replace(found, ups=tuple(inside[:-1]), down=inside[-1]).weights(), formula.scale)
    if not _same_gradients(seen.copied, stand_in, seen.args):
        raise Unknown("its gradient is not that of an FFN: something cuts or changes it")
    return found


def match_pair(name: str, module: nn.Module, up: Linear, down: Linear, examples: Examples) -> Found:
    """Two linear maps in a larger module: BERT's pairs of modules, torch.nn's Transformer layers, OPT's."""
    refuse(up.obstacle, down.obstacle)
    a, b = up.within(name), down.within(name)
    whole, module = module, _between(module, a, b)
    refuse(*(f"a copy cannot be probed: {why}" for m in module.modules() if (why := patched(m)) is not None))
    more = examples.of(module) if module is whole else ()
    probes = probe_arguments(up.n_in)
    seen = observe(module, [a, b], itertools.chain(probes, more))
    formula = seen.formula()
    (up_owner, _, _), (owner, _, attribute) = a.rpartition("."), b.rpartition(".")
    owners = list(dict.fromkeys(["", up_owner, owner]))
    edits = (_edit_activation(seen, owners), Edit(owner, attribute, nn.Identity))
    trained, h = seen.train(formula)  # last: training may change buffers of the copy
    dropout = next((rate for rate, dropped in trained.dropouts if close(dropped, h)), 0.0)
    by_example = not any(seen.args is probe for probe in probes)
    found = Found(up.name, up.module, (up,), down, formula, dropout, enclosing=name, edits=edits, by_example=by_example)
    every = [*probes, *(examples.of(module) if module is whole else ())]
    if not dropout:
        return _verified(found, module, a, seen, trained, every)
    *others, last = [(*edits, edit) for edit in _dropout_edits(seen.copied, owners, trained, h, dropout)]
    for tried in others:
        with suppress(Unknown):
            return _verified(replace(found, edits=tried), module, a, seen, trained, every)
    return _verified(replace(found, edits=last), module, a, seen, trained, every)


def _own_mask(module: nn.Module) -> str | None:
    """An argument that a layer takes, too, and means something else by: a probe without it does not show what."""
    with suppress(TypeError, ValueError):  # some callables do not tell
        for name in inspect.signature(module.forward).parameters:
            if name in ("mask", "router_input"):
                return f"its forward has an argument {name!r} of its own"
    return None


def _same_gradients(copied: nn.Module, other: nn.Module, args: Arguments) -> bool:
    """Whether both pass the tokens the same gradient; also where the first one runs without gradients alone."""
    try:
        ours = gradient(copied, args)
    except Exception:
        return True
    try:
        theirs = gradient(other, args)
    except Exception:
        return False
    return ours is theirs if ours is None or theirs is None else close(ours, theirs)


def _buffers(module: nn.Module) -> str | None:
    """What a layer in a module's place would lose."""
    names = ", ".join(name for name, _ in module.named_buffers())
    return f"it has buffers: {names}" if names else None


def _casts(copied: nn.Module, x: Tensor) -> bool:
    """Whether a copy in fp64 takes tokens of another dtype, which a linear map does not."""
    with suppress(Exception):
        run(copied, Arguments((x.float(),)))
        return True
    return False


def refuse(*reasons: str | None) -> None:
    """Raise Unknown with the first reason, if there is one."""
    for why in reasons:
        if why is not None:
            raise Unknown(f"not replaced, since {why}")


@dataclass(frozen=True)
class Seen:
    """A copy of a module that ran on a probe, and the one call of each of its linear maps."""

    copied: nn.Module
    linears: list[nn.Module]
    """The first ones and the last one."""
    args: Arguments
    """What it ran on."""
    trace: Trace
    ups: list[Call]
    down: Call

    def formula(self) -> Formula:
        """What lies between the linear maps: an activation that is known, without a clamp, as ReLU6 has one."""
        formula = find_formula([call.output for call in self.ups], self.down.input)
        weights = [(weight, weight.data) for up in self.linears[:-1] if isinstance(weight := up.weight, Tensor)]
        for weight, value in weights:
            weight.data = 1000 * value  # only large hidden units show a clamp
        trace, _ = run_first(self.copied, [self.args], self.linears)
        for weight, value in weights:
            weight.data = value
        *first, last = (trace.only(linear) for linear in self.linears)
        outputs = [call.output for call in first if call is not None]
        if last is None or len(outputs) != len(first) or not close(formula.hidden(outputs), last.input):
            raise Unknown(f"the hidden units are {formula.name} only while they are small: something clamps them")
        return formula

    def check_large(self, x: Tensor) -> None:
        """Raise Unknown where tokens x or the output are cut off once they are large."""
        trace, _ = run_first(self.copied, [Arguments((1000 * x,))], self.linears)
        *first, last = (trace.only(linear) for linear in self.linears)
        whole = all(call is not None and close(call.input, 1000 * x) for call in first)
        if not whole or last is None or not close(trace.outputs[0], last.output):
            raise Unknown("its tokens or its output are what a layer's are only while they are small")

    def train(self, formula: Formula) -> tuple[Trace, Tensor]:
        """What it does in training, and its hidden units there."""
        trained, _ = run_first(self.copied, [self.args], self.copied.modules(), train=True)
        calls = [call for linear in self.linears if (call := trained.only(linear)) is not None]
        if len(calls) < len(self.linears):
            raise Unknown("in training its linear maps are not called once each")
        return trained, formula.hidden([call.output for call in calls[:-1]])


def observe(module: nn.Module, names: list[str], choices: Iterable[Arguments]) -> Seen:
    """Run a copy of a module with the first arguments that it takes, and watch its linear maps of these names."""
    copied = probe_copy(module)
    linears = [copied.get_submodule(name) for name in names]
    trace, args = run_first(copied, choices, copied.modules())
    calls = [call for linear in linears if (call := trace.only(linear)) is not None]
    if len(calls) < len(names):
        raise Unknown(f"{' and '.join(names)} are not called once each")
    *ups, down = calls
    if not bool(down.input.isfinite().all()):
        raise Unknown("the hidden units are not finite on the probe")
    return Seen(copied, linears, args, trace, ups, down)


def _between(module: nn.Module, up: str, down: str) -> nn.Module:
    """The part of a Sequential between the linear maps: what comes before it may take another kind of input."""
    if type(module).forward is not nn.Sequential.forward:
        return module
    names = list(module._modules)
    first, last = (names.index(name.partition(".")[0]) for name in (up, down))
    # by name: named_children() passes over what has stood in an earlier place
    return nn.Sequential(OrderedDict((name, module.get_submodule(name)) for name in names[first : last + 1]))


def _edit_activation(seen: Seen, owners: list[str]) -> Edit:
    """An edit that takes out the activation: a module or a function that is an attribute of one of the owners."""
    z, h = seen.ups[0].output, seen.down.input
    for owner in owners:
        module = seen.copied.get_submodule(owner)
        for attribute, child in module.named_children():
            call = seen.trace.only(child)
            if call is not None and close(call.input, z) and close(call.output, h):
                return Edit(owner, attribute, nn.Identity)
        for attribute, value in list(vars(module).items()):
            if not callable(value) or isinstance(value, (type, nn.Module)):
                continue
            again = None
            undo = set_attribute(module, attribute, nn.Identity())
            with suppress(Exception):  # where the module does not run without it, it is not the activation
                again = run(seen.copied, seen.args, seen.linears).only(seen.linears[-1])
            undo()
            if again is not None and close(again.input, z):
                return Edit(owner, attribute, nn.Identity)
    kind = type(seen.copied).__name__
    raise Unknown(f"the activation is written into forward of {kind}: make it an attribute, or the FFN a module")


def _dropout_edits(copied: nn.Module, owners: list[str], trained: Trace, h: Tensor, rate: float) -> list[Edit]:
    """Edits that may take out the hidden units' dropout: a module or a rate that is an attribute of an owner."""
    edits: list[Edit] = []
    for owner in owners:
        for attribute, child in copied.get_submodule(owner).named_children():
            call = trained.only(child)
            if isinstance(child, nn.Dropout) and call is not None and close(call.input, h):
                edits.append(Edit(owner, attribute, nn.Identity))
    for owner in owners:
        rates = [n for n, v in vars(copied.get_submodule(owner)).items() if isinstance(v, float) and v == rate]
        # those first that are named after the activation
        edits += [Edit(owner, n, 0.0) for n in sorted(rates, key=lambda n: "activation" not in n)]
    if not edits:
        raise Unknown(f"the dropout {rate} of the hidden units has no attribute of its own")
    return edits


def _verified(
    found: Found, module: nn.Module, up: str, seen: Seen, trained: Trace, choices: Iterable[Arguments]
) -> Found:
    """The same, if the module gives the same outputs and dropouts with a layer in place of the FFN; raises Unknown.

    On all arguments that it takes, not only those that showed the FFN: other branches may use what the edits take out.
    """
    gone = [module.get_submodule(edit.owner)._modules.get(edit.attribute) for edit in found.edits]
    parts = (part for part in (found.ups[0].module, *gone) if part is not None)
    refuse(*(why for part in parts for why in (hooks(part), _buffers(part))))
    if not seen.trace.outputs:
        raise Unknown(f"{type(module).__name__} returns no tensor that would show whether it computes the same")
    copied = _edited(found, module, up)
    try:
        same = same_outputs(run(copied, seen.args), seen.trace)
        again = run(copied, seen.args, train=True)
    except Exception as error:
        raise Unknown(f"{type(module).__name__} does not run with the FFN replaced ({error})") from error
    if not (same and same_outputs(again, trained) and same_dropouts(again, trained) and same_draws(again, trained)):
        raise Unknown(f"{type(module).__name__} does not compute the same with the FFN replaced")
    original, copied = probe_copy(module), _edited(found, module, up)  # new ones: training may have changed buffers
    if not _same_gradients(original, copied, seen.args):
        raise Unknown(f"{type(module).__name__} does not pass the same gradient with the FFN replaced")
    for args in choices:
        if args is not seen.args and not _same_on(args, original, copied):
            raise Unknown(f"{type(module).__name__} does not compute the same with the FFN replaced, called otherwise")
    return found


def _edited(found: Found, module: nn.Module, up: str) -> nn.Module:
    """A copy of a module with the dense function in the place of a pair."""
    copied = probe_copy(module)
    linear = replace(found.ups[0], module=copied.get_submodule(up))
    down = replace(found.down, module=copied.get_submodule(found.down.within(found.enclosing)))
    weights = replace(found, ups=(linear,), down=down).weights()
    owner, _, attribute = up.rpartition(".")
    stand_in = _DenseStandIn(weights, found.formula.scale)
    apply(copied, (Edit(owner, attribute, lambda: stand_in), *found.edits))
    return copied


def _same_on(args: Arguments, original: nn.Module, edited: nn.Module) -> bool:
    """Whether both compute the same with arguments; also where the original does not take them, or not finitely."""
    for train in (False, True):
        try:
            expected = run(original, args, train=train)
        except Exception:
            return True
        if not all(bool(y.isfinite().all()) for y in expected.outputs if y.is_floating_point()):
            return True
        try:
            found = run(edited, args, train=train)
        except Exception:
            return False
        if not (same_outputs(found, expected) and same_dropouts(found, expected) and same_draws(found, expected)):
            return False
    return True


def rejection(found: Found, holder: nn.Module, examples: Examples) -> str | None:
    """Why the module that holds an FFN does not accept a layer in its place; None if it does or does not run by itself.

    It may pass more than the tokens, read a weight, go through the FFN's parts, or hold the FFN a second time.
    """
    only_calls = type(holder).__module__.startswith("torch.")  # torch's containers and wrappers
    if found.edits or only_calls or any("forward" in vars(m) for m in holder.modules()):
        return None  # with edits match_pair has tried a stand-in
    names = [name for name, child in holder._modules.items() if child is found.module]
    part = "" if found.ups[0].module is found.module else found.ups[0].within(found.name)
    try:
        copied = probe_copy(holder, numbers=False)
        used = copied.get_submodule(names[0]).get_submodule(part)
        choices = itertools.chain(probe_arguments(found.ups[0].n_in), examples.of(holder))
        trace, args = run_first(copied, choices, [used])
        copied = probe_copy(holder, numbers=False)
    except Unknown:
        return None
    stand_in: nn.Module = (_LayerStandIn if type(found.module) is DenseFFN else _TokensOnly)(found.down.n_out)
    wrapped = found.out_dropout > 0 or found.weights().gate_bias is not None
    for name in names:
        set_attribute(copied, name, nn.Sequential(stand_in) if wrapped else stand_in)
    try:
        again = run(copied, args, [stand_in])
    except Exception as error:
        return f"{type(holder).__name__} does not run with a layer in its place ({type(error).__name__}: {error})"
    if len(again.calls.get(stand_in, [])) != len(trace.calls.get(used, [])):
        return f"{type(holder).__name__} does not call a layer in its place: it calls its parts, or holds it elsewhere"
    return None


class _DenseStandIn(nn.Module):
    """Computes the dense function where a converted layer will stand."""

    def __init__(self, weights: FFNWeights, scale: float) -> None:
        super().__init__()
        self.ffn, self.scale = weights, scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.ffn.hidden(x) / self.scale  # as the module has them: what is dropped from is compared
        h = self.scale * F.dropout(h, self.ffn.dropout, self.training)
        return F.linear(h, self.ffn.values.t(), self.ffn.out_bias)


class _TokensOnly(nn.Module):
    """Takes what an FFN and a layer both take, and has no weights."""

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.d_out = d_out

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :1] + x.new_zeros(self.d_out)


class _LayerStandIn(_TokensOnly):
    """Takes the mask, too, by which this library's own layers mean the same."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)
