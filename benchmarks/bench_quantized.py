"""Speed of quantised experts beside the same layer in bf16, torch's and torchao's products, and kt-kernel's experts."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparse_ffn as sf
from benchmarks.contenders.kt_kernel import KTExperts
from benchmarks.machine import describe
from benchmarks.measuring.contender import NotInstalled, require
from benchmarks.measuring.timing import Quartiles, Run, race
from benchmarks.quantized_profile import HEAD, bandwidth, profile
from benchmarks.shapes import MoEShape

BARS = {1: (0.60, 0.42), 4: (0.70, 0.55), 32: (0.90, 0.90), 256: (1.15, 1.15)}
"""Tokens -> the most that int8 and int4 may take of bf16's time, at D = 2048, E = 16, G = 1024, K = 8, a GLU."""


def layers(d: int, e: int, g: int, k: int) -> dict[str, sf.MoE]:
    """The layer in bf16, int8 and int4 of groups of 32 with a zero point."""
    torch.manual_seed(0)
    base = sf.MoE(d, e, g, k, router="softmax_topk", activation="silu", glu=True, balance="none", dtype=torch.bfloat16)
    found = {"bf16": base.eval()}
    for bits in (8, 4):
        found[f"int{bits}"] = copy.deepcopy(base)
        sf.quantize_experts_(found[f"int{bits}"], sf.ExpertQuantization(bits=bits, scale="max"))
    return found


def of_torch(layer: sf.MoE) -> dict[str, Callable[[Tensor], Tensor]]:
    """The experts one after the other by torch's products."""
    eights, fours = [], []
    for matrices in _matrices(layer):
        scale = matrices.abs().amax(-1, keepdim=True) / 127
        eights.append(
            [((m / s).round().to(torch.int8), s.flatten().bfloat16()) for m, s in zip(matrices, scale, strict=True)]
        )
        fours.append([_int4(m) for m in matrices])
    return {
        "torch int8pack": _loop(layer, lambda x, m: torch._weight_int8pack_mm(x, *m), eights),
        "torch int4pack": _loop(layer, lambda x, m: torch._weight_int4pack_mm_for_cpu(x, m[0], 32, m[1]), fours),
    }


def of_torchao(layer: sf.MoE) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same by torchao's linear maps, where it is installed."""
    try:
        quantization = require("torchao.quantization", "torchao")
    except NotInstalled as error:
        print(f"torchao: {error}")
        return {}
    linears = [[_linear(m) for m in matrices] for matrices in _matrices(layer)]
    for stack in linears:
        for linear in stack:
            quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return {"torchao int8": _loop(layer, lambda x, linear: linear(x), linears)}


def _matrices(layer: sf.MoE) -> list[Tensor]:
    """A GLU's gate keys, keys and values as [E, out, in] in fp32."""
    stacks: Any = (layer.gate_keys, layer.keys, layer.values.mT)
    return [stack.detach().float().contiguous() for stack in stacks]


def _linear(matrix: Tensor) -> nn.Linear:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta", dtype=torch.bfloat16)
    linear.weight = nn.Parameter(matrix.bfloat16(), requires_grad=False)
    return linear


def _loop(
    layer: sf.MoE, product: Callable[[Tensor, Any], Tensor], packed: list[list[Any]]
) -> Callable[[Tensor], Tensor]:
    """A loop over experts, without the gates: what it takes to have no kernel for a mixture."""

    def call(x: Tensor) -> Tensor:
        index = layer.router(x).index_TK
        out = torch.zeros_like(x)
        for e in range(layer.n_experts):
            rows = (index == e).any(1).nonzero().squeeze(1)
            if len(rows):
                part = x[rows]
                h = nn.functional.silu(product(part, packed[0][e])) * product(part, packed[1][e])
                out.index_add_(0, rows, product(h, packed[2][e]))
        return out

    return call


