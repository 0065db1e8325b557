"""Losses that keep the experts balanced, each over all real tokens of a batch or of each sequence.

| name    | loss                                      | at perfect balance | all on one expert | source               |
|---------|-------------------------------------------|--------------------|-------------------|----------------------|
| entropy | sum_e p_e log p_e, p the mean softmax     | -log E             | 0                 | 2310.10837, Eq. 20-21|
| switch  | E · sum_e f_e p_e, f slots of e per token | k                  | E                 | 2310.10837, Eq. 15-17|
| cv2     | variance / mean² of the summed gates      | 0                  | E - 1 (k = 1)     | 2310.10837, Eq. 14   |
| z       | mean of logsumexp(logits)², in [0, inf)   | -                  | -                 | 2202.08906           |
| l1      | E/k · sum_e f_e r_e, r the mean relu      | -                  | -                 | 2412.14711, Eq. 8    |

z keeps the logits small and balances nothing by itself. l1 is for ReLU gates, f are tokens of e per token, and its
weight adapts (``routing.ReLURouter``). Null experts (MoE++, 2410.07348) may have another target, and experts of unequal
size. With t_e the share of the slots that is wished on expert e, entropy is then sum_e p_e log(p_e / (E t_e)), switch
is sum_e f_e p_e / t_e, and cv2 is of the summed gates over t_e, of the experts that are not null; with t_e = 1/E these
are the formulas above.

T tokens, E experts (null experts among them), K selected experts, B groups of tokens (1, or the number of sequences).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_ffn.checks import check_choice, check_count, check_finite, check_mask, check_type, shown
from sparse_ffn.ops.autocast import without_autocast
from sparse_ffn.ops.library import under_transforms
from sparse_ffn.ops.negative_entropy.op import negative_entropy, negative_entropy_available
from sparse_ffn.routing.base import AnyRouting, FusedRouting, Routing
from sparse_ffn.routing.distributed import Sync, all_reduce_sum, check_sync
from sparse_ffn.routing.targets import Targets

Weight = float | Tensor
Terms = tuple[tuple[str, Weight], ...]


class Pool:
    """Sums over the real tokens of each group, and over processes if asked.

    Sequences are groups of one process each, so that only the mean over them is pooled; of all others the sums are.
    """

    count_B1: Tensor | int
    """Real tokens of each group: a tensor only where it is not simply the group's length."""

    def __init__(
        self,
        mask_T: Tensor | None,
        n_groups: int,
        per_sequence: bool,
        sync: Sync,
        routing: AnyRouting,
        targets: Targets | None,
    ) -> None:
        self.mask_T, self.sync, self.targets = mask_T, sync, targets
        self.n_experts = routing[0].shape[1]
        self.n_groups, self.per_sequence = n_groups, per_sequence
        self.length = routing.gate_TK.shape[0] // self.n_groups if self.n_groups else 0
        if mask_T is None and sync is False and _some(self.length):
            self.count_B1 = self.length
        else:
            self.count_B1 = self.sum(torch.ones_like(routing.gate_TK[:, :1]))

    def sum(self, x_TN: Tensor) -> Tensor:
        """Sums [B, N] over the group's real tokens."""
        if self.mask_T is not None:
            x_TN = torch.where(self.mask_T.unsqueeze(1), x_TN, 0)
        return self._over_processes(x_TN.reshape(self.n_groups, self.length, x_TN.shape[1]).sum(1))

    def _over_processes(self, sums_BN: Tensor) -> Tensor:
        return all_reduce_sum(sums_BN, self.sync) if self.sync is not False and not self.per_sequence else sums_BN

    def mean(self, x_TN: Tensor) -> Tensor:
        """Means [B, N]; 0 for a group without a real token."""
        return self._over_count(self.sum(x_TN))

    def mean_softmax(self, routing: AnyRouting) -> Tensor:
        """Means [B, E] of the softmax over the logits of all experts, whatever the gate."""
        if isinstance(routing, FusedRouting):
            return self._over_count(self._over_processes(routing.softmax_BE))
        return self.mean(torch.softmax(routing.logits_TE, dim=1))

    def _over_count(self, sums_BN: Tensor) -> Tensor:
        return sums_BN / (self.count_B1 if not isinstance(self.count_B1, Tensor) else self.count_B1.clamp_min(1))

    def over_groups(self, loss_B: Tensor) -> Tensor:
        """Mean of the losses of the groups that hold real tokens; 0 if none does."""
        if not isinstance(self.count_B1, Tensor):
            return loss_B.mean()
        real_B = self.count_B1.squeeze(1) > 0
        total = torch.stack([torch.where(real_B, loss_B, 0).sum(), real_B.sum().to(loss_B.dtype)])
        if self.sync is not False and self.per_sequence:
            total = all_reduce_sum(total, self.sync)
        return total[0] / total[1].clamp_min(1)


