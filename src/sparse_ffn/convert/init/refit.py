"""Refit: values that make up for the experts that a token does not use, by ridge regression on calibration data.

T tokens, F hidden units of all experts, O d_out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.convert.config_base import Converted
from sparse_ffn.convert.init.evaluating import evaluating
from sparse_ffn.convert.init.weights import FFNWeights, wide
from sparse_ffn.layers import DenseFFN, MoE
from sparse_ffn.layers.shared_expert import SharedExpertMoE

RIDGES = (0.1, 1.0, 10.0)
"""Penalties on a change of the values that are tried, over the mean energy of a unit."""


def refit(layer: Converted, moe: MoE, ffn: FFNWeights, inputs: Tensor) -> str:
    """Change the values, and the output bias if there is one, so that the output is nearer to the dense FFN's.

    The penalty is the one that does best on a quarter of the tokens when fitted to the others, and if none does better
    than the present values, they stay; then all tokens are fitted to.

    Args:
        layer: the mixture, beside a shared expert or not.
        moe: the mixture.
        ffn: the dense FFN.
        inputs: what it sees, [T, d_model].

    Returns:
        What was done, for the report.
    """
    x = inputs.to(ffn.keys)
    with evaluating(layer):
        missing_TO = wide(ffn.output(x)) - wide(layer(x))
    units_TF = active_units(layer, moe, x)
    held = torch.arange(len(x), device=x.device) % 4 == 3
    fitted = _Fit(units_TF[~held], missing_TO[~held], centred=moe.out_bias is not None)
    lost: dict[float | None, float] = {None: missing_TO[held].square().sum().item()}
    lost |= {r: fitted.error(r, units_TF[held], missing_TO[held]) for r in RIDGES}
    ridge = min(lost, key=lost.__getitem__)
    if ridge is None:
        return ""
    change_FO, bias_O = _Fit(units_TF, missing_TO, centred=moe.out_bias is not None).solve(ridge)
    for part in [layer.shared, moe] if isinstance(layer, SharedExpertMoE) else [moe]:
        own, change_FO = change_FO.tensor_split([part.d_ff])
        part.values.add_(own.view_as(part.values).to(part.values.dtype))
    if moe.out_bias is not None:
        moe.out_bias.add_(bias_O.to(moe.out_bias.dtype))
    return f", values refitted (ridge {ridge:g})"


def active_units(layer: Converted, moe: MoE, x: Tensor) -> Tensor:
    """Each hidden unit times its expert's gate, 0 where that is not selected: [T, F], a shared expert's units first."""
    with evaluating(moe):
        routing = moe.router(x)
    gate_TE = routing.gate_TK.new_zeros(len(x), moe.n_experts + 1)  # the last for slots without an expert
    gate_TE = gate_TE.scatter(1, routing.index_TK, routing.gate_TK)[:, :-1]
    units_TF: Tensor = wide(_hidden(moe, x)) * gate_TE.repeat_interleave(moe.expert_size, 1)
    if not isinstance(layer, SharedExpertMoE):
        return units_TF
    return torch.cat([wide(_hidden(layer.shared, x)), units_TF], 1)


def _hidden(layer: MoE | DenseFFN, x: Tensor) -> Tensor:
    rows = {"keys": layer.keys, "values": layer.values, "gate_keys": layer.gate_keys}
    flat = {name: None if t is None else t.reshape(-1, t.shape[-1]) for name, t in rows.items()}
    key_bias = None if layer.key_bias is None else layer.key_bias.flatten()
    return FFNWeights(**flat, activation=layer.activation, key_bias=key_bias).hidden(x)  # type: ignore[arg-type]


class _Fit:
    """Of outputs [T, O] to units [T, F], less their means if there is a bias."""

    def __init__(self, units_TF: Tensor, outputs_TO: Tensor, centred: bool) -> None:
        self.units_F = units_TF.mean(0) * centred
        self.outputs_O = outputs_TO.mean(0) * centred
        units_TF = units_TF - self.units_F
        self.energy_FF, self.cross_FO = units_TF.t() @ units_TF, units_TF.t() @ (outputs_TO - self.outputs_O)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The values [F, O] and the bias [O]."""
        diagonal = self.energy_FF.diagonal()
        penalty = torch.diag(torch.full_like(diagonal, ridge) * diagonal.mean().clamp_min(1e-30))
        values_FO = torch.cholesky_solve(self.cross_FO, torch.linalg.cholesky(self.energy_FF + penalty))
        return values_FO, self.outputs_O - self.units_F @ values_FO

    def error(self, ridge: float, units_TF: Tensor, outputs_TO: Tensor) -> float:
        """What is left of outputs, squared and summed."""
        values_FO, bias_O = self.solve(ridge)
        return (outputs_TO - units_TF @ values_FO - bias_O).square().sum().item()