def of_kt_kernel(layer: sf.MoE, shape: MoEShape) -> dict[str, Callable[[Tensor], Tensor]]:
    """kt-kernel's experts of 8 and 4 bits where they run; their activations are quantised, too."""
    try:
        return {f"kt-kernel int{bits}": KTExperts(layer, shape, f"AMXInt{bits}_MOE") for bits in (8, 4)}
    except NotInstalled as error:
        print(f"kt-kernel: {error}")
        return {}


def _int4(matrix: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    n, k = matrix.shape
    grouped = matrix.view(n, k // group, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-6)
    codes = ((grouped - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k), 1)
    factors = torch.stack((scale, low + 8 * scale), -1).bfloat16()  # torch's number is (code - 8) scale + zero
    return packed, factors.transpose(0, 1).contiguous()


@torch.inference_mode()
def row(
    runs: dict[str, Callable[[Tensor], Tensor]], tokens: int, d: int, seconds: float
) -> dict[str, tuple[Quartiles, Quartiles]]:
    """Seconds of a call, and their ratio to bf16's."""
    x = torch.randn(tokens, d, dtype=torch.bfloat16)
    samples = race({name: Run(lambda: None, lambda call=call: call(x)) for name, call in runs.items()}, seconds)
    return {name: (samples.time(name), samples.ratio(name, "bf16")) for name in runs}


def main(argv: Sequence[str] | None = None) -> dict[int, dict[str, tuple[Quartiles, Quartiles]]]:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 32, 256, 1024])
    parser.add_argument("--sizes", type=int, nargs=4, default=[2048, 16, 1024, 8], metavar=("D", "E", "G", "K"))
    parser.add_argument("--seconds", type=float, default=20, help="for a number of tokens")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--profile", action="store_true", help="where the time goes, beside the floor that bytes set")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    for name, fact in describe(torch.device("cpu")).items():
        print(f"{name}: {fact}")
    made = layers(*options.sizes)
    if options.profile:
        _print_profiles(made, options.tokens, options.seconds)
        return {}
    base, shape = made["bf16"], MoEShape(max(options.tokens), *options.sizes)
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        **made,
        **of_torch(base),
        **of_torchao(base),
    }
    found = {}
    for tokens in options.tokens:
        found[tokens] = row(runs, tokens, options.sizes[0], options.seconds)
        bars = dict(zip(("int8", "int4"), BARS.get(tokens, ()), strict=False))
        for name, (time, ratio) in found[tokens].items():
            bar = f"  bar {bars[name]:.2f}" if name in bars and options.sizes == [2048, 16, 1024, 8] else ""
            _print_row(tokens, name, time, ratio, bar)
    peers = of_kt_kernel(base, shape)
    for tokens, name in itertools.product(options.tokens, peers):  # alone: its threads do not sleep between calls
        x = torch.randn(tokens, options.sizes[0], dtype=torch.bfloat16)
        with torch.inference_mode():
            time = race({name: Run(lambda: None, functools.partial(peers[name], x))}, options.seconds / 4).time(name)
        bf16 = found[tokens]["bf16"][0].median
        ratio = Quartiles(time.low / bf16, time.median / bf16, time.high / bf16, time.rounds)
        found[tokens][name] = time, ratio
        _print_row(tokens, name, time, ratio)
    return found


def _print_row(tokens: int, name: str, time: Quartiles, ratio: Quartiles, bar: str = "") -> None:
    print(
        f"T {tokens:5} {name:15} {time.median * 1e3:9.3f} ms  {ratio.median:5.2f} of bf16 "
        f"({ratio.low:.2f} to {ratio.high:.2f}, {ratio.rounds} rounds){bar}",
        flush=True,
    )


def _print_profiles(made: dict[str, sf.MoE], tokens: Sequence[int], seconds: float) -> None:
    bytes_a_second = bandwidth()
    print(f"memory is read with {bytes_a_second / 1e9:.1f} GB/s; call in ms, its parts in shares of it")
    print(HEAD)
    for n in tokens:
        for name in ("int8", "int4"):
            print(f"{n:<5} {name} {profile(made[name], n, seconds / 2).line(bytes_a_second)}", flush=True)


if __name__ == "__main__":
    main()
