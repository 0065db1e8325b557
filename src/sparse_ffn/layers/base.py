"""SparseFFN: what all layers share: the call, its checks, initialisation, sizes."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.checks import (
    check_choice,
    check_device,
    check_dtype,
    check_finite,
    check_flag,
    check_floating,
    check_mask,
    check_parameters,
    check_positive,
    check_rate,
    is_dtensor,
    shape_error,
)
from sparse_ffn.layers.rows.base import n_numbers
from sparse_ffn.module import Parametrizable, WithProperties, normal_
from sparse_ffn.ops.activations import ACTIVATIONS
from sparse_ffn.ops.autocast import autocast_enabled
from sparse_ffn.options import CheckedOptions


class OthersFailed(RuntimeError):
    """Another process has told that it raises, and all hear that who wait for its tokens: nobody has to be told."""


class SparseFFN(CheckedOptions, Parametrizable, WithProperties):
    """Base of all layers: a feed-forward block x [..., d_model] -> [..., d_out], a sum over hidden units.

    Unit i reads the input with its key and adds its value to the output: y = sum_i act(keys_i · x) values_i. In the
    words of gated FFNs ``keys`` is up_proj.weight, ``values`` down_proj.weight transposed, and ``gate_keys``
    gate_proj.weight: one row for each unit in all three. The layers differ in how they choose the units to compute.

    Args:
        d_model: input width.
        d_out: output width; None for d_model.
        activation: name of the hidden activation, one of ``relu gelu gelu_tanh silu identity square squared_relu``.
        dropout: rate of dropout on hidden units (never on the output), in [0, 1].
        init_scale: c in the initialisation's standard deviations. 1 suits a post-LN transformer.
        n_layers: L, number of layers of a pre-LN transformer; sets c = sqrt(2/L) (arXiv 2310.10837, section 5).
        bias: add a learned ``out_bias`` [d_out].
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ValueError: an argument outside its range; ``init_scale`` and ``n_layers`` both given.
        TypeError: an argument of a wrong type, or that the layer does not have; a dtype other than float32, float64,
            bfloat16 and float16.
    """

    d_ff: int
    """Hidden units in all."""
    values: nn.Parameter
    """One row per hidden unit."""
    _any_kind: tuple[str, ...] = ()
    """Parameters that only torch computes with: they may be a quantiser's tensors."""
    _split: Any = None
    """How this process computes its part of the layer, made by a style of ``sparse_ffn.parallel``; None: all of it."""

    def __init__(
        self,
        d_model: int,
        *,
        d_out: int | None,
        activation: str,
        dropout: float,
        init_scale: float,
        n_layers: int | None,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        extra_activations: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.d_model = check_positive("d_model", d_model)
        self.d_out = self.d_model if d_out is None else check_positive("d_out", d_out)
        self._activations = (*ACTIVATIONS, *extra_activations)
        self.activation, self.dropout = activation, dropout
        self.init_scale = initial_scale(init_scale, n_layers)
        check_device(device)
        check_dtype(dtype)
        self._factory = {"device": device, "dtype": dtype}
        self.out_bias = self._parameter(self.d_out) if check_flag("bias", bias) else None

    @property
    def activation(self) -> str:
        """The hidden activation's name; may be set to another."""
        return self._activation

    @activation.setter
    def activation(self, activation: str) -> None:
        check_choice("activation", activation, self._activations)
        self._activation = activation

    @property
    def dropout(self) -> float:
        """The rate of dropout on hidden units; may be set."""
        return self._dropout

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        self._dropout = check_rate("dropout", dropout, inclusive=True)

    @property
    def k(self) -> int:
        """Selected experts, units or values per token (and head); may be set at any time where it selects."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, mask: Tensor | None = None, router_input: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., d_model], of the parameters' dtype (under autocast any but float64).
            mask: bool [...], True for real tokens, the opposite of torch's ``key_padding_mask``. Padding takes no part
                in balance and statistics; its outputs are computed as usual. Layers without a router only check it.
            router_input: what the router sees instead of x, [..., d_router], of the parameters' dtype or fp32; MoE
                layers only.

        Returns:
            [..., d_out]; its dtype follows nn.Linear.

        Raises:
            TypeError: x is no dense floating tensor or is a DTensor, or its dtype is not the parameters' (outside
                autocast), or mask is no dense tensor of bool.
            ValueError: a wrong shape or device, or ``router_input`` for a layer without a router.
        """
        try:
            self._check_call(x, mask)
            y = self._forward(x, mask, self._selector_input(x, router_input))
        except Exception:
            self._tell_failure()
            raise
        if self._split is not None:
            self._split.met = False
        if self.out_bias is not None:
            bias = self.out_bias if self._split is None else self._split.whole(self.out_bias)
            y = y + bias.to(y.dtype)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.d_out)

    def _tell_failure(self) -> None:
        """Tell the processes that wait for this one's tokens, if there are any, that it raises."""
        if self._split is not None:
            with suppress(Exception):  # the error that is to be raised says more than that the others are gone
                self._split.fail()

    def _forward(self, x: Tensor, mask: Tensor | None, router_input: Tensor) -> Tensor:
        """The layer without its output bias: [..., d_model] -> [tokens, d_out]."""
        raise NotImplementedError

    def _selector_input(self, x: Tensor, router_input: Tensor | None) -> Tensor:
        if router_input is not None:
            raise ValueError(f"router_input is for MoE layers; {type(self).__name__} has no router")
        return x

    def _check_call(self, x: Tensor, mask: Tensor | None) -> None:
        self._check_input("x", x)
        if not x.dim() or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape [..., d_model = {self.d_model}], got {list(x.shape)}")
        check_parameters(x, self._parameters, self._any_kind, self._split is not None)
        if self.out_bias is not None and self.out_bias.shape != (self.d_out,):
            raise self._shape_error()
        if mask is not None:
            check_mask(mask, x)

    def _check_input(self, name: str, x: Tensor, *also: torch.dtype) -> None:
        own = self._typical
        if type(x) is Tensor and x.dtype == own.dtype and x.device == own.device and x.layout is torch.strided:
            return
        check_input(name, x, own, *also)

    @property
    def _typical(self) -> Tensor:
        """A parameter whose dtype and device are the layer's."""
        return self.values

    def _shape_error(self) -> ValueError:
        return shape_error({**self._tensors(), "out_bias": (self.out_bias, (self.d_out,))})

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        """The tensors of the layer by name, each with the shape that it was made with."""
        raise NotImplementedError

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*shape, **self._factory))

    def _normal(self, parameter: Tensor, fan: int) -> None:
        normal_(parameter, self.init_scale / math.sqrt(fan))

    def _dropout_mask(self, x: Tensor, *shape: int) -> Tensor | None:
        """Dropout's multiplier for hidden units, in x's dtype; None when there is nothing to drop."""
        if not self.training or not self.dropout:
            return None
        mask = F.dropout(torch.ones(shape, device=x.device, dtype=x.dtype), self.dropout)
        return mask if self._split is None else self._split.of_units(mask)

    def reset_parameters(self) -> None:
        """Initialise all parameters and buffers of this layer anew."""
        raise NotImplementedError

    @property
    def active_fraction(self) -> float:
        """Share of the hidden units that a token uses."""
        raise NotImplementedError

    def flops_per_token(self) -> int:
        """Forward FLOPs for a token: 2 a multiply-add, router and sub-key scores included, biases not."""
        raise NotImplementedError

    @property
    def n_parameters(self) -> int:
        """Number of parameters; quantised and other stored experts count as the parameters that they stand for."""
        return n_numbers(self)

    def _repr_options(self, *sizes: str, **options: tuple[Any, Any]) -> str:
        """Sizes, then each option (value, default) that differs from its default."""
        shared = {
            "d_out": (self.d_out, self.d_model),
            "dropout": (self.dropout, 0.0),
            "init_scale": (self.init_scale, 1.0),
        }
        changed = [f"{n}={v!r}" for n, (v, default) in {**options, **shared}.items() if v != default]
        return ", ".join([str(self.d_model), *sizes, *changed])


