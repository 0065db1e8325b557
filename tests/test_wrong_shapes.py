"""Tensors that do not fit: layers refuse a parameter one off in any dimension, the core any operand; nothing is read.

The cases run in processes of their own, which name each case before they run it: one that dies has a culprit.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from matrix.layers import LAYERS, D
from torch import Tensor, nn
from torch.func import functional_call

import sparse_ffn as sf
from sparse_ffn.backends import cpu
from sparse_ffn.layers.balanced import Balanced
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.routing import DeepSeekRouter

BACKENDS = ("reference", "torch", *(() if cpu.PROBLEM else ("cpu",)))
TRITON = ("triton",) if importlib.util.find_spec("triton") else ()
WIDE = ("avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")
built = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")


# ---- Layers


def deepseek() -> nn.Module:
    return sf.MoE(D, 8, 4, 2, router=partial(DeepSeekRouter, n_groups=4, topk_groups=2), balance="bias", glu=True)


MORE: dict[str, Callable[[], nn.Module]] = {
    "DenseFFN, gated": lambda: sf.DenseFFN(D, 20, glu=True, d_out=6),
    "TopKFFN, plain": lambda: sf.TopKFFN(D, 20, 5, d_out=6),
    "ProductKeyMemory, plain": lambda: sf.ProductKeyMemory(D, 5, 7, n_heads=2, d_out=6),
    "ProductKeyMemory, gated": lambda: sf.ProductKeyMemory(D, 3, 2, gated=True, d_out=6),
    "SigmaMoE, biased": lambda: sf.SigmaMoE(D, 9, 4, 3, balance=("bias", "entropy"), balance_weight=(1, 1), glu=True),
    "SigmaMoE, dropping": lambda: sf.SigmaMoE(D, 9, 4, 3, bias=True, dropout=0.5, expert_dropout=0.1),
    "DeepSeek": deepseek,
    "SharedExpertMoE": lambda: SharedExpertMoE(deepseek(), sf.DenseFFN(D, 12, glu=True), gated=True),
}


def exchanged(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor with one more and one less in each dimension, with a dimension more, and with none but one."""
    for dim, by in itertools.product(range(tensor.dim()), (1, -1)):
        shape = list(tensor.shape)
        shape[dim] += by
        yield torch.randn(shape)
    yield tensor.unsqueeze(0)
    if tensor.dim() > 1:
        yield tensor.flatten()
        yield tensor[..., :1]


def calls(layer: nn.Module, x: Tensor) -> dict[str, Callable[[dict[str, Tensor]], Any]]:
    """Ways through a layer: training and inference, and where there is a router with the unfused path of both."""

    def call(parameters: dict[str, Tensor], train: bool, **options: Tensor) -> Any:
        layer.train(train)
        with torch.set_grad_enabled(train):
            return functional_call(layer, parameters, (x,), options)

    found = {"training": partial(call, train=True), "inference": partial(call, train=False)}
    if isinstance(layer, (sf.MoE, SharedExpertMoE)):
        other = x.clone()
        found |= {f"unfused {name}": partial(way, router_input=other) for name, way in found.items()}
    return found


def state(layer: nn.Module) -> dict[str, Any]:
    moe = [m for m in layer.modules() if isinstance(m, Balanced)]
    return {
        **{name: t.clone() for name, t in layer.state_dict().items()},
        **{f"load {i}": m.router.load.clone() for i, m in enumerate(moe)},
        **{f"routed {i}": m._routed for i, m in enumerate(moe)},
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[name]) if isinstance(v, Tensor) else v is b[name] for name, v in a.items()
    )


