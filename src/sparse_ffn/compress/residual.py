"""compress_experts_: mixtures of experts as one base and residuals of low rank, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_changeable, check_count, check_loaded, check_plain, check_positive, check_unadapted
from sparse_ffn.compress.report import CompressedLayer, CompressionReport
from sparse_ffn.convert.init.partition import balanced_assignment
from sparse_ffn.convert.init.weights import relative_error, wide
from sparse_ffn.layers.low_rank import LowRankMoE
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.rows.base import check_dense
from sparse_ffn.ops.autocast import without_autocast
from sparse_ffn.routing.base import Router
from sparse_ffn.running import fork_random

# E experts, G units of each, C numbers of a unit, D d_model, O d_out, R rank

MADE_OF = {f"{part}_{end}": f"{part}s" for part in ("key", "value") for end in ("up", "down")}
MADE_OF |= {"gate_up": "gate_keys", "gate_down": "gate_keys"}
"""The stack that a low-rank factor is made of."""


@torch.inference_mode(False)  # a tensor that is made in it never trains
@torch.no_grad()
def compress_experts_(model: nn.Module, rank: int, *, iterations: int = 8) -> CompressionReport:
    """Make a ``LowRankMoE`` of each ``MoE`` in a model, in place: a base and low-rank residuals (ResMoE, 2503.06881).

    The base is the barycenter of the experts, whose units are put in an order in which they resemble each other: that
    changes no expert's function. It starts as the first expert; then each expert's units are assigned to the base's,
    and the base becomes their mean, until it stays. What is left of an expert's keys, gate keys and values becomes the
    product of two matrices of the rank, by its singular values; its key_bias stays as it is. The router is the old one.

    Experts that were trained from the start have less in common: it is for those that began as copies,
    ``init="upcycle"``. The documentation has what it costs, beside pruning and quantising.

    Args:
        model: any module that holds ``MoE`` layers; hooks on these and ties between the parameters of several are lost,
            and optimizers hold the old ones. What is made of a frozen parameter is frozen.
        rank: of what each expert keeps of its own, at most the least that loses nothing, max(min(G, D), min(G, O)).
        iterations: most rounds of assignment. scipy's ``linear_sum_assignment`` is used where it is installed; without
            it the assignment is near the best, and kept only where it is better than the one before.

    Returns:
        For each layer parameters before and after, and each stack's relative error.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: no ``MoE`` in the model, or the model itself is one; a rank that is too large for one of them;
            stored rows, experts on meta, not finite, masked, parametrised or adapted by peft, a wrapped router, a
            subclass with a forward of its own, or a layer that ``sparse_ffn.parallel`` has split. Nothing has
            been changed then.
    """
    check_changeable("model", model)
    rank = check_positive("rank", rank)
    iterations = check_count("iterations", iterations)
    if isinstance(model, MoE):
        raise ValueError("model is itself a MoE, and no place for another layer: put it into a torch.nn.Sequential")
    places = [
        (name, owner, attribute, child)
        for name, owner in model.named_modules()
        for attribute, child in owner._modules.items()  # with those that have several places
        if isinstance(child, MoE)
    ]
    if not places:
        raise ValueError(f"model, a {type(model).__name__}, holds no MoE")
    check_unadapted(model, [(layer, layer._parameters) for *_, layer in places])
    for path, _, attribute, layer in places:
        name = f"{path}.{attribute}" if path else attribute
        check_dense(layer)
        if type(layer).forward is not MoE.forward or type(layer)._forward is not MoE._forward:
            raise ValueError(f"model's layer {name} is a {type(layer).__name__}, whose own forward would be lost")
        if not isinstance(layer.router, Router):
            raise ValueError(f"the router of {name} is a {type(layer.router).__name__}: compress before it is wrapped")
        if layer._split is not None:
            raise ValueError(f"model's layer {name} is split by sparse_ffn.parallel: compress before")
        D, O, G = layer.d_model, layer.d_out, layer.expert_size
        check_positive("rank", rank, max(min(G, D), min(G, O)), f"that of the experts of {name}")
        for stack in ("keys", "gate_keys", "values", "key_bias", "out_bias", "constants"):
            held = getattr(layer, stack)
            if held is None:
                continue
            check_loaded(model, f"{name}.{stack}", held)
            check_plain(layer, stack, f"model's layer {name}", "compress before")
            if not held.isfinite().all():
                raise ValueError(f"model's layer {name}: {stack} is not finite")
    made: dict[MoE, tuple[LowRankMoE, CompressedLayer]] = {}
    for path, _, attribute, layer in places:
        if layer not in made:  # a layer in several places stays one
            with without_autocast(layer.values):
                made[layer] = _compressed(f"{path}.{attribute}" if path else attribute, layer, rank, iterations)
    for _, owner, attribute, layer in places:
        setattr(owner, attribute, made[layer][0])
    return CompressionReport(tuple(report for _, report in made.values()))


def _compressed(name: str, layer: MoE, rank: int, iterations: int) -> tuple[LowRankMoE, CompressedLayer]:
    small = _empty(layer, rank)
    stacks = {n: wide(t) for n in ("keys", "gate_keys", "values") if (t := getattr(layer, n)) is not None}
    bias = [] if layer.key_bias is None else [wide(layer.key_bias).unsqueeze(2)]
    order_EG, spread = barycenter(torch.cat([*stacks.values(), *bias], dim=2), iterations)
    index_EG1 = order_EG.unsqueeze(2)
    errors = {}
    for stack, own in stacks.items():
        rows = own.gather(1, index_EG1.expand_as(own))
        base = rows.mean(0)
        left, right, live = _factors(rows - base, rank, rows)
        errors[stack] = relative_error(base + left @ right, rows)
        getattr(small, stack).copy_(base)
        prefix = {"keys": "key", "gate_keys": "gate", "values": "value"}[stack]
        up, down = getattr(small, f"{prefix}_up"), getattr(small, f"{prefix}_down")
        # what no residual needs keeps a new layer's factors: two that are 0 would never get a gradient
        if stack != "values":
            up.copy_(torch.where(live.unsqueeze(1), left, up))
            down.copy_(torch.where(live.unsqueeze(2), right, down))
        else:
            down.copy_(torch.where(live.unsqueeze(1), left, down))
            up.copy_(torch.where(live.unsqueeze(2), right, up))
    for own_name in ("out_bias", "constants"):
        if (old := getattr(layer, own_name)) is not None:
            getattr(small, own_name).copy_(old)
    if layer.key_bias is not None:
        small._own()["key_bias"].copy_(layer.key_bias.gather(1, order_EG))
    for own_name, parameter in small.named_parameters(recurse=False):
        parameter.requires_grad_(getattr(layer, MADE_OF.get(own_name, own_name)).requires_grad)
    small.train(layer.training)
    return small, CompressedLayer(name, (layer.n_parameters, small.n_parameters), spread, errors)


def _empty(layer: MoE, rank: int) -> LowRankMoE:
    """A layer of the MoE's options, with its router."""
    options: Any = {
        name: getattr(layer, name)
        for name in (
            "activation", "d_out", "null_experts", "null_kind", "null_share", "dropout", "balance", "balance_weight",
            "balance_over", "aux", "sync_balance", "init_scale",
        )
    }  # fmt: skip
    with fork_random(layer.values.device):
        return LowRankMoE(
            layer.d_model, layer.n_experts, layer.expert_size, layer.k, rank,
            router=layer.router, glu=layer.gate_keys is not None, bias=layer.out_bias is not None,
            device=layer.values.device, dtype=layer.values.dtype, **options,
        )  # fmt: skip


