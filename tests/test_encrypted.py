"""Quadratic activations and masks of whole blocks: what inference on encrypted numbers wants of a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparse_ffn as sf
from sparse_ffn.compress import block_mask_, polynomial_units_


@pytest.mark.parametrize("d_out", [8, 3])
def test_a_dense_layer_gets_any_quadratic(d_out: int) -> None:
    layer = sf.DenseFFN(8, 12, activation="relu", d_out=d_out, dtype=torch.float64)
    torch.nn.init.normal_(layer.key_bias)
    before, x = copy.deepcopy(layer), torch.randn(5, 8, dtype=torch.float64)
    polynomial_units_(layer, -0.3, 0.5, 0.7)
    z = x @ before.keys.T + before.key_bias
    torch.testing.assert_close(layer(x), (-0.3 * z**2 + 0.5 * z + 0.7) @ before.values + before.out_bias)
    assert layer.activation == "square"


def test_other_layers_get_those_with_one_root() -> None:
    layer = sf.SigmaMoE(8, 4, 6, 2, bias=True, dtype=torch.float64)
    before, x = copy.deepcopy(layer), torch.randn(5, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"c must be b²/4a = 0.125 for SigmaMoE, .* got 0.0"):
        polynomial_units_(layer, 0.5, 0.5)
    assert layer.activation == "relu"
    polynomial_units_(layer, 0.5, 0.5, 0.125)
    index, gate = (getattr(layer.router(x), name) for name in ("index_TK", "gate_TK"))
    z = torch.einsum("td,tkgd->tkg", x, before.keys[index])
    h = 0.5 * z**2 + 0.5 * z + 0.125
    torch.testing.assert_close(layer(x), torch.einsum("tkg,tkgo,tk->to", h, before.values[index], gate))


def test_what_a_layer_does_not_add_it_gets_no_constant_for() -> None:
    layer = sf.TopKFFN(8, 12, 4)
    with pytest.raises(ValueError, match=r"c must be b²/4a = 0.125 for TopKFFN, which does not add all units, got 0.0"):
        polynomial_units_(layer, 0.5, 0.5)
    polynomial_units_(layer, 0.5, 0.5, 0.125)
    assert not layer.out_bias.any()
    layer, dense = sf.TopKFFN(8, 12, 12), sf.DenseFFN(8, 12)
    dense.load_state_dict(layer.state_dict())
    for each in (layer, dense):
        polynomial_units_(each, 0.5, 0.5)
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (sf.DenseFFN(8, 12, bias=False), "layer must have biases"),
        (sf.DenseFFN(8, 12, glu=True), "layer must not be a GLU"),
    ],
)
def test_a_layer_without_a_place_for_a_term_is_refused(layer: sf.DenseFFN, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polynomial_units_(layer, 1.0, 1.0)
    with pytest.raises(ValueError, match="a must not be 0"):
        polynomial_units_(layer, 0.0, 1.0)


def test_a_layer_without_numbers_is_refused_and_stays() -> None:
    accelerate = pytest.importorskip("accelerate")
    layer = sf.DenseFFN(8, 16)
    model = torch.nn.Sequential(layer)
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match="key_bias is on meta, since accelerate holds these weights"):
        polynomial_units_(layer, 0.5, 0.5)
    with pytest.raises(ValueError, match="keys is on meta, since accelerate holds these weights"):
        block_mask_(layer, 0.5, (2, 8))
    assert layer.activation == "relu"
    assert "keys" in layer._parameters


def test_a_mask_keeps_whole_blocks_and_the_larger_ones() -> None:
    layer = sf.SigmaMoE(32, 3, 16, 2, glu=True)
    before = copy.deepcopy(layer)
    block_mask_(layer, 0.3)
    for name in ("keys", "gate_keys", "values"):
        blocks = getattr(before, name).detach().view(3, 2, 8, 2, 16).transpose(2, 3)
        kept = getattr(layer, f"{name}_mask").view(3, 2, 8, 2, 16).transpose(2, 3).flatten(3)
        assert torch.equal(kept.amin(-1), kept.amax(-1))
        kept, norms = kept[..., 0].bool(), blocks.flatten(3).norm(dim=-1)
        assert (~kept).sum() == round(0.3 * 12)
        assert norms[~kept].max() <= norms[kept].min()
    x, expected = torch.randn(5, 32), layer
    y = expected(x)
    y.sum().backward()
    assert not layer.keys_orig.grad[layer.keys_mask == 0].any()
    block_mask_(layer, 0.5)  # what is zero counts
    assert (layer.values == 0).float().mean() == 0.5
    twin = sf.SigmaMoE(32, 3, 16, 2, glu=True)
    block_mask_(twin, 0.0)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    for name in ("keys", "gate_keys", "values"):
        prune.remove(layer, name)
    assert torch.equal(twin(x), layer(x))


def test_a_block_that_does_not_fit_is_refused() -> None:
    layer = sf.TopKFFN(32, 24, 4)
    with pytest.raises(ValueError, match=r"block = \(16, 16\) must divide the units and columns of keys, \(24, 32\)"):
        block_mask_(layer, 0.5, (16, 16))
    layer._split = object()
    with pytest.raises(ValueError, match=r"layer is split by sparse_ffn\.parallel: mask its blocks before"):
        block_mask_(layer, 0.5)
    assert "keys" in dict(layer.named_parameters())


def test_a_mask_is_not_laid_on_what_is_computed_anew() -> None:
    layer = sf.DenseFFN(8, 16)
    nn.utils.parametrizations.weight_norm(layer, "values")
    names = set(layer.state_dict())
    with pytest.raises(ValueError, match=r"values is no plain parameter, .*: mask its blocks first"):
        block_mask_(layer, 0.5, (1, 1))
    assert set(layer.state_dict()) == names  # the keys have none either


def test_a_second_mask_ranks_the_present_weights() -> None:
    """Not those of the last forward, which an optimizer's step leaves behind."""
    layer = sf.DenseFFN(4, 4)
    nn.init.ones_(layer.keys)
    block_mask_(layer, 0.25, (2, 2))
    with torch.no_grad():
        layer.keys_orig[2:, 2:] = 0.1
    block_mask_(layer, 0.5, (2, 2))
    left = layer.keys_mask[::2, ::2]
    assert left.sum() == 2
    assert not left[1, 1]


