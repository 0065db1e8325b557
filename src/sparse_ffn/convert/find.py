"""Finding the FFNs of a model by what modules compute, not by what they are called."""

from __future__ import annotations

from torch import nn

from sparse_ffn.convert.blocks import block_roles, match_block
from sparse_ffn.convert.found import Found, Unknown
from sparse_ffn.convert.linears import as_linear, hooks
from sparse_ffn.convert.pairs import match_pair, pairs


def find(model: nn.Module) -> tuple[list[Found], dict[str, str]]:
    """All FFNs of a model, in its order, and the names and reasons of what looked like one and is none."""
    linears = {m: linear for name, m in model.named_modules() if (linear := as_linear(name, m)) is not None}
    found: list[Found] = []
    unknown: dict[str, str] = {}
    done: set[nn.Module] = set()
    names = dict(model.named_modules())
    for name, module in reversed(names.items()):  # from the inside out
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or module in linears:
            continue
        inside = [linears[m] for m in module.modules() if m in linears]
        reasons: list[str] = []
        block = block_roles(module, inside) if not done & {linear.module for linear in inside} else None
        if block is not None and name:
            try:
                found.append(match_block(name, module, *block))
                done |= {linear.module for linear in inside}
                continue
            except Unknown as why:
                reasons.append(str(why))
        # hooks go with the module, and a GLU is not put in piecewise
        whole = block is not None and (hooks(module) is not None or block[0][0].n_out * len(block[0]) != block[1].n_in)
        for up, down in pairs(name, module, inside):
            if done & {up.module, down.module} or whole:
                continue
            try:
                found.append(match_pair(name, module, up, down))
            except Unknown as why:
                reasons.append(str(why))
                if up.n_out > up.n_in:
                    unknown[up.name] = f"{'; '.join(dict.fromkeys(reasons))}; {_seen(module)}"
            done |= {up.module, down.module}
        # attention too has matrices of fitting shapes, but none that widen: what does not widen goes without a reason
        if block is not None and not done & {linear.module for linear in inside} and block[1].n_in > block[0][0].n_in:
            reason = reasons[0] if reasons else "the model itself is the FFN: from_dense makes a layer of it"
            unknown[name] = f"{reason}; {_seen(module)}"
            done |= {linear.module for linear in inside}
    order = {name: i for i, name in enumerate(names)}
    return sorted(found, key=lambda f: order[f.name]), {n: unknown[n] for n in sorted(unknown, key=order.__getitem__)}


def find_one(module: nn.Module) -> Found:
    """A module that is an FFN itself.

    Raises:
        ValueError: it is none; the message says why and what was seen.
    """
    inside = [linear for name, m in module.named_modules() if (linear := as_linear(name, m)) is not None]
    roles = block_roles(module, inside)
    try:
        if roles is None:
            raise Unknown("its matrices are not those of a two-layer FFN")
        return match_block("", module, *roles)
    except Unknown as why:
        raise ValueError(f"{why}; {_seen(module)}") from None


def _seen(module: nn.Module) -> str:
    kinds = [type(m).__name__ for m in module.modules() if not any(True for _ in m.children())]
    return f"seen in {type(module).__name__}: {', '.join(dict.fromkeys(kinds))}"
