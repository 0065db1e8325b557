"""Models that are changed in inference mode: outside of it they compute and train as others do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_ffn as sf
from sparse_ffn.compress import block_mask_, compress_experts_

D = 8
EIGHT = sf.ExpertQuantization(bits=8)


def made() -> nn.Sequential:
    return nn.Sequential(sf.SigmaMoE(D, 4, 8, 2, bias=True)).eval()


def inputs() -> list[torch.Tensor]:
    return [torch.randn(20, D)]


def dequantised(model: nn.Module, path: Path) -> None:
    sf.quantize_experts_(model, EIGHT)
    sf.dequantize_experts_(model)


def mapped(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path / "model")
    sf.map_experts_(model, path / "model")


def offloaded_and_back(model: nn.Module, path: Path) -> None:
    sf.offload_experts_(model, cache=2, device="cpu")
    sf.dequantize_experts_(model)


CHANGES: dict[str, Callable[[nn.Module, Path], object]] = {
    "quantised": lambda model, path: sf.quantize_experts_(model, EIGHT, batches=inputs()),
    "dequantised": dequantised,
    "pruned": lambda model, path: sf.prune_experts_(model, sf.expert_stats(model, inputs()), 3, replace="mean"),
    "compressed": lambda model, path: compress_experts_(model, 2),
    "mapped": mapped,
    "offloaded and back": offloaded_and_back,
    "masked": lambda model, path: block_mask_(model[0], 0.5, (1, 1)),  # type: ignore[index]
}
changes = pytest.mark.parametrize("change", CHANGES)


@changes
def test_what_is_changed_in_it_trains_outside(change: str, tmp_path: Path) -> None:
    model = made()
    with torch.inference_mode():
        CHANGES[change](model, tmp_path)
    model.train()(torch.randn(5, D)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@changes
def test_what_is_made_in_it_is_changed_in_it(change: str, tmp_path: Path) -> None:
    x = torch.randn(5, D)
    with torch.inference_mode():
        model = made()
        CHANGES[change](model, tmp_path)
        assert model(x).isfinite().all()
