"""Router: which experts a token goes to, and how much each counts; what all routers share.

T tokens, D d_model, E experts, K selected experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.checks import (
    check_device,
    check_dtype,
    check_finite,
    check_flag,
    check_floating,
    check_mask,
    check_places,
    check_positive,
    check_rate,
    shape_error,
)
from sparse_ffn.module import lost_in_copies, normal_
from sparse_ffn.ops.autocast import without_autocast
from sparse_ffn.ops.library import in_backward, under_transforms
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.options import CheckedOptions
from sparse_ffn.routing.statistics import slot_counts
from sparse_ffn.routing.targets import Targets


class Routing(NamedTuple):
    """What a router decides, in fp32 (fp64 for an fp64 router)."""

    logits_TE: Tensor
    """W3 x, before noise, dropout and bias."""
    index_TK: Tensor
    """Selected experts, best first; int64. A slot without one (too few survived expert dropout) has the index E."""
    gate_TK: Tensor
    """Their weights in the output; exactly 0 for a slot without an expert."""


class FusedRouting(NamedTuple):
    """What is known of a ``Routing`` when routing and experts were one op, which keeps no logits."""

    softmax_BE: Tensor
    """Sums of softmax(logits) over the real tokens of each group."""
    index_TK: Tensor
    """As in ``Routing``."""
    gate_TK: Tensor
    """As in ``Routing``."""


AnyRouting = Routing | FusedRouting


class RouterOptions(TypedDict, total=False):
    """``Router``'s keyword arguments."""

    expert_dropout: float
    selection_bias: bool
    init_scale: float
    device: Any
    dtype: torch.dtype | None


