"""torchao's quantised tensors as parameters of the layers: computed, or refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparse_ffn as sf

LAYERS = {
    "SigmaMoE": lambda: sf.SigmaMoE(8, 9, 4, 3),
    "a GLU": lambda: sf.SoftmaxMoE(8, 9, 4, 3, glu=True),
    "TopKFFN": lambda: sf.TopKFFN(8, 20, 5),
    "ProductKeyMemory": lambda: sf.ProductKeyMemory(8, 5, 7, n_heads=2),
    "DenseFFN": lambda: sf.DenseFFN(8, 20, glu=True),
}
COMPUTED = {("DenseFFN", "keys"), ("DenseFFN", "gate_keys")}
"""What is a linear map, and so torch's and torchao's to compute."""


def quantise(layer: nn.Module, name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.FqnToConfig({name: quantization.Int8WeightOnlyConfig()})
    quantization.quantize_(layer, config, filter_fn=None)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_quantised_parameter_is_computed_or_refused_by_name(kind: str, on_backend: str) -> None:
    x = torch.randn(3, 8)
    names = [name for name, p in LAYERS[kind]().named_parameters(recurse=False) if p.dim() > 1]
    for name in names:
        layer = LAYERS[kind]().eval()
        with torch.no_grad():
            expected = layer(x)
            dense = getattr(layer, name).detach().clone()
            quantise(layer, name)
            assert type(getattr(layer, name)) is not nn.Parameter
            if (kind, name) in COMPUTED:
                assert (layer(x) - expected).norm() < 0.05 * expected.norm()
                continue
            theirs = "(Int8|AffineQuantized)Tensor"  # now, and with torch 2.9
            with pytest.raises(TypeError, match=f"^{name} must be .* {theirs}: leave {name} out of"):
                layer(x)
            setattr(layer, name, nn.Parameter(getattr(layer, name).dequantize()))  # what the sentence says
            assert (layer(x) - expected).norm() < 0.1 * expected.norm()
            assert (getattr(layer, name) - dense).norm() < 0.02 * dense.norm()


def test_a_quantised_parameter_is_computed_where_decode_would_read_it_by_rows() -> None:
    layer, x = sf.DenseFFN(512, 512).eval(), torch.randn(1, 512)
    with torch.no_grad():
        expected = layer(x)
        quantise(layer, "keys")
        assert (layer(x) - expected).norm() < 0.05 * expected.norm()
