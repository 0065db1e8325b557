"""examples/train_parallel.py, apart from the others: each process imports this file, and their imports take seconds."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest

from examples import train_parallel


def train_on(rank: int, *runs: tuple[int, str]) -> list[list[float]]:
    return [train_parallel.main(["--steps", str(steps), "--out", out]) for steps, out in runs]


@pytest.mark.exhaustive
def test_train_parallel_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Saved on 2, resumed on 1 and on 4: the losses are those of a run that was never stopped."""
    parts = str(tmp_path / "parts")
    whole, start = processes.run(train_on, 2, (12, str(tmp_path / "whole")), (4, parts))[0]
    (alone,) = processes.run(train_on, 1, (8, parts))[0]
    (rest,) = processes.run(train_on, 4, (12, parts))[0]
    assert start + alone + rest == pytest.approx(whole, rel=1e-4)
    assert whole[-1] < whole[0] - 1