def _some(n: int) -> bool:
    """Whether n > 0. What a compiler cannot know, as how many tokens a mask leaves, may be none."""
    if not torch.compiler.is_compiling():
        return n > 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # here: it imports sympy

    return guard_or_false(n > 0)


def entropy(routing: AnyRouting, pool: Pool, weight: Weight) -> Tensor:
    """Negative entropy of the mean softmax, or with targets its divergence from them, less log E."""
    # torch.compile fuses the plain formula, and checkpoints cannot keep what an autograd.Function returns
    own = not under_transforms() and not torch.compiler.is_dynamo_compiling()
    count, plain = pool.count_B1, pool.targets is None and own
    if isinstance(routing, FusedRouting) and plain and not isinstance(count, Tensor):
        sums_BE = routing.softmax_BE
        if not isinstance(weight, Tensor) and negative_entropy_available(sums_BE):
            return negative_entropy(sums_BE, count, weight)
        found: Tensor = _MeanNegativeEntropy.apply(sums_BE, count, weight)  # type: ignore[no-untyped-call]
        return found
    p_BE = pool.mean_softmax(routing)
    # clamped: at p = 0 the logarithm's infinite slope would meet the softmax's zero one
    log_BE = p_BE.clamp_min(torch.finfo(p_BE.dtype).tiny).log()
    if pool.targets is not None:
        log_BE = log_BE - pool.targets.times_experts(p_BE).log()
    return weight * pool.over_groups((p_BE * log_BE).sum(1))


class _MeanNegativeEntropy(torch.autograd.Function):
    """The weighted mean over the groups of sum_e p_e log p_e, p = sums / count: one node instead of eight."""

    @staticmethod
    def forward(ctx: Any, sums_BE: Tensor, count: int, weight: Weight) -> Tensor:
        p_BE = sums_BE / count
        ctx.save_for_backward(p_BE)
        ctx.factor = weight / (count * sums_BE.shape[0])
        loss: Tensor = torch.special.entr(p_BE).sum() * (-weight / sums_BE.shape[0])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (p_BE,) = ctx.saved_tensors
        log_BE, scale = p_BE.clamp_min(torch.finfo(p_BE.dtype).tiny).log_(), grad * ctx.factor
        return torch.addcmul(scale, log_BE, scale), None, None


def switch(routing: AnyRouting, pool: Pool, weight: Weight) -> Tensor:
    """Eq. 17, literally for any k: f sums to k. The gradient flows through p only."""
    p_BE = pool.mean_softmax(routing)
    f_BE = pool.mean(_by_expert(routing, torch.ones_like(routing.gate_TK), pool.n_experts))
    if pool.targets is not None:
        f_BE = f_BE / pool.targets.times_experts(f_BE)
    return weight * pool.over_groups(pool.n_experts * (f_BE * p_BE).sum(1))


def cv2(routing: AnyRouting, pool: Pool, weight: Weight) -> Tensor:
    """Squared coefficient of variation of the experts' importance, the gates being normalised per token.

    Null experts take their part of a token's gates, and no part in the variation.
    """
    total_T1 = routing.gate_TK.sum(1, keepdim=True)
    share_TK = routing.gate_TK / torch.where(total_T1 > 0, total_T1, 1)  # all gates 0: no share, no infinite slope
    importance_BE = pool.sum(_by_expert(routing, share_TK, pool.n_experts))
    if pool.targets is not None:
        importance_BE = pool.targets.own(importance_BE / pool.targets.times_experts(importance_BE))
    mean_B1 = importance_BE.mean(1, keepdim=True)
    variance_B = (importance_BE - mean_B1).square().mean(1)
    mean_B = mean_B1.squeeze(1)
    return weight * pool.over_groups(variance_B / torch.where(mean_B > 0, mean_B, 1).square())


def z(routing: AnyRouting, pool: Pool, weight: Weight) -> Tensor:
    """Mean squared logsumexp of the logits."""
    assert isinstance(routing, Routing), "z is in NEED_LOGITS"
    squared_B1 = pool.mean(torch.logsumexp(routing.logits_TE, dim=1, keepdim=True).square())
    return weight * pool.over_groups(squared_B1.squeeze(1))


def l1(routing: AnyRouting, pool: Pool, weight: Weight) -> Tensor:
    """Mean L1 norm of the gates relu(logit), those of an expert weighted by how many tokens it has (ReMoE, Eq. 8)."""
    assert isinstance(routing, Routing), "l1 is in NEED_LOGITS"
    gate_TE = torch.relu(routing.logits_TE)
    f_BE = pool.mean((routing.logits_TE > 0).to(gate_TE.dtype)) * (pool.n_experts / routing.index_TK.shape[1])
    return weight * pool.over_groups((f_BE * pool.mean(gate_TE)).sum(1))