def check_input(name: str, x: Tensor, own: Tensor, *also: torch.dtype) -> None:
    """Raise unless x is of a layer's kind: on the device of its parameter ``own``, of its dtype or another allowed."""
    check_floating(name, x)
    if is_dtensor(x):
        raise TypeError(
            f"{name} is a DTensor, of shape {list(x.shape)}: give the tokens of this process, {name}.to_local(), "
            "and tell the layer's style in sparse_ffn.parallel how they lie"
        )
    if x.device != own.device:
        raise ValueError(f"{name} is on {x.device}, the layer's parameters are on {own.device}")
    double = torch.float64 in (x.dtype, own.dtype)  # autocast leaves fp64 alone
    if x.dtype not in (own.dtype, *also) and (double or not autocast_enabled(x)):
        raise TypeError(f"{name} has dtype {x.dtype}, the layer's parameters have {own.dtype}: convert one of them")


def initial_scale(init_scale: float, n_layers: int | None) -> float:
    """A layer's c: init_scale, or sqrt(2/L) of n_layers, if that is given."""
    scale = check_finite("init_scale", init_scale)
    if n_layers is None:
        return scale
    if scale != 1.0:
        raise ValueError(
            f"init_scale = {init_scale!r} and n_layers = {n_layers!r} both set the scale: give one of them"
        )
    return math.sqrt(2 / check_positive("n_layers", n_layers))