def layer_cases() -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Each case with what it does: returns what is wrong with its outcome, or None."""
    makers = {**LAYERS, **MORE}
    for kind, make in makers.items():
        layer = make()
        x = torch.randn(5, layer.d_model)
        before = state(layer)
        known = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        for name, (way, call) in itertools.product(known, calls(layer, x).items()):
            for wrong, backend in itertools.product(exchanged(known[name].detach()), (*BACKENDS, *TRITON)):
                yield (
                    f"{backend}: {kind}, {way}, {name} {list(known[name].shape)} -> {list(wrong.shape)}",
                    partial(refused_by_layer, layer, call, backend, name, wrong, before),
                )
    layer, x = sf.SigmaMoE(2048, 1024, 1, 2), torch.randn(5, 2048)
    before, wrong = state(layer), torch.randn(1024, 1)
    for way, call in calls(layer, x).items():  # large enough to leave what the process owns
        yield f"a large router, {way}", partial(refused_by_layer, layer, call, "auto", "router.weight", wrong, before)


def refused_by_layer(
    layer: nn.Module, call: Callable[..., Any], backend: str, name: str, wrong: Tensor, before: dict[str, Any]
) -> str | None:
    own = name.removeprefix("routed.").removeprefix("shared.").removeprefix("moe.")
    try:
        with sf.backend(backend):
            call({name: wrong})
    except ValueError as error:
        if f"{own} must have shape" not in str(error) or f"got {list(wrong.shape)}" not in str(error):
            return f"unclear: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "no error"
    return None if same(state(layer), before) else "the layer has changed"


# ---- The core


@dataclass
class Operand:
    """A tensor of a call to the core: its sizes by letter, and how it is filled."""

    name: str
    letters: str
    dtype: torch.dtype = torch.float32
    below: str = ""
    out: bool = False
    optional: bool = False


SIZES = {
    **{"T": 6, "K": 2, "D": 8, "E": 3, "G": 4, "O": 7, "S": 12, "F": 4, "B": 2},
    **{"N": 9, "M": 5, "L": 6, "R": 8, "V": 5, "J": 3, "C": 1, "U": 9, "P": 3, "W": 3, "H": 2, "Q": 81, "2": 2, "k": 4},
}
FIXED = "SFUC2"  # sizes that follow from others
i64, i32, flag = torch.int64, torch.int32, torch.bool


def outputs(*operands: Operand) -> tuple[Operand, ...]:
    for operand in operands:
        operand.out = True
    return operands


def maybe(*operands: Operand) -> tuple[Operand, ...]:
    for operand in operands:
        operand.optional = True
    return operands


def units() -> tuple[Operand, ...]:
    matrices = Operand("x", "TD"), Operand("keys", "EGD"), Operand("values", "EGO")
    return *matrices, *maybe(Operand("gate_keys", "EGD"), Operand("key_bias", "EG"))


def saved() -> tuple[Operand, ...]:
    return Operand("order", "S", i32), Operand("offsets", "F", i32), Operand("up", "SG"), Operand("glu_gate", "SG")


def topk_saved() -> tuple[Operand, ...]:
    selected = Operand("saved.selected", "TC", i32)  # all units' bits are in one word
    return selected, Operand("saved.up", "Tk"), *maybe(Operand("saved.glu_gate", "Tk"))


def slots() -> tuple[Operand, ...]:
    expert, gather, scatter = (Operand(f"{n}_index", "S", i64, below) for n, below in zip(NAMES, "FNR", strict=True))
    return expert, *maybe(gather, scatter, Operand("reduction_weight", "S"))


def codes(name: str, letters: str) -> tuple[Operand, ...]:
    """Rows of one group each; without those of ``gate_keys`` there is no GLU."""
    qdata = Operand(f"{name}.qdata", letters, torch.int8, optional=name == "gate_keys")
    scale, zero = Operand(f"{name}.scale", "EGC"), Operand(f"{name}.zero_point", "EGC", torch.uint8)
    return qdata, scale, *maybe(zero)


NAMES = ("expert", "gather", "scatter")
INDEX, GATE = Operand("index", "TK", i64, "F"), Operand("gate", "TK")  # E is no expert
SELECTED = Operand("index", "TK", i64, "V")
SCALE = maybe(Operand("dropout_mask", "TKG"))
GRADIENTS = (
    *(Operand("dkeys", "EGD"), Operand("dvalues", "EGO"), Operand("dgate_keys", "EGD"), Operand("dkey_bias", "EG")),
)
TABLE = Operand("values", "NO"), Operand("index", "TJ", i64, "N"), Operand("weight", "TJ")
CALLS: dict[str, tuple[tuple[Operand, ...], tuple[int, ...]]] = {
    "experts_forward": ((*units(), INDEX, GATE, *SCALE, *outputs(Operand("out", "TO"), *saved())), (3, 32)),
    "experts_backward": (
        (
            *(*units(), GATE, *SCALE, *saved(), Operand("dout", "TO")),
            *maybe(*outputs(Operand("dx", "TD"), *GRADIENTS, Operand("dgate", "TK"))),
        ),
        (3,),
    ),
    "moe_forward": (
        (
            *(*units(), Operand("router.weight", "VD")),
            *maybe(Operand("router.bias", "V"), Operand("mask", "T", flag), *SCALE),
            *outputs(Operand("out", "TO"), Operand("index", "TK", i64)),
            *maybe(*outputs(Operand("gate", "TK"), Operand("softmax_sums", "BV"))),
            *outputs(*saved()),
        ),
        (0, 3, 32),
    ),
    "moe_backward": (
        (
            *(*units(), Operand("router.weight", "VD"), *maybe(Operand("mask", "T", flag)), *SCALE, SELECTED, GATE),
            *(*saved(), Operand("dout", "TO"), *maybe(Operand("dgate", "TK"), Operand("dsoftmax_sums", "BV"))),
            *maybe(*outputs(Operand("dx", "TD"), Operand("drouter_weight", "VD"), *GRADIENTS)),
        ),
        (0, 3),
    ),
    "cvmm_forward": ((Operand("x", "NM"), Operand("weight", "EML"), *slots(), *outputs(Operand("out", "RL"))), ()),
    "cvmm_backward": (
        (
            *(Operand("x", "NM"), Operand("weight", "EML"), *slots(), Operand("dout", "RL")),
            *maybe(*outputs(Operand("dx", "NM"), Operand("dweight", "EML"), Operand("dreduction_weight", "S"))),
        ),
        (),
    ),
    "quantized_cvmm": (
        (
            *(Operand("x", "NM"), Operand("qdata", "EGM", torch.int8), Operand("scale", "EGC")),
            *(*maybe(Operand("zero_point", "EGC", torch.uint8)), *slots(), *outputs(Operand("out", "RG"))),
        ),
        (0,),
    ),
    "quantized_moe": (
        (
            *(Operand("x", "TM"), *codes("keys", "EGM"), *codes("values", "EGN"), *codes("gate_keys", "EGM")),
            *(*maybe(Operand("key_bias", "EG")), Operand("router.weight", "VM"), *maybe(Operand("router.bias", "V"))),
            *outputs(Operand("out", "TN"), Operand("index", "TK", i64)),
        ),
        (0, 3),
    ),
    "bag_forward": ((*TABLE, *outputs(Operand("out", "TO"))), (0,)),
    "bag_backward": (
        (*TABLE, Operand("dout", "TO"), *maybe(*outputs(Operand("dweight", "TJ"), Operand("dvalues", "NO")))),
        (),
    ),
    "bag_backward_sparse": (
        (
            *(*TABLE, Operand("dout", "TO"), *maybe(*outputs(Operand("dweight", "TJ")))),
            *outputs(Operand("dvalue_rows", "UO")),
        ),
        (),
    ),
    "wide_product_forward": (
        (Operand("x", "BMD"), Operand("w", "BND"), *outputs(Operand("out", "BMN"), Operand("scale", "BMP"))),
        (1,),
    ),
    "normalised_backward": (
        (
            *(Operand("dout", "MPW"), Operand("out", "MPW"), Operand("scale", "MP")),
            *outputs(Operand("dproduct", "MPW")),
        ),
        (2,),
    ),
    "product_key_topk": (
        (Operand("scores", "TH2N"), *outputs(Operand("index", "THk", i64), *maybe(Operand("sums", "THk")))),
        (),
    ),
    "product_key_topk_backward": (
        (Operand("dsums", "THk"), Operand("index", "THk", i64, "Q"), *outputs(Operand("dscores", "TH2N"))),
        (),
    ),
    "topk_hidden_forward": (
        (
            Operand("up", "TN"),
            *maybe(Operand("glu_gate", "TN"), Operand("dropout_mask", "TN"), Operand("norm", "N")),
            *maybe(*outputs(Operand("index", "Tk", i64), Operand("kept", "Tk"), Operand("hidden", "TN"))),
            *maybe(*outputs(*topk_saved())),
        ),
        (2, SIZES["k"]),
    ),
    "topk_hidden_backward": (
        (
            *(*topk_saved(), *maybe(Operand("dropout_mask", "TN")), Operand("dhidden", "TN")),
            *outputs(Operand("hidden", "TN"), Operand("dup", "TN"), Operand("dglu_gate", "TN")),
        ),
        (2,),
    ),
    "topk_index": ((Operand("selected", "TC", i32), *outputs(Operand("index", "Tk", i64))), (SIZES["N"],)),
}


def filled(operand: Operand, shape: list[int]) -> Tensor:
    if operand.out:
        return torch.full(shape, -7, dtype=operand.dtype)
    if operand.name in ("order", "offsets"):
        expert = torch.arange(SIZES["S"]) % SIZES["E"]
        order = expert.argsort(stable=True).to(i32)
        offsets = torch.arange(SIZES["F"], dtype=i32) * (SIZES["S"] // SIZES["E"])
        right = order if operand.name == "order" else offsets
        return torch.cat((right, right))[: shape[0]] if len(shape) == 1 else right.expand(shape).contiguous()
    if operand.below:
        return torch.arange(torch.Size(shape).numel()).remainder(SIZES[operand.below]).view(shape)
    return torch.randn(shape).abs().to(operand.dtype)


def core_cases() -> Iterator[tuple[str, Callable[[], str | None]]]:
    for function, (operands, options) in CALLS.items():
        tensors = [filled(o, [SIZES[c] for c in o.letters]) for o in operands]
        yield f"{function}, all right", partial(accepted, function, tensors, options)
        for i, operand in enumerate(operands):
            where = f"{function}, {operand.name}"
            optional = operand.optional or operand.name in ("up", "glu_gate", "scale")
            others = "".join(o.letters for o in operands if o is not operand)
            for dim, by in itertools.product(range(len(operand.letters)), (1, -1)):
                shape = [SIZES[c] for c in operand.letters]
                shape[dim] += by
                wrong = [*tensors[:i], filled(operand, shape), *tensors[i + 1 :]]
                bound = operand.letters[dim] in others + FIXED
                yield f"{where} {shape}", partial(refused if bound else harmless, function, wrong, options, operand)
            right = tensors[i]
            others_dtype = torch.float64 if right.is_floating_point() else torch.int16
            for how, wrong_one in {
                "of another dtype": right.to(others_dtype),
                "of a wrong dtype": right.to(i64 if right.dtype != i64 else i32),
                "on meta": right.to("meta"),
                "a number": right.flatten()[0],
                "with a dimension more": right.unsqueeze(0),
                "of five dimensions": right.view(1, 1, 1, 1, -1),
                **({"every other": right.repeat_interleave(2, -1)[..., ::2]} if right.shape[-1] > 1 else {}),
                **({} if optional else {"absent": None}),
            }.items():
                wrong = [*tensors[:i], wrong_one, *tensors[i + 1 :]]
                yield f"{where} {how}", partial(refused, function, wrong, options, operand)
            if operand.below:
                for bad in (-1, SIZES[operand.below], 2**31, 2**32, 2**63 - 1, -(2**63)):
                    index = right.clone()
                    index.view(-1)[-1] = bad
                    wrong = [*tensors[:i], index, *tensors[i + 1 :]]
                    yield f"{where} with {bad}", partial(refused, function, wrong, options, operand, IndexError)
            if operand.name in ("order", "offsets") and not operand.out:
                for at, bad in itertools.product((0, 1, -1), (-1, SIZES["S"] + 1, 2**31 - 1)):
                    index = right.clone()
                    index[at] = bad
                    wrong = [*tensors[:i], index, *tensors[i + 1 :]]
                    yield f"{where} with {bad} at {at}", partial(refused, function, wrong, options, operand)


def impossible_cases() -> Iterator[tuple[str, Callable[[], str | None]]]:
    """More kept units than there are, and empty tensors that name more than memory holds."""
    operands, options = CALLS["topk_hidden_backward"]
    for more in (1, 1000, 100_000):
        sizes = {**SIZES, "k": SIZES["N"] + more}
        tensors = [filled(o, [sizes[c] for c in o.letters]) for o in operands]
        yield f"{more} kept units too many", partial(refused, "topk_hidden_backward", tensors, options, operands[1])
    huge, none = 2**62, torch.zeros(4, dtype=i64)
    yield (
        "2**62 experts",
        partial(too_large, lambda: sf.functional.cvmm(torch.empty(4, 0), torch.empty(huge, 0, 3), none)),
    )
    units, slots = torch.empty(1, huge, 0), (none.view(4, 1), torch.ones(4, 1))
    yield "2**62 units", partial(too_large, lambda: sf.functional.expert_ffn(torch.empty(4, 0), units, units, *slots))
    rows = torch.empty(huge, 0)
    yield "2**62 rows", partial(too_large, lambda: sf.functional.weighted_bag(rows, *slots))


def too_large(call: Callable[[], object]) -> str | None:
    with sf.backend("cpu"), torch.no_grad():
        try:
            call()
        except (ValueError, MemoryError):
            return None
    return "no error"


def accepted(function: str, tensors: list[Tensor], options: tuple[int, ...]) -> str | None:
    cpu.call(function, tuple(t.clone() for t in tensors), *options)
    return None


def refused(
    function: str,
    tensors: list[Any],
    options: tuple[int, ...],
    operand: Operand,
    kind: Any = (ValueError, TypeError, IndexError),
) -> str | None:
    before = [None if t is None or t.is_meta else t.clone() for t in tensors]
    try:
        cpu.call(function, tuple(tensors), *options)
    except Exception as error:
        if not isinstance(error, kind):
            return f"{type(error).__name__}: {error}"
        named = {t.name for t in CALLS[function][0]} | {"k", "gather_index", "scatter_index"}
        if not any(str(error).startswith(f"{name} ") or f" {name} " in str(error) for name in named):
            return f"unclear: {error}"
    else:
        return "no error"
    unchanged = all(b is None or torch.equal(b, t) for b, t in zip(before, tensors, strict=True))
    return None if unchanged else "memory was written"


def harmless(function: str, tensors: list[Tensor], options: tuple[int, ...], operand: Operand) -> str | None:
    """A size that no other tensor has: another problem, or an error."""
    try:
        cpu.call(function, tuple(tensors), *options)
    except (ValueError, IndexError):
        return None
    return None


# ---- Processes


def run(which: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    cases = {"layers": (layer_cases,), "core": (core_cases, impossible_cases)}[which]
    n = 0
    for name, check in (case for some in cases for case in some()):
        n += 1
        print("case", name, flush=True)
        wrong = check()
        if wrong is not None:
            print("wrong", name, "--", wrong, flush=True)
    print("done", n, flush=True)


def outcome(which: str, at_least: int, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, which],
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else "nothing"
    wrong = [line for line in lines if line.startswith("wrong")]
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong[:20])
    assert last.startswith("done"), f"died in: {last}\n{done.stderr[-2000:]}"
    assert int(last.split()[1]) >= at_least


def test_a_layer_refuses_every_parameter_that_does_not_fit_by_its_name_and_stays_as_it_was() -> None:
    outcome("layers", 5000, TRITON_INTERPRET="1")


@built
@pytest.mark.parametrize("isa", ["generic", *(pytest.param(isa, marks=pytest.mark.exhaustive) for isa in WIDE)])
def test_the_core_refuses_every_operand_that_does_not_fit_and_touches_nothing(isa: str) -> None:
    if isa not in cpu.instruction_sets():
        pytest.skip("not on this processor")
    outcome("core", 1000, SPARSE_FFN_ISA=isa)


if __name__ == "__main__":
    run(sys.argv[1])
