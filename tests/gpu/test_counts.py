"""What `benchmarks.predict` counts by formulas is what the library's own host code launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import launches, predict
from benchmarks.shapes import MoEShape
from sparse_ffn.backends.triton import columns

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts on CPU tensors, which only the interpreter takes"
)

SHAPE = MoEShape(1024, 512, 64, 64, 4)
CARD = replace(predict.H100, level_2=3 << 20)  # two blocks of columns


@pytest.mark.parametrize("glu", [False, True], ids=["relu", "glu"])
def test_launches_and_bytes_are_the_predicted_ones(glu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "cache_bytes", lambda device: CARD.level_2)
    experts = predict.kernels(SHAPE, glu=glu, design=predict.Design(), card=CARD)
    parts = zip(launches.step(SHAPE, fused=True, glu=glu), predict.router(SHAPE), experts, strict=True)
    for found, router, others in parts:
        for work, kernels in ((found.routing, router), (found.experts, others)):
            assert len(work.launches) == sum(kernel.launches for kernel in kernels)
            moved = sum(kernel.data + 2 * kernel.near for kernel in kernels)  # the cache is written before it is read
            assert work.bytes == pytest.approx(moved, rel=0.04)


def test_the_table_shows_what_each_design_saves() -> None:
    header, body = predict.table((SHAPE,))
    assert {len(row) for row in body} == {len(header)}
    designs = [row[2] for row in body if row[1] == "GLU"]
    assert designs == [name for name, _ in predict.DESIGNS]
    first, *_, last = ([float(n) for n in row[5].split(" / ")] for row in body if row[1] == "ReLU")  # MiB
    assert all(after < before for before, after in zip(first, last, strict=True))
