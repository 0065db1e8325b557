"""Launches and bytes of a MoE layer's step on a GPU, counted without one: `python -m benchmarks.launches`.

The layer runs on CPU tensors, but for our kernels, whose outputs hold nothing. Whatever a GPU would compute is written
down: each call of one of torch's ops is one launch (a sort takes several) that reads and writes its tensors once; so is
each kernel of ours. What a kernel of the experts reads more than once is in `benchmarks/predict.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_ffn as sf
from benchmarks.measuring import report
from benchmarks.shapes import GPU_FINE, GPU_WIDE, MoEShape

MIB = 2**20
ONLY_MEMORY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")


@dataclass
class Work:
    """The name of each launch, in order, and the bytes that it reads and writes."""

    kernels: list[tuple[str, int]] = field(default_factory=list)

    @property
    def launches(self) -> list[str]:
        """The names."""
        return [name for name, _ in self.kernels]

    @property
    def bytes(self) -> int:
        """Of all launches."""
        return sum(moved for _, moved in self.kernels)


class Recorder(TorchDispatchMode):
    """Writes down the work of what runs inside: that of ``expert_ffn`` as the experts', all other as the routing's."""

    def __init__(self) -> None:
        super().__init__()
        self.routing, self.experts = Work(), Work()
        self.work = self.routing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        name = func._schema.name.partition("::")[2]
        if func.namespace != "sparse_ffn" and not views and name not in ONLY_MEMORY:
            self.add(name, (*tree_leaves((args, kwargs)), *tree_leaves(found)))
        return found

    def inside(self, function: Callable[..., Any], experts: bool) -> Callable[..., Any]:
        """A backend's function whose own calls are recorded: a mode does not see into an op."""

        def recorded(*args: Any) -> Any:
            self.work = self.experts if experts else self.routing
            with self:
                found = function(*args)
            self.work = self.routing
            for selected in (t for t in tree_leaves(found) if isinstance(t, Tensor) and t.dtype == torch.int64):
                selected.zero_()  # nothing has written it, and the next op checks it
            return found

        return recorded

    def add(self, name: str, operands: Sequence[Any]) -> None:
        """A launch that reads and writes these."""
        tensors = {id(t): t for t in operands if isinstance(t, Tensor)}
        self.work.kernels.append((name, sum(t.nbytes for t in tensors.values())))


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Record what runs inside; kernels of ours are not run."""
    from sparse_ffn.backends.triton import combine, decode, entropy, grouped, hidden, outer, router, routing
    from sparse_ffn.ops.expert_ffn import triton as expert_ffn
    from sparse_ffn.ops.negative_entropy import triton as negative_entropy
    from sparse_ffn.ops.route import triton as route

    recorder = Recorder()

    def launch(kernel: Any, grid: int, *arguments: Any, **meta: Any) -> None:
        if grid:
            recorder.add(kernel.__name__, arguments)

    # the backend takes CPU tensors only where kernels are interpreted; these are imported by now, and nothing runs
    with ExitStack() as stack, patch.dict(os.environ, TRITON_INTERPRET="1"), sf.backend("triton"):
        for module in (combine, decode, entropy, grouped, hidden, outer, router, routing):
            stack.enter_context(patch.object(module, "launch", launch))
        for module in (expert_ffn, negative_entropy, route):
            for name in vars(module).keys() & {"forward", "inference", "backward"}:
                inner = recorder.inside(getattr(module, name), module is expert_ffn)
                stack.enter_context(patch.object(module, name, inner))
        with recorder:
            yield recorder


def layer_of(shape: MoEShape, *, fused: bool, train: bool, glu: bool = False) -> sf.MoE:
    """A layer in bf16; ``fused``: its router runs in one kernel."""
    layer = sf.SigmaMoE(shape.D, shape.E, shape.G, shape.k, glu=glu, dtype=torch.bfloat16).train(train)
    if not fused:
        layer.router.register_forward_hook(lambda *args: None)  # a router with hooks is called
    return layer


def step(shape: MoEShape, *, fused: bool, train: bool = True, glu: bool = False) -> list[Recorder]:
    """The forward pass of a layer and, if it trains, the backward pass."""
    layer = layer_of(shape, fused=fused, train=train, glu=glu)
    x = torch.zeros(shape.T, shape.D, dtype=torch.bfloat16, requires_grad=train)
    with recorded() as forward, torch.set_grad_enabled(train):
        y = layer(x)
    if not train:
        return [forward]
    loss = sf.aux_loss(layer)
    with recorded() as backward:
        torch.autograd.backward((y, loss), (torch.empty_like(y), torch.empty_like(loss)))
    return [forward, backward]


def kept(shape: MoEShape, *, fused: bool) -> int:
    """Bytes that the routing of a training step keeps for its backward pass, x itself not counted."""
    found: dict[int, Tensor] = {}
    layer = layer_of(shape, fused=fused, train=True)
    x = torch.zeros(shape.T, shape.D, dtype=torch.bfloat16, requires_grad=True)

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with recorded(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    units = (shape.T * shape.k, shape.G)
    return sum(t.nbytes for memory, t in found.items() if memory not in own and t.shape != units)


def table(shape: MoEShape) -> report.Table:
    """The routing of a step, as the router is called and as it is fused."""
    header = ("router", "pass", "launches", "MiB moved", "MiB kept", "launches of the experts")
    body = []
    for name, fused in (("called", False), ("fused", True)):
        for label, found in zip(("forward", "backward"), step(shape, fused=fused), strict=True):
            keeps = f"{kept(shape, fused=fused) / MIB:.1f}" if label == "forward" else ""
            moved = f"{found.routing.bytes / MIB:.1f}"
            body.append([name, label, str(len(found.routing.launches)), moved, keeps, str(len(found.experts.launches))])
        (alone,) = step(MoEShape(1, shape.D, shape.E, shape.G, shape.k), fused=fused, train=False)
        launches, of_experts = (str(len(work.launches)) for work in (alone.routing, alone.experts))
        body.append([name, "one token", launches, f"{alone.routing.bytes / MIB:.1f}", "", of_experts])
    return header, body


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.partition("\n")[0])
    parser.add_argument("--names", action="store_true", help="name the launches, too")
    options = parser.parse_args(argv)
    for shape in (GPU_WIDE, GPU_FINE):
        print(f"T,D,E,G,k = {shape}, bf16\n\n{report.markdown(table(shape))}\n")
    if options.names:
        for fused in (False, True):
            for found in step(GPU_WIDE, fused=fused):
                print("fused:" if fused else "called:", ", ".join(found.routing.launches), "\n")
                if fused:
                    print("experts:", ", ".join(found.experts.launches), "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
