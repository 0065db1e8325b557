"""quantize_experts_ and dequantize_experts_: the experts of a model as codes of 4 or 8 bits, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_ffn.checks import check_changeable, check_function, check_type
from sparse_ffn.compress.config import ExpertQuantization
from sparse_ffn.compress.output_error import output_errors
from sparse_ffn.compress.quantizer import empty, quantize
from sparse_ffn.compress.report import QuantizationReport, QuantizedLayer
from sparse_ffn.compress.stacks import Stack, check_here, experts_of, tell, untaught
from sparse_ffn.layers.rows import ExpertRows, QuantizedRows

Filter = Callable[[nn.Module, str], bool]
Made = dict[int, tuple[QuantizedRows, float, float]]
"""By the id of a parameter: what is stored of it, its relative error and its outlier score."""


@torch.inference_mode(False)  # a tensor that is made in it never trains
@torch.no_grad()
def quantize_experts_(
    model: nn.Module,
    config: ExpertQuantization | None = None,
    filter_fn: Filter | None = None,
    *,
    batches: Iterable[Any] | None = None,
) -> QuantizationReport:
    """Store the experts of a trained model in 4 or 8 bits, in place: they are then frozen and computed as they are.

    ``keys``, ``gate_keys`` and ``values`` of ``MoE`` layers, and with ``sparse_ffn.integrations.transformers`` imported
    the experts of transformers' models, become ``QuantizedRows``. Router, biases and all else stay. Activations are not
    quantised: a layer computes what it computed with the rounded weights. A model on meta gets empty codes, which
    ``load_state_dict(assign=True)`` fills.

    Args:
        model: any module with such layers; a layer itself.
        config: how; None for 4 bits, groups of 32 with a zero point.
        filter_fn: module and name -> whether to quantise its experts.
        batches: as ``expert_stats``': the model runs on them before, and the report tells the error of each layer's
            output, too. Until they have run, the weights and all codes are in memory.

    Returns:
        For each layer bytes before and after, and each stack's relative error and outlier score.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: nothing to quantise; a group size that does not divide d_model or d_out; fp64, weights that are not
            finite, or a stack that is no plain parameter: stored rows already, sharded, parametrised, adapted
            by peft, or held by accelerate. Nothing has been changed then.
    """
    check_changeable("model", model)
    config = ExpertQuantization() if config is None else config
    check_type("config", config, ExpertQuantization, "an ExpertQuantization")
    if filter_fn is not None:
        check_function("filter_fn", filter_fn, "module and name")
    found = [place for place in experts_of(model) if filter_fn is None or filter_fn(place[1], place[0])]
    if not found:
        raise ValueError(
            f"model has no MoE layer whose experts could be quantised (or filter_fn leaves none){untaught(model)}"
        )
    check_here(model, found)
    for name, _, stacks in found:
        for stack in stacks:
            _check(name, stack, config)
    made: Made = {}
    errors: dict[str, float] = {}
    if batches is not None:
        for _, _, stacks in found:
            _make(stacks, config, made)
        errors = output_errors(model, found, {of: rows for of, (rows, _, _) in made.items()}, batches)
    reports = [_quantize(name, stacks, config, made, errors.get(name)) for name, _, stacks in found]
    tell(model)
    return QuantizationReport(tuple(reports))


@torch.inference_mode(False)  # a tensor that is made in it never trains
@torch.no_grad()
def dequantize_experts_(model: nn.Module, filter_fn: Filter | None = None) -> None:
    """Make parameters of stored rows again, in place: of the numbers that they stand for, in the layer's dtype.

    They train, whether the parameters before did so or not. Tied stacks stay tied.

    Args:
        model: any module.
        filter_fn: module and name -> whether to change its experts.

    Raises:
        TypeError: the model is no module, or ``filter_fn`` no function.
        ValueError: accelerate holds the stored rows. Nothing has been changed then.
    """
    check_changeable("model", model)
    if filter_fn is not None:
        check_function("filter_fn", filter_fn, "module and name")
    made: dict[Tensor, nn.Parameter] = {}
    found = [place for place in experts_of(model) if filter_fn is None or filter_fn(place[1], place[0])]
    stored = [(name, of, [s for s in stacks if isinstance(s.held, ExpertRows)]) for name, of, stacks in found]
    check_here(model, stored)
    for _, _, stacks in stored:
        for stack in stacks:
            stack.restore(made)
    tell(model)


def _make(stacks: list[Stack], config: ExpertQuantization, made: Made) -> None:
    """What is to be stored of each parameter, by its id: tied stacks stay tied."""
    for stack in stacks:
        if id(stack.held) not in made:
            made[id(stack.held)] = _stored(stack, config)


def _quantize(
    name: str, stacks: list[Stack], config: ExpertQuantization, made: Made, output_error: float | None
) -> QuantizedLayer:
    _make(stacks, config, made)
    before = after = 0
    errors: dict[str, float] = {}
    outliers: dict[str, float] = {}
    for stack in stacks:
        rows, errors[stack.name], outliers[stack.name] = made[id(stack.held)]
        before, after = before + stack.held.nbytes, after + rows.n_bytes()
        stack.store(rows)
    return QuantizedLayer(name, (before, after), errors, outliers, output_error)


def _stored(stack: Stack, config: ExpertQuantization) -> tuple[QuantizedRows, float, float]:
    """A stack as codes, one expert at a time, its relative error and its outlier score."""
    rows, bits = stack.rows(), config.bits_of(stack.is_values)
    group, symmetric = config.group_of(rows.shape[-1], bits), config.symmetric_at(bits)
    codes = empty(rows, bits, group, symmetric)
    if rows.is_meta:
        return QuantizedRows(codes), math.nan, math.nan
    error = total = outliers = 0.0
    for e in range(rows.shape[0]):
        found = quantize(rows[e], bits, group, symmetric, config.scale)
        for whole, part in zip(codes, found, strict=True):
            if whole is not None and part is not None:
                whole[e] = part
        exact = rows[e].double()
        error += (exact - found.dense().double()).square().sum().item()
        total += exact.square().sum().item()
        size = exact.abs()
        score = size.amax(0) / size.mean(0).clamp_min(torch.finfo(size.dtype).tiny)
        outliers = max(outliers, score.max().item())
    return QuantizedRows(codes), math.sqrt(error / total) if total else 0.0, outliers


def _check(name: str, stack: Stack, config: ExpertQuantization) -> None:
    """Raise ValueError unless a stack can be quantised so."""
    where, held = f"{name}.{stack.name}" if name else stack.name, stack.held
    if isinstance(held, ExpertRows):
        raise ValueError(f"{where} are stored rows already: call dequantize_experts_ first, or leave them out")
    if getattr(stack.module, "_split", None) is not None:
        raise ValueError(f"{where} is split by sparse_ffn.parallel, and stored rows are not: one process quantises")
    if stack.name not in stack.module._parameters or is_traceable_wrapper_subclass(held):
        raise ValueError(
            f"{where} must be a plain parameter, got {type(held).__name__} that something computes or shards: quantise "
            "first, then parametrise or shard"
        )
    if held.dtype == torch.float64:
        raise ValueError(f"{where} has dtype float64: codes stand for numbers of fp32, bf16 and fp16, convert it first")
    bits, columns = config.bits_of(stack.is_values), stack.rows().shape[-1]
    group = config.group_of(columns, bits)
    if columns % group or (bits == 4 and group % 2):
        width = "d_out" if stack.is_values else "d_model"
        even = ", in even groups at 4 bits" if bits == 4 else ""
        near = _near(columns, group, bits)
        what = f"take one of {', '.join(map(str, near))}" if near else "no size does, take bits = 8"
        raise ValueError(f"group_size = {group} must divide {width} = {columns} of {where}{even}: {what}")
    if not held.is_meta:
        bad = next((e for e, matrix in enumerate(stack.rows()) if not matrix.isfinite().all()), None)
        if bad is not None:
            raise ValueError(f"{where}: the weights of expert {bad} are not finite")


def _near(columns: int, group: int, bits: int) -> list[int]:
    """The group sizes next to one that rows of so many columns admit, at most two above and below."""
    fit = [n for n in range(1, columns + 1) if columns % n == 0 and (bits == 8 or n % 2 == 0)]
    below, above = [n for n in fit if n < group], [n for n in fit if n > group]
    return [*below[-2:], *above[:2]]
