"""Lightning and accelerate need nothing special: one training run of each, with the balance loss active."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.layers import LatentMoE, SharedExpertMoE

D = 8


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), sf.SigmaMoE(D, 4, 6, 2, **options), nn.Linear(D, 1))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, D, generator=generator)
    return list(zip(x, x[:, :1] * x[:, 1:2], strict=True))


def test_lightning_trains_checkpoints_and_restores(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Regression(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.seen: list[float] = []
            self.balance: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss, balance = (self.network(batch[0]) - batch[1]).square().mean(), sf.aux_loss(self.network)
            self.seen.append(loss.item())
            self.balance.append(balance.item())
            return loss + balance

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
        module = Regression()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=20, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, precision="bf16-mixed",
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=32))
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        restored = Regression.load_from_checkpoint(tmp_path / "model.ckpt")
    assert module.seen[-1] < module.seen[0] / 2
    assert all(balance != 0 for balance in module.balance)
    x = torch.randn(5, D)
    assert torch.equal(restored.eval().network(x), module.eval().network(x))


def test_accelerate_trains_saves_and_loads(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # one a process: the Trainer of another test left its own
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = network(balance_weight=1.0)
    prepared = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2),
                                   torch.utils.data.DataLoader(data(), batch_size=16))  # fmt: skip
    wrapped, optimizer, loader = prepared
    losses = []
    for _ in range(20):
        for x, y in loader:
            with accelerator.accumulate(wrapped):
                loss = (wrapped(x) - y).square().mean()
                accelerator.backward(loss + sf.aux_loss(wrapped))
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    accelerator.save_state(str(tmp_path))
    x = torch.randn(5, D)
    expected = wrapped.eval()(x)
    with torch.no_grad():
        model[1].keys.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(wrapped(x), expected)
    accelerate.state.AcceleratorState._reset_state(True)


def test_accelerate_offloads_weights_and_brings_them_back_for_each_call() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = nn.Sequential(
        sf.SigmaMoE(D, 4, 6, 2, bias=True), sf.ProductKeyMemory(D, 4, 3, query_dim=6, query_norm="rms"),
        sf.TopKFFN(D, 16, 4), sf.DenseFFN(D, 16), LatentMoE(D, 4, 5, 6, 2),
        SharedExpertMoE(sf.SigmaMoE(D, 4, 6, 2, null_experts=2, null_kind="identity"), sf.DenseFFN(D, 16), gated=True),
        SharedExpertMoE(LatentMoE(D, 4, 5, 6, 2), sf.DenseFFN(D, 16)),
    ).eval()  # fmt: skip
    x = torch.randn(5, D)
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        torch.testing.assert_close(model(x), expected)


def _mapped(model: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model")
    sf.map_experts_(model, folder / "model")


STATS = sf.expert_stats(nn.Sequential(sf.SigmaMoE(D, 4, 6, 2)), [torch.randn(5, D)])
CHANGES: dict[str, Callable[[nn.Module, Path], object]] = {
    "quantised": lambda model, folder: sf.quantize_experts_(model, sf.ExpertQuantization(bits=8)),
    "made dense again": lambda model, folder: sf.dequantize_experts_(model),
    "pruned": lambda model, folder: sf.prune_experts_(model, STATS, 0.5),
    "offloaded": lambda model, folder: sf.offload_experts_(model, cache=2, device="cpu"),
    "mapped": _mapped,
}


@pytest.mark.parametrize("change", CHANGES)
def test_experts_that_accelerate_holds_must_be_given_back_before_they_are_changed(change: str, tmp_path: Path) -> None:
    """It has them and leaves tensors on meta, of which nothing could be made."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(sf.SigmaMoE(D, 4, 6, 2)).eval()
    if change == "made dense again":
        sf.quantize_experts_(model, sf.ExpertQuantization(bits=8))
    x = torch.randn(5, D)
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        with pytest.raises(ValueError, match=r"0\.(keys|router).* on meta, .*remove_hook_from_submodules\(model\)"):
            CHANGES[change](model, tmp_path)
        accelerate.hooks.remove_hook_from_submodules(model)
        torch.testing.assert_close(model(x), expected)  # nothing has been changed
        CHANGES[change](model, tmp_path)
