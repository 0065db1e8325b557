"""The experts of transformers' models in host memory: the same function, the same state dict, the hits of any cache."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.layers.rows import OffloadedRows

transformers = pytest.importorskip("transformers", minversion="5")

from test_transformers_experts import model_of  # noqa: E402

from sparse_ffn.integrations.experts import NAME  # noqa: E402
from sparse_ffn.integrations.transformers import from_pretrained  # noqa: E402

TOKENS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1))
EXPERTS = "model.layers.0.mlp.experts"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("coded", [False, True], ids=["dense", "codes"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # the second with biases, and matrices the other way round
def test_they_compute_as_before_from_any_cache_and_are_saved_and_thawed(kind: str, coded: bool, tmp_path: Path) -> None:
    model = model_of(kind, torch.float32).eval()
    if coded:
        sf.quantize_experts_(model, sf.ExpertQuantization(group_size=4))
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    for cache in (1, 0.5, 4):
        twin = copy.deepcopy(model)
        sf.offload_experts_(twin, cache=cache, device="cpu")
        assert twin.config._experts_implementation == NAME
        assert isinstance(twin.get_submodule(f"{EXPERTS}.down_proj"), OffloadedRows)
        torch.testing.assert_close(logits(twin), expected, rtol=1e-4, atol=1e-5)
        (name, stats), *others = sf.offload_stats(twin).items()
        assert (name, others) == (EXPERTS, [])
        assert stats["hits"] + stats["misses"] == 4
    assert stats["misses"] == 4
    assert {name: t.shape for name, t in twin.state_dict().items()} == {name: t.shape for name, t in state.items()}
    assert all(torch.equal(t, state[name]) for name, t in twin.state_dict().items())
    twin.save_pretrained(tmp_path)
    load = from_pretrained if coded else type(model).from_pretrained
    torch.testing.assert_close(logits(load(str(tmp_path)).eval()), expected, rtol=1e-4, atol=1e-5)
    sf.dequantize_experts_(twin)
    twin.set_experts_implementation("eager")
    torch.testing.assert_close(logits(twin), expected, rtol=1e-3, atol=1e-4)
