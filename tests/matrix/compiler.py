"""torch.compile, torch.export, AOTInductor and torch.jit.trace."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from .feature import AND_TRITON, feature
from .layers import ALL, FFNS, LAST, D, assert_near, build, step, tokens

FIRST = tuple(name for name in ALL if name not in LAST)
# 128 tokens: inductor 2.13 computes wrong router gradients on the CPU from graphs of about a hundred scores


@feature("`torch.compile(fullgraph=True)`, traced", {"reference": FIRST, "torch": FIRST, "cpu": ALL})
def traced(name: str) -> None:
    """`backend="aot_eager"`: one graph; after two token counts a third compiles nothing; results are eager's."""
    torch._dynamo.reset()
    layer = build(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(step(layer, tokens(128), compiled), step(layer, tokens(128)))
    step(layer, tokens(96), compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_near(step(layer, tokens(40), compiled), step(layer, tokens(40)))
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(tokens(40)), layer.eval()(tokens(40)))


@feature(
    "`torch.compile(fullgraph=True)`, inductor",
    {
        "reference": ("SigmaMoE",),
        "torch": ("SigmaMoE",),
        "cpu": ("DenseFFN", "TopKFFN", "ProductKeyMemory", "SigmaMoE", "SBaseMoE", "NoisyTopKMoE"),
    },
)
def inductor(name: str) -> None:
    """`dynamic=True`: compiled once for all token counts; output and gradients are eager's."""
    torch._dynamo.reset()
    layer = build(name)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    assert_near(step(layer, tokens(128), compiled), step(layer, tokens(128)), 1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_near(step(layer, tokens(300), compiled), step(layer, tokens(300)), 1e-4)


@feature("`torch.export`", AND_TRITON)
def export(name: str) -> None:
    """With a dynamic token count; the program computes what the layer computes."""
    _exported(name, strict=False)


@feature("`torch.export(strict=True)`", {"cpu": ALL})
def export_strictly(name: str) -> None:
    """As above, traced from bytecode."""
    _exported(name, strict=True)


def _exported(name: str, strict: bool) -> None:
    layer, x = build(name).eval(), tokens(7, 2)  # 14 tokens, or 4: as many as a decoding step has
    shapes = {"x": {0: torch.export.Dim("batch")}}
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            program = torch.export.export(layer, (tokens(8, 2),), dynamic_shapes=shapes, strict=strict)
            for some in (x, x[:2]):
                torch.testing.assert_close(program.module()(some), layer(some))


@feature(
    "AOTInductor",
    {"reference": ("SigmaMoE",), "torch": ("SigmaMoE",), "cpu": ("TopKFFN", "ProductKeyMemory", "SigmaMoE")},
)
def ahead_of_time(name: str) -> None:
    """Exported with a dynamic token count, compiled to a package, loaded again: the same output."""
    layer, x = build(name).eval(), tokens(300)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        shapes = {"x": {0: torch.export.Dim("tokens")}}
        program = torch.export.export(layer, (tokens(128),), dynamic_shapes=shapes)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "layer.pt2")))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), layer(x), rtol=1e-4, atol=1e-4)


@feature(
    "`torch.jit.trace`",
    {"reference": FFNS, "torch": FFNS, "cpu": ALL},
)
def jit_trace(name: str) -> None:
    """In evaluation, without gradients: the trace computes what the layer computes, for another token count too."""
    layer = build(name).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes and checks become constants of the trace
        trace = torch.jit.trace(layer, tokens(5))
        for x in (tokens(5), tokens(9)):
            torch.testing.assert_close(trace(x), layer(x))


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module).__module__.startswith("sparse_ffn.") or super().is_leaf_module(module, name)


@feature("torch.fx")
def symbolic_trace(name: str) -> None:
    """Symbolic tracing with the layers as leaves: the graph module computes and learns as the model does."""
    model, x = nn.Sequential(nn.Linear(D, D), build(name)), tokens(12)
    traced = torch.fx.GraphModule(model, _Tracer().trace(model))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert_near(step(traced, x), step(model, x), 0)
    assert torch.equal(traced.eval()(x), model.eval()(x))


FEATURES = (traced, inductor, export, export_strictly, ahead_of_time, jit_trace, symbolic_trace)
