"""Parents: whether the module that holds an FFN goes on working with a layer in its place."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_ffn.convert.find.attempt import arguments, try_copy, try_run
from sparse_ffn.convert.find.edits import set_attribute
from sparse_ffn.convert.find.found import Found, Unknown, relative
from sparse_ffn.convert.find.probe import run


def misfit(f: Found, parent: nn.Module) -> str | None:
    """Why no layer can stand where an FFN is. None if one can, or if the parent does not run by itself on a probe.

    A parent may pass more than the tokens, read a weight, go through the FFN's parts, or hold it a second time.

    Args:
        f: the FFN.
        parent: the module that holds it.
    """
    if f.edits or type(parent).__module__.startswith("torch.") or any("forward" in vars(m) for m in parent.modules()):
        return None  # a pair was tried in its place; torch's containers and wrappers only call
    names = [name for name, child in parent._modules.items() if child is f.module]
    part = "" if f.ups[0].module is f.module else relative(f.ups[0].name, f.name)
    try:
        copied = try_copy(parent, numbers=False)
        used = copied.get_submodule(names[0]).get_submodule(part)
        trace, args = try_run(copied, arguments(f.ups[0].n_in), [used])
        copied = try_copy(parent, numbers=False)
    except Unknown:
        return None
    stand: nn.Module = _Layer(f.down.n_out)
    wrapped = f.out_dropout > 0 or f.weights().gate_bias is not None
    for name in names:
        set_attribute(copied, name, nn.Sequential(stand) if wrapped else stand)
    try:
        again = run(copied, args, [stand])
    except Exception as error:
        return f"{type(parent).__name__} does not run with a layer in its place ({type(error).__name__}: {error})"
    if len(again.calls.get(stand, [])) != len(trace.calls.get(used, [])):
        return f"{type(parent).__name__} does not call a layer in its place: it calls its parts, or holds it elsewhere"
    return None


class _Layer(nn.Module):
    """Something with a layer's call and no weights."""

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.d_out = d_out

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return x[..., :1] + x.new_zeros(self.d_out)