def _factors(residual_EGC: Tensor, rank: int, rows_EGC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices [E, G, R] and [E, R, C] whose products are nearest to the residuals of the rows.

    Also which of the R are more than what rounding the rows leaves, bool [E, R]; of the others both are 0.
    """
    left, sizes, right = torch.linalg.svd(residual_EGC, full_matrices=False)
    missing = max(rank - sizes.shape[1], 0)
    rounding = torch.finfo(sizes.dtype).eps * max(rows_EGC.shape[1:])
    live = sizes[:, :rank] > rounding * torch.linalg.matrix_norm(rows_EGC).unsqueeze(1)
    roots = torch.where(live, sizes[:, :rank].sqrt(), 0).unsqueeze(1)
    first, second = left[:, :, :rank] * roots, right[:, :rank] * roots.mT
    pad = nn.functional.pad
    return pad(first, (0, missing)), pad(second, (0, 0, 0, missing)), pad(live, (0, missing))


def barycenter(rows_EGC: Tensor, iterations: int) -> tuple[Tensor, tuple[float, ...]]:
    """An order of each expert's units, [E, G], in which the experts are near to their mean, and how near in each round.

    Alternating minimisation of (1/E) Σ_e ‖P_e W_e - C‖² over the permutations P_e and C (ResMoE, section 3.2).
    """
    order_EG = torch.arange(rows_EGC.shape[1], device=rows_EGC.device).repeat(len(rows_EGC), 1)
    base_GC, spread = rows_EGC[0], []
    for _ in range(iterations):
        before = order_EG
        order_EG = torch.stack([_assigned(base_GC, rows, order) for rows, order in zip(rows_EGC, before, strict=True)])
        ordered = rows_EGC.gather(1, order_EG.unsqueeze(2).expand_as(rows_EGC))
        base_GC = ordered.mean(0)
        spread.append((ordered - base_GC).square().sum().item() / len(rows_EGC))
        if len(spread) > 1 and torch.equal(order_EG, before):
            break
    return order_EG, tuple(spread)


def _assigned(base_GC: Tensor, rows_GC: Tensor, before_G: Tensor) -> Tensor:
    """For each unit of the base a unit of the expert, so that their products, summed, are large: [G]."""
    similarity_GG = base_GC @ rows_GC.t()  # norms are the same in every order, so this decides the distances
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        found_G = balanced_assignment(similarity_GG)
    else:
        found_G = torch.from_numpy(linear_sum_assignment(similarity_GG.cpu().numpy(), maximize=True)[1])
    found_G = found_G.to(before_G.device)

    def total(order_G: Tensor) -> Tensor:
        return similarity_GG.gather(1, order_G.unsqueeze(1)).sum()

    return found_G if total(found_G) > total(before_G) else before_G
