"""FFNs whose two linear maps lie in a larger module: BERT's pairs of modules, torch.nn's Transformer layers, OPT's."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_ffn.convert.find.attempt import Arguments, arguments, check_large, try_copy, try_run
from sparse_ffn.convert.find.edits import Edit, put
from sparse_ffn.convert.find.found import Found, Unknown, check_plain, find_formula, relative
from sparse_ffn.convert.find.linear import Linear, hooks
from sparse_ffn.convert.find.probe import Call, Trace, close, run, same_outputs
from sparse_ffn.convert.init.weights import FFNWeights


def pairs(name: str, module: nn.Module, inside: list[Linear]) -> Iterator[tuple[Linear, Linear]]:
    """Neighbouring linear maps, at most two steps down, whose innermost common module this is."""
    for up, down in itertools.pairwise(inside):
        if up.n_out != down.n_in or (up.n_in == up.n_out and not isinstance(module, nn.Sequential)):
            continue
        a, b = (relative(linear.name, name).split(".") for linear in (up, down))
        if len(a) <= 2 and len(b) <= 2 and (a[0] != b[0] or len(a) == 1 or len(b) == 1):
            yield up, down


def match_pair(name: str, module: nn.Module, up: Linear, down: Linear) -> Found:
    check_plain([up, down])
    a, b = relative(up.name, name), relative(down.name, name)
    module = _between(module, a, b)
    owners = list(dict.fromkeys(["", a.rpartition(".")[0], b.rpartition(".")[0]]))
    patched = [type(m).__name__ for m in module.modules() if "forward" in vars(m)]
    if patched:
        raise Unknown(f"forward of {patched[0]} is patched, so that a copy cannot be probed")
    copied = try_copy(module)
    leaves = [m for m in copied.modules() if not any(True for _ in m.children())]
    trace, args = try_run(copied, arguments(up.n_in), leaves)
    first, last = trace.only(copied.get_submodule(a)), trace.only(copied.get_submodule(b))
    if first is None or last is None:
        raise Unknown(f"{a} and {b} are not called once each")
    formula = find_formula([first.output], last.input)
    check_large(copied, args, [copied.get_submodule(a)], copied.get_submodule(b), formula)
    trained, _ = try_run(copied, [args], leaves, train=True)
    edits = [*_activation_slot(copied, owners, trace, first, last, b, args)]
    dropout = 0.0
    first_trained = trained.only(copied.get_submodule(a))
    if first_trained is None:
        raise Unknown(f"{a} is not called once in training")
    h = formula.hidden([first_trained.output])
    for rate, dropped in trained.dropouts:
        if close(dropped, h) and not dropout:
            dropout = rate
            edits.append(_dropout_slot(copied, owners, trained, h, rate))
    owner, _, attribute = b.rpartition(".")
    edits.append(Edit(owner, attribute, nn.Identity))
    gone = [module.get_submodule(edit.owner)._modules.get(edit.attribute) for edit in edits]
    for part in (up.module, *gone):
        if part is not None and (why := hooks(part)) is not None:
            raise Unknown(f"not replaced, since {why}")
    found = Found(up.name, up.module, (up,), down, formula, dropout, enclosing=name, edits=tuple(edits))
    _verify(found, module, a, args, trace, trained)
    return found


def _between(module: nn.Module, up: str, down: str) -> nn.Module:
    """Of a Sequential only what lies between the linear maps: what comes before may want another kind of input."""
    if type(module).forward is not nn.Sequential.forward:
        return module
    names = list(module._modules)
    first, last = (names.index(name.partition(".")[0]) for name in (up, down))
    return nn.Sequential(OrderedDict(list(module.named_children())[first : last + 1]))


def _activation_slot(
    copied: nn.Module, owners: list[str], trace: Trace, first: Call, last: Call, down: str, args: Arguments
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
    raise Unknown(f"the dropout {rate} of the hidden units has no attribute of its own")


def _verify(found: Found, module: nn.Module, up: str, args: Arguments, trace: Trace, trained: Trace) -> None:
    """Put a dense layer in as a converted one will be, and compare outputs and dropouts."""
    copied = try_copy(module)
    linear = replace(found.ups[0], module=copied.get_submodule(up))
    down = replace(found.down, module=copied.get_submodule(relative(found.down.name, found.enclosing)))
    weights = replace(found, ups=(linear,), down=down).weights()
    owner, _, attribute = up.rpartition(".")
    put(copied, (Edit(owner, attribute, lambda: _Stand(weights)), *found.edits))
    try:
        same = same_outputs(run(copied, args), trace)
        again = run(copied, args, train=True)
        same = same and same_outputs(again, trained)
        rates = sorted(rate for rate, _ in again.dropouts)
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
