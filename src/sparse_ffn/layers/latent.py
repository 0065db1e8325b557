"""LatentMoE: a mixture of experts between two projections, so that the experts are narrower than the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_ffn.checks import check_flag, check_floating, check_mask, check_places, check_positive, shape_error
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.projection import Projection
from sparse_ffn.layers.routed import InnerOptions, Routed, RouterChoice
from sparse_ffn.layers.rows.base import n_numbers
from sparse_ffn.module import is_brought, unwrapped
from sparse_ffn.options import CheckedOptions, OptionOf, Unpack


class LatentOptions(InnerOptions, RouterChoice, total=False):
    """``MoE``'s keyword arguments that a mixture between two projections has, too."""


class LatentMoE(CheckedOptions, nn.Module):
    """y = up · MoE(down · x), the router seeing x (LatentMoE, arXiv 2601.18089; Nemotron 3).

    Experts read and write vectors of width d_latent, so that each costs d_latent/d_model of what it would: for the same
    cost there can be that many more of them, in all and for a token. Parameters: ``down.weight`` [d_latent,
    d_model], ``moe``, a ``MoE`` of width d_latent with ``d_router = d_model``, and ``up.weight`` [d_out, d_latent].

    Args:
        d_model: input width.
        d_latent: width of the experts.
        n_experts: as ``MoE``'s.
        expert_size: as ``MoE``'s.
        k: as ``MoE``'s.
        d_out: output width; None for d_model.
        projection_bias: add ``down.bias`` and ``up.bias``.
        options: ``MoE``'s other arguments, but ``d_router``: the router sees x. ``init_scale`` and ``n_layers`` are for
            the mixture alone: both projections have standard deviation 1/sqrt(input width), so that the output's scale
            is a ``MoE``'s.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of a wrong type, or that the layer does not have.
    """

    d_model: int
    d_out: int
    activation, dropout, expert_dropout, balance, balance_weight, balance_over, aux, sync_balance = (
        OptionOf(lambda layer: [layer._own_moe()]) for _ in range(8)
    )

    def __init__(
        self,
        d_model: int,
        d_latent: int,
        n_experts: int,
        expert_size: int,
        k: int,
        *,
        d_out: int | None = None,
        projection_bias: bool = False,
        **options: Unpack[LatentOptions],
    ) -> None:
        super().__init__()
        self.d_model, self.d_latent = check_positive("d_model", d_model), check_positive("d_latent", d_latent)
        self.d_out = self.d_model if d_out is None else check_positive("d_out", d_out)
        biased = check_flag("projection_bias", projection_bias)
        self.moe = MoE(self.d_latent, n_experts, expert_size, k, d_router=self.d_model, **options)
        own: dict[str, Any] = {"device": self.moe.values.device, "dtype": self.moe.values.dtype}
        self.down = Projection(self.d_model, self.d_latent, bias=biased, **own)
        self.up = Projection(self.d_latent, self.d_out, bias=biased, **own)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, router_input: Tensor | None = None) -> Tensor:
        """As ``SparseFFN``'s; ``router_input`` [..., d_model] is what the router sees instead of x."""
        try:
            self._check_call(x, mask)
            seen = self._selector_input(x, router_input)
            narrow = self.down(x)
        except Exception:
            self._own_moe()._tell_failure()
            raise
        y: Tensor = self.up(self.moe(narrow, mask=mask, router_input=seen))
        return y

    def _own_moe(self) -> Routed:
        # compress_experts_ puts another kind than MoE in its place
        return unwrapped("moe", self.moe, Routed)

    def _check_call(self, x: Tensor, mask: Tensor | None) -> None:
        """Raise if this is no input of the layer: before the projections are computed."""
        check_floating("x", x)
        moe = self._own_moe()
        if not is_brought(moe, moe._typical):
            moe._check_input("x", x)
        if not x.dim() or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape [..., d_model = {self.d_model}], got {list(x.shape)}")
        if mask is not None:
            check_mask(mask, x)
        for name, d_in, d_out in (("down", self.d_model, self.d_latent), ("up", self.d_latent, self.d_out)):
            projection = getattr(self, name)
            if type(projection) is not Projection:  # others may store their weight packed
                continue
            weight, bias = projection.weight, projection.bias
            if not weight.is_meta:
                check_places(x, {f"{name}.weight": weight, f"{name}.bias": bias})
            if weight.shape != (d_out, d_in) or (bias is not None and bias.shape != (d_out,)):
                raise shape_error({f"{name}.weight": (weight, (d_out, d_in)), f"{name}.bias": (bias, (d_out,))})

    def _selector_input(self, x: Tensor, router_input: Tensor | None) -> Tensor:
        moe, seen = self._own_moe(), x if router_input is None else router_input
        return seen if is_brought(moe, moe._typical) else moe._selector_input(x, seen)

    @property
    def k(self) -> int:
        """Experts selected for a token; may be set at any time."""
        return self._own_moe().k

    @k.setter
    def k(self, k: int) -> None:
        self._own_moe().k = k

    @property
    def d_ff(self) -> int:
        """Hidden units in all."""
        return self._own_moe().d_ff

    def reset_parameters(self) -> None:
        """Initialise all parameters and buffers anew: projections are normal with std 1/sqrt(their input width)."""
        self._own_moe().reset_parameters()
        for name in ("down", "up"):
            unwrapped(name, getattr(self, name), nn.Linear).reset_parameters()

    @property
    def active_fraction(self) -> float:
        """Share of the hidden units that a token uses."""
        return self._own_moe().active_fraction

    def flops_per_token(self) -> int:
        """The mixture's, whose router sees d_model numbers, and the projections'."""
        return self._own_moe().flops_per_token() + 2 * self.d_latent * (self.d_model + self.d_out)

    @property
    def n_parameters(self) -> int:
        """Number of parameters; quantised and other stored experts count as the parameters that they stand for."""
        return n_numbers(self)

    def extra_repr(self) -> str:
        """The widths."""
        d_out = "" if self.d_out == self.d_model else f", d_out={self.d_out}"
        return f"{self.d_model}, d_latent={self.d_latent}{d_out}"