NEED_LOGITS = ("z", "l1")
"""Losses that need the logits, not only their softmax sums and the gates."""
LOSSES: dict[str, Callable[[AnyRouting, Pool, Weight], Tensor]] = {
    "entropy": entropy,
    "switch": switch,
    "cv2": cv2,
    "z": z,
    "l1": l1,
}
NAMES = (*LOSSES, "bias", "none")


def check_balance(
    names: str | Sequence[str], weights: float | Sequence[float]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """A layer's arguments ``balance`` and ``balance_weight`` as tuples of one length."""
    if isinstance(names, str):
        names, weights = (names,), (weights,)  # type: ignore[assignment]
    if not isinstance(names, Sequence) or not names:
        raise ValueError(
            f"balance must be one of {', '.join(map(repr, NAMES))} or a tuple of these, got {shown(names)}"
        )
    for name in names:
        check_choice("balance", name, NAMES)
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(names) != len(weights):
        raise ValueError(
            f"balance_weight must hold one weight for each of balance = {tuple(names)}, got {shown(weights)}"
        )
    if len(set(names)) != len(names) or ("none" in names and len(names) > 1):
        raise ValueError(f"balance must name each loss once, and 'none' only by itself, got {tuple(names)}")
    return tuple(names), tuple(check_finite("balance_weight", weight) for weight in weights)


def balance_loss(
    routing: AnyRouting,
    terms: Terms,
    *,
    mask_T: Tensor | None = None,
    n_sequences: int | None = None,
    sync: Sync = False,
) -> Tensor:
    """Weighted sum of balance losses, a scalar.

    Args:
        routing: the router's decisions.
        terms: (name, weight) pairs, names from ``LOSSES``.
        mask_T: bool [T], True for real tokens.
        n_sequences: balance each of so many equally long sequences by itself and average; None pools all tokens.
        sync: pool over a process group, True for the default one, with the gradient that averaging gradients over its
            processes needs.

    Raises:
        TypeError: ``routing`` is none, ``terms`` holds no pairs, or an argument is of a wrong type.
        ValueError: no term, an unknown name, a weight that is negative or not finite, or ``n_sequences`` that does not
            divide the tokens.
    """
    check_type("routing", routing, (Routing, FusedRouting), "a sparse_ffn.routing.Routing")
    if mask_T is not None:
        check_mask(mask_T, routing.gate_TK)
    _check_sequences(n_sequences, routing.gate_TK.shape[0])
    return weighted_losses(routing, _checked(terms), mask_T, *groups(n_sequences), check_sync("sync", sync))


def groups(n_sequences: int | None) -> tuple[int, bool]:
    """How many groups of tokens are balanced each by itself, and whether they are sequences; None: all together."""
    return (1, False) if n_sequences is None else (n_sequences, True)


def weighted_losses(
    routing: AnyRouting,
    terms: Terms,
    mask_T: Tensor | None,
    n_groups: int,
    per_sequence: bool,
    sync: Sync,
    targets: Targets | None = None,
) -> Tensor:
    """``balance_loss`` of arguments that are right, with other targets than equal shares if there are some.

    The groups are of equal length, one after the other; those of a layer need not be sequences (``Pool``).
    """
    with without_autocast(routing.gate_TK):
        pool = Pool(mask_T, n_groups, per_sequence, sync, routing, targets)
        losses = [LOSSES[name](routing, pool, weight) for name, weight in terms]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _checked(terms: Any) -> Terms:
    pairs = isinstance(terms, (tuple, list)) and all(isinstance(t, (tuple, list)) and len(t) == 2 for t in terms)
    if not pairs or not terms:
        error = ValueError if pairs else TypeError
        raise error(f"terms must hold a (name, weight) pair or more, got {shown(terms)}; names are {', '.join(LOSSES)}")
    for name, _ in terms:
        check_choice("the name in terms", name, LOSSES)
    return tuple((name, check_finite("the weight in terms", weight)) for name, weight in terms)


def _check_sequences(n_sequences: int | None, tokens: int) -> None:
    if n_sequences is None or torch.compiler.is_compiling():  # sizes may be symbols
        return
    check_count("n_sequences", n_sequences)
    if tokens % n_sequences if n_sequences else tokens:
        raise ValueError(f"n_sequences = {n_sequences} must divide the number of tokens, {tokens}")


def _by_expert(routing: AnyRouting, x_TK: Tensor, n_experts: int) -> Tensor:
    """Numbers of the slots at the slots' experts: [T, E]."""
    every_TE = x_TK.new_zeros(x_TK.shape[0], n_experts + 1)  # the last for slots without an expert
    return every_TE.scatter_add(1, routing.index_TK, x_TK)[:, :-1]