class Router(CheckedOptions, nn.Module):
    """Scores every expert with a linear map, takes the k best, and weighs them; subclasses say how.

    Logits, ranking and gates are computed in fp32 at least, under any autocast. Ranking is on logits: gates saturate
    and would make false ties. Ties go to the lower expert index.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        k: experts selected for a token, 1 <= k <= n_experts.
        expert_dropout: chance in training that a token cannot use an expert (one draw per token and expert, before the
            selection, no rescaling: arXiv 2310.10837, Eq. 22). Where fewer than k are left, the last slots are void.
        selection_bias: keep a buffer ``bias`` [E] that is added to the logits for ranking only; see
            ``sparse_ffn.update_router_bias``.
        init_scale: c of the initialisation: rows of ``weight`` of equal norm, standard deviation c/sqrt(d_model).

    Raises:
        ValueError: a size, rate or scale outside its range.
        TypeError: an argument of a wrong type, or that the router does not have; a dtype that layers do not have.
    """

    voids_zeros = False
    """Whether a slot whose gate is 0 has no expert: nothing is computed for it, and no load is counted."""
    _is_replica = False
    """Set by ``nn.DataParallel`` on its copies."""
    bias: Tensor | None
    load: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int,
        *,
        expert_dropout: float = 0.0,
        selection_bias: bool = False,
        init_scale: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.n_experts = check_positive("d_model", d_model), check_positive("n_experts", n_experts)
        self.k = k
        self.expert_dropout = expert_dropout
        self.init_scale = check_finite("init_scale", init_scale)
        selection_bias = check_flag("selection_bias", selection_bias)
        check_device(device)
        check_dtype(dtype)
        self.weight = nn.Parameter(torch.empty(self.n_experts, self.d_model, device=device, dtype=dtype))
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = torch.empty(self.n_experts, device=device, dtype=wide) if selection_bias else None
        self.register_buffer("bias", bias)
        self.add_parameters()
        # slots counted since the last bias update, in one tensor, to which the replays of a CUDA graph add as well; no
        # buffer, since DDP would overwrite it with the first process's
        self.load = torch.zeros(self.load_shape, dtype=torch.int64, device=self.weight.device)
        self.reset_parameters()

    @property
    def k(self) -> int:
        """Experts selected for a token. May be set at any time to any number that the constructor takes."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        self._k = self._checked_k(k)

    def _checked_k(self, k: int) -> int:
        return check_positive("k", k, at_most=self.n_experts, limit="n_experts")

    @property
    def expert_dropout(self) -> float:
        """Chance in training that a token cannot use an expert; may be set."""
        return self._expert_dropout

    @expert_dropout.setter
    def expert_dropout(self, expert_dropout: float) -> None:
        self._expert_dropout = check_rate("expert_dropout", expert_dropout)

    def add_parameters(self) -> None:
        """Make what a router has beyond ``weight`` and ``bias``. ``_tensors`` lists it, ``reset_parameters`` sets."""

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        """The router's tensors by name, each with the shape that it was made with: a row for each expert."""
        return {"weight": (self.weight, (self.n_experts, self.d_model)), "bias": (self.bias, (self.n_experts,))}

    def reset_parameters(self) -> None:
        """Initialise: normal directions, every row of norm c, which is a standard deviation of c/sqrt(d_model)."""
        with torch.no_grad():
            normal_(self.weight, 1.0)
            # rows of one norm: no expert starts ahead (arXiv 2310.10837, section 5)
            norm = self.weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.weight.dtype).tiny)
            self.weight.div_(norm).mul_(self.init_scale)
            if self.bias is not None:
                self.bias.zero_()
            self.load.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As Module's, but buffers stay fp32 (fp64 for an fp64 router): steps of 1e-3 vanish in bf16."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != wide:
                self._buffers[name] = old.to(new.device, wide)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the loads that were counted: copies and pickles start clean."""
        return {name: value for name, value in super().__getstate__().items() if name != "load"}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        device = next(self.parameters()).device
        self.load = torch.zeros(self.load_shape, dtype=torch.int64, device=device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As Module's; the buffers that a state in 16 bits assigns become wide, too."""
        super()._load_from_state_dict(*args, **kwargs)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self._buffers.update({name: old.to(wide) for name, old in self._buffers.items() if old is not None})

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            x_TD: [T, d_model].
            mask_T: bool [T], True for real tokens. Padding is routed too, but has no part in what is computed over the
                batch (Sinkhorn, the loads of bias balancing).

        Raises:
            TypeError: x is no dense floating tensor, or the mask no dense tensor of bool.
            ValueError: a wrong shape or device.
        """
        check_floating("x", x_TD)
        if x_TD.dim() != 2 or x_TD.shape[1] != self.d_model:
            raise ValueError(f"x must be [tokens, d_model = {self.d_model}], got {list(x_TD.shape)}")
        if mask_T is not None:
            check_mask(mask_T, x_TD)
        tensors = self._tensors()
        check_places(x_TD, {f"router.{name}": tensor for name, (tensor, _) in tensors.items()})
        n_experts = self.weight.shape[:1]
        if any(tensor is not None and tensor.shape != (*n_experts, *shape[1:]) for tensor, shape in tensors.values()):
            raise shape_error({f"router.{name}": tensor for name, tensor in tensors.items()})
        with without_autocast(x_TD):
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            x_TD = x_TD.to(wide)
            logits_TE = F.linear(x_TD, self.weight.to(wide))
            seen_TE = self.perturb(logits_TE, x_TD)
            score_TE = self.rank(seen_TE.detach(), mask_T)
            if self.bias is not None:
                score_TE = score_TE + self.bias
            score_TE = self.limit(score_TE)
            alive_TE: Tensor | None = None
            if self.training and self.expert_dropout > 0:
                reached_TE = score_TE != -torch.inf  # among dropped experts these would tie with those out of reach
                alive_TE = (torch.rand_like(logits_TE) >= self.expert_dropout) & reached_TE
                score_TE = score_TE.masked_fill(~alive_TE, -torch.inf)
            index_TK = self.select(score_TE)
            alive_TK = None if alive_TE is None else alive_TE.gather(1, index_TK)
            gate_TK = self.gate(seen_TE, index_TK, alive_TK)
            if alive_TK is not None:
                gate_TK, index_TK = gate_TK * alive_TK, index_TK.masked_fill(~alive_TK, n_experts[0])
            if self.voids_zeros:
                index_TK = index_TK.masked_fill(gate_TK == 0, n_experts[0])
            if self.bias is not None and self.training:
                self.count(index_TK, mask_T)
        return Routing(logits_TE, index_TK, gate_TK)

    def perturb(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        """The logits that ranking and gates see."""
        return logits_TE

    def rank(self, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        """The scores whose k largest are selected."""
        return logits_TE

    def limit(self, score_TE: Tensor) -> Tensor:
        """The scores with the selection bias, -inf for experts that the token cannot reach."""
        return score_TE

    def select(self, score_TE: Tensor) -> Tensor:
        """The experts of the k largest scores, best first."""
        return stable_topk(score_TE, self.k)

    def gate(self, logits_TE: Tensor, index_TK: Tensor, alive_TK: Tensor | None) -> Tensor:
        """The weights of the selected experts; ``alive_TK`` is False where expert dropout struck (None: nowhere)."""
        raise NotImplementedError(f"{type(self).__name__} must define gate(logits_TE, index_TK, alive_TK)")

    def count(self, index_TK: Tensor, mask_T: Tensor | None) -> None:
        """Add the real tokens' slots to the loads of bias balancing."""
        self.add_load(slot_counts(index_TK, mask_T, self.n_experts), "bias")

    def add_load(self, load: Tensor, balance: str) -> None:
        """Add to what ``adapt`` gets, once where checkpointing computes it twice; ``balance`` is for the error."""
        if in_backward():
            return
        if self._is_replica:
            raise lost_in_copies(balance)
        if under_transforms():
            raise RuntimeError(
                f"balance=\"{balance}\" counts the experts' loads as a side effect, which is lost inside torch.func's "
                "transforms: take another balance there, or evaluate"
            )
        if load.is_meta:  # there is nothing to count
            return
        if self.load.device != load.device:  # the router was moved
            with torch.inference_mode(False):  # made in inference it could not be added to in training
                moved = torch.zeros(self.load_shape, dtype=load.dtype, device=load.device)
            self.load = moved if self.load.is_meta else moved.copy_(self.load)
        self.load.add_(load)

    @property
    def adapted(self) -> Tensor | None:
        """The buffer that ``adapt`` changes, if there is one."""
        return self.bias

    @property
    def load_shape(self) -> tuple[int, ...]:
        """Of ``load``."""
        return (self.n_experts,)

    def adapt(self, load: Tensor, rate: float, targets: Targets | None) -> None:
        """What ``sparse_ffn.update_router_bias`` does with this router, by the load since it was last called."""
        assert self.bias is not None
        if targets is None:  # in integers: a mean would be rounded
            self.bias.add_(torch.sign(load.sum() - len(load) * load), alpha=rate)
            return
        load = load.to(self.bias.dtype)
        wished = load.mean() * targets.times_experts(load)
        missing = wished - load
        rounding = 4 * torch.finfo(load.dtype).eps * wished  # of the shares, in which equal loads differ
        targets.own(self.bias).add_(targets.own(torch.sign(missing) * (missing.abs() > rounding)), alpha=rate)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults."""
        text = f"{self.d_model}, n_experts={self.n_experts}, k={self.k}"
        if self.expert_dropout:
            text += f", expert_dropout={self.expert_dropout}"
        return text + (", selection_bias=True" if self.bias is not None else "")
