"""transformers' expert parallelism with our exchanges and kernels, against eager experts in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip(
    "transformers.distributed.expert_parallel", reason="older versions of transformers name no implementation"
)

from test_transformers_experts import model_of  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402
from transformers.distributed.expert_parallel import EPImplementationInterface  # noqa: E402

from sparse_ffn.integrations.transformers import register  # noqa: E402

pytestmark = [pytest.mark.timeout(900), pytest.mark.exhaustive]
CASES: dict[int, list[tuple[str, dict[str, int], int]]] = {
    2: [("mixtral", {"tp_size": 2, "ep_size": 2}, 2), ("gpt_oss", {"fsdp_size": 2, "ep_size": 2}, 1)],
    4: [("mixtral", {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, 2)],
}
"""For so many processes: a model, sizes of its layout, and how many of the processes have one batch together."""


def tokens(batch: int) -> Tensor:
    return torch.randint(0, 32, (1, 5), generator=torch.Generator().manual_seed(batch))


def step(model: Any, batches: list[int]) -> dict[str, Tensor]:
    """Logits and gradients of the mean of the batches' losses."""
    model.zero_grad()
    logits = []
    for batch in batches:
        out = model(tokens(batch), labels=tokens(batch))
        (out.loss / len(batches)).backward()
        logits.append(out.logits.detach())
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        "logits": torch.cat(logits),
        **{n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()},
    }


def split(rank: int, folder: str, cases: list[tuple[str, dict[str, int], int]]) -> list[dict[str, Tensor]]:
    register()
    found = []
    for kind, sizes, share in cases:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/{kind}",
            dtype=torch.float32,  # in fp64 FSDP2 divides twice, by whatever implementation
            experts_implementation="sparse_ffn",
            distributed_config=DistributedConfig(**sizes, ep_implementation="sparse_ffn"),
        ).train()
        results = step(model, [rank // share])
        with torch.no_grad():
            torch.testing.assert_close(model(tokens(rank // share)).logits, results["logits"], rtol=1e-4, atol=1e-5)
        found.append(results)
    return found


@pytest.mark.parametrize("world", CASES)
def test_experts_of_several_processes_compute_what_eager_computes(world: int, tmp_path: Path) -> None:
    """One batch for all processes, one for each, one for each pair of a tensor-parallel group."""
    register()
    assert "sparse_ffn" in EPImplementationInterface()
    for kind, _, _ in CASES[world]:
        model_of(kind).save_pretrained(tmp_path / kind)
    for rank, results in enumerate(processes.run(split, world, str(tmp_path), CASES[world])):
        for (kind, _, share), actual in zip(CASES[world], results, strict=True):
            expected = step(model_of(kind), list(range(world // share)))
            expected["logits"] = expected["logits"][rank // share].unsqueeze(0)
            assert any("down_proj" in name for name in actual)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, check_dtype=False)