@pytest.mark.parametrize(
    ("dtype", "a", "b", "term"),
    [(torch.float16, 1e-6, 1.0, "b/2a"), (torch.float32, 1.0, 1e200, "b/2a"), (torch.float16, 1e5, 0.0, "a")],
)
def test_a_term_beyond_the_layers_dtype_changes_nothing(dtype: torch.dtype, a: float, b: float, term: str) -> None:
    layer = sf.DenseFFN(4, 8, bias=True, dtype=dtype)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=f"^{term} must be a number of the layer's dtype"):
        polynomial_units_(layer, a, b)
    assert layer.activation == "relu"
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    with torch.inference_mode():
        layer = sf.DenseFFN(4, 8, bias=True)
    with pytest.raises(ValueError, match="was made in inference mode"):
        polynomial_units_(layer, 1.0, 0.0)
    assert layer.activation == "relu"


def test_an_activation_is_not_given_to_what_is_computed_anew() -> None:
    """The next forward would make it again of the numbers before."""
    for change in (
        lambda layer: block_mask_(layer, 0.5, (1, 1)),
        lambda layer: nn.utils.parametrizations.weight_norm(layer, "values"),
    ):
        layer = sf.DenseFFN(8, 16, bias=True)
        change(layer)
        with pytest.raises(ValueError, match="values is no plain parameter"):
            polynomial_units_(layer, 2.0, 1.0)
        assert layer.activation == "relu"
        assert not layer.key_bias.any()
