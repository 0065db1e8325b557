"""FFNs that are a module of their own: Sequential, Mlp, gate/up/down, wi/wo and the like."""

from __future__ import annotations

from torch import nn

from sparse_ffn.convert.find.attempt import check_large, try_copy, try_run
from sparse_ffn.convert.find.found import (
    Formula,
    Found,
    Unknown,
    check_finite,
    check_plain,
    find_formula,
    relative,
    without_numbers,
)
from sparse_ffn.convert.find.linear import Linear, hooks
from sparse_ffn.convert.find.probe import close, probe_input, same_outputs
from sparse_ffn.layers import DenseFFN


def block_roles(module: nn.Module, inside: list[Linear]) -> tuple[list[Linear], Linear] | None:
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


def crowded(module: nn.Module, inside: list[Linear]) -> tuple[str, str] | None:
    """A linear map that widens, in a module that has one back and more parameters than these: its name and the reason.

    Attention and state-space mixers, which may widen too, have two further maps or more.
    """
    own = [linear for linear in inside if linear.module in module._modules.values()]
    for up in own:
        ups = [linear for linear in own if (linear.n_in, linear.n_out) == (up.n_in, up.n_out)]
        widths = (up.n_out, up.n_out // 2) if len(ups) == 1 else (up.n_out,)
        downs = [linear for linear in own if linear.n_out == up.n_in < linear.n_in and linear.n_in in widths]
        if len(downs) != 1 or len(ups) > 2 or len(own) - len(ups) - 1 > 1:
            continue
        theirs = {parameter for linear in (*ups, *downs) for parameter in linear.module.parameters()}
        others = [without_numbers(name) for name, parameter in module.named_parameters() if parameter not in theirs]
        names = ", ".join(linear.name.rpartition(".")[2] for linear in (*ups, *downs))
        if others:
            return up.name, f"more than {names} and an activation: it has {', '.join(dict.fromkeys(others))}"
    return None


def match_dense(name: str, layer: DenseFFN) -> Found:
    """This library's own dense layer, whose formula is known."""
    if (why := hooks(layer)) is not None:
        raise Unknown(f"not replaced, since {why}")
    ups = [Linear(layer, f"{name}.keys", transposed=False, parameters=("keys", "key_bias"))]
    if layer.gate_keys is not None:
        ups.append(Linear(layer, f"{name}.gate_keys", transposed=False, parameters=("gate_keys", "")))
    down = Linear(layer, f"{name}.values", transposed=True, parameters=("values", "out_bias"))
    formula = Formula(layer.activation, "" if layer.gate_keys is None else "second")
    return Found(name, layer, tuple(ups), down, formula, layer.dropout)


def match_block(name: str, module: nn.Module, ups: list[Linear], down: Linear) -> Found:
    try:
        return _match_block(name, module, ups, down)
    except Unknown:
        if len(ups) > 1 or down.n_out != ups[0].n_in or down.n_in != ups[0].n_out:
            raise
        try:  # they may have been registered the other way round
            return _match_block(name, module, [down], ups[0])
        except Unknown:
            pass
        raise


def _match_block(name: str, module: nn.Module, ups: list[Linear], down: Linear) -> Found:
    check_plain([*ups, down])
    if (why := hooks(module)) is not None:
        raise Unknown(f"not replaced, since {why}")
    if next(module.buffers(), None) is not None:
        raise Unknown("not replaced, since it has buffers: " + ", ".join(n for n, _ in module.named_buffers()))
    copied = try_copy(module)
    inside = [copied.get_submodule(relative(linear.name, name)) for linear in (*ups, down)]
    x = probe_input(ups[0].n_in)
    trace, _ = try_run(copied, [(x,)], inside)
    calls = [trace.only(m) for m in inside]
    if None in calls or not trace.bare:
        raise Unknown("its linear maps are not called once each, or it returns something else than a tensor")
    *first, last = [call for call in calls if call is not None]
    check_finite(last.input)
    if not all(close(call.input, x) for call in first) or not close(trace.outputs[0], last.output):
        raise Unknown(f"more than {', '.join(u.name.rpartition('.')[2] for u in (*ups, down))} and an activation")
    formula = find_formula([call.output for call in first], last.input)
    dropout = out_dropout = 0.0
    check_large(copied, (x,), inside[:-1], inside[-1], formula)
    trained, _ = try_run(copied, [(x,)], inside, train=True)
    if any(trained.only(m) is None for m in inside) or not same_outputs(trained, trace):
        raise Unknown("in training it does more than dropout")
    h, y = formula.hidden([call.output for call in first]), last.output
    for rate, dropped in trained.dropouts:
        if close(dropped, h) and not dropout:
            dropout = rate
        elif close(dropped, y) and not out_dropout:
            out_dropout = rate
        else:
            raise Unknown(f"dropout {rate} is neither on the hidden units nor on the output")
    return Found(name, module, tuple(ups), down, formula, dropout, out_dropout)
