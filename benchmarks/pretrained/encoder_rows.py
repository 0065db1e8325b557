"""What conversion does to a real encoder: quality and speed, cell by cell, and their table."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from textwrap import wrap

import torch
from torch import Tensor, nn

import sparse_ffn as sf
from benchmarks.measuring.timing import Run, race
from benchmarks.pretrained.cells import Cell, Numbers, Record
from benchmarks.pretrained.encoder import Encoder, reciprocal_ranks
from benchmarks.pretrained.texts import CALIBRATION, EVALUATION, pairs

SHARES = (75, 50, 25)
SAMPLES = 5
DENSE = "dense"


@dataclass(frozen=True)
class Way:
    """A way to make experts and their router."""

    experts: str
    router: str
    options: Mapping[str, str]
    data: bool
    expert_size: int = 128

    @property
    def name(self) -> str:
        """How many experts, and which."""
        return f"{1536 // self.expert_size} {self.experts}"

    def cell(self, share: int, sample: int) -> str:
        """What its cell for a share and a sample of calibration text is called."""
        return f"{share}%, {self.name}, {self.router}" + (f", sample {sample}" if self.data else "")

    def cells(self, share: int) -> list[str]:
        """Those of all samples."""
        return [self.cell(share, sample) for sample in range(SAMPLES if self.data else 1)]


WAYS = (
    Way("contiguous", "Avg-K", {"init": "split"}, data=False),
    Way("contiguous", "fitted", {"init": "split"}, data=True),
    Way("clusters of keys", "Avg-K", {"init": "cluster"}, data=False),
    Way("clusters of keys", "fitted", {"init": "cluster", "cluster_by": "keys"}, data=True),
    Way("clusters of co-activation", "Avg-K", {"init": "cluster", "router_init": "mean_keys"}, data=True),
    Way("clusters of co-activation", "fitted", {"init": "cluster"}, data=True),
    Way("clusters of co-activation", "fitted", {"init": "cluster"}, data=True, expert_size=32),
)
CASES = ((100, WAYS[0]), *((share, way) for share in SHARES for way in WAYS))
SHAPES = tuple(dict.fromkeys((share, way.expert_size) for share, way in CASES))


def converted(
    encoder: Encoder, way: Way, share: int, calibration: Mapping[str, Tensor]
) -> tuple[nn.Module, sf.convert.Report]:
    """A converted copy of the encoder's model."""
    model = copy.deepcopy(encoder.model)
    n_experts = 1536 // way.expert_size
    config = sf.MoEConfig(router="unweighted", expert_size=way.expert_size, k=n_experts * share // 100, **way.options)
    return model, sf.sparsify_(model, config, calibration=calibration if way.data else None)


class Encoding:
    """The encoder, a retrieval task, and the cells of the table. What finished cells do not need is never loaded.

    Args:
        n_pairs: docstrings in the task.
        n_calibration: docstrings in each sample of calibration text.
    """

    def __init__(self, n_pairs: int = 300, n_calibration: int = 190) -> None:
        self.n_pairs, self.n_calibration = n_pairs, n_calibration

    @cached_property
    def encoder(self) -> Encoder:
        """Dense."""
        return Encoder.load()

    @cached_property
    def task(self) -> tuple[list[str], list[str]]:
        """Queries, and the document of each."""
        heads, rests = zip(*pairs(EVALUATION, self.n_pairs), strict=True)
        return [*heads], [*rests]

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """The dense model's embeddings of both."""
        return self._embed(self.encoder.model)

    def settings(self) -> dict[str, str]:
        """What the numbers depend on, in words."""
        return {
            "model": "all-MiniLM-L6-v2",
            "task": f"{self.n_pairs} docstrings of the standard library of Python {platform.python_version()}: the "
            "first paragraph finds the rest among all",
            "calibration": f"up to {SAMPLES} samples of {self.n_calibration} docstrings of torch {torch.__version__}, "
            "4096 tokens of each kept",
        }

    def quality(self) -> Iterator[Cell]:
        """What a converted model's embeddings are worth; all of a sample before the next."""
        yield Cell(DENSE, lambda: {"MRR": reciprocal_ranks(*self.dense).mean().item()})
        for sample in range(SAMPLES):
            calibration = cache(partial(self._calibrate, sample))
            for share, way in CASES:
                if way.data or sample == 0:
                    yield Cell(way.cell(share, sample), partial(self._quality, way, share, calibration))

    def speed(self, seconds: float) -> Iterator[Cell]:
        """Time over the dense model's, by share and size of experts: the same for all ways to choose their units."""
        for share, size in SHAPES:
            yield Cell(f"{share}%, experts of {size}", partial(self._time, share, size, seconds))

    def _calibrate(self, sample: int) -> dict[str, Tensor]:
        found = pairs(CALIBRATION, SAMPLES * self.n_calibration)[sample::SAMPLES]
        return sf.calibrate(self.encoder.model, self.encoder.batches([" ".join(pair) for pair in found]))

    def _embed(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        queries, documents = (self.encoder.embed(model, texts) for texts in self.task)
        return queries, documents

    def _quality(self, way: Way, share: int, calibration: Callable[[], Mapping[str, Tensor]]) -> Numbers:
        model, report = converted(self.encoder, way, share, calibration() if way.data else {})
        ours, dense = self._embed(model), self.dense
        before, after = (sum(new.flops[i] for new in report.replacements) for i in (0, 1))
        first = [(queries @ documents.t()).argmax(1) for queries, documents in (ours, dense)]
        same = (first[0] == first[1]).float()
        ranks, of_dense = reciprocal_ranks(*ours), reciprocal_ranks(*dense)
        both = torch.cat(ours), torch.cat(dense)
        return {
            "FLOPs": after / before,
            "cosine": (both[0] * both[1]).sum(1).mean().item(),
            "MRR": ranks.mean().item(),
            "MRR error of the queries": ((ranks - of_dense).std() / len(ranks) ** 0.5).item(),
            "same first": same.mean().item(),
            "same first error of the queries": (same.std() / len(same) ** 0.5).item(),
            "largest": (both[0] - both[1]).abs().max().item(),
        }

    @torch.no_grad()
    def _time(self, share: int, size: int, seconds: float) -> Numbers:
        way = Way("contiguous", "Avg-K", {"init": "split"}, data=False, expert_size=size)
        batch = next(self.encoder.batches(self.task[1]))
        models = {DENSE: self.encoder.model, "converted": converted(self.encoder, way, share, {})[0]}
        runs = {name: Run(lambda: None, partial(model, **batch)) for name, model in models.items()}
        samples = race(runs, seconds, lead=[DENSE])
        return {"time": samples.ratio("converted", DENSE).median, "of dense": samples.time(DENSE).median}


def table(record: Record, speed: Record | None) -> list[str]:
    """Quality and, where it was taken, time over the dense model's."""
    lines = [
        "| active | experts | router | FLOPs | cosine | MRR | same first | time |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
        f"| 100% | {DENSE} | - | 100% | 1.0000 | {record.cells[DENSE]['MRR']:.3f} | 100% | 1.00 |",
    ]
    for share, way in CASES:
        numbers = {name: record.of(way.cells(share), name) for name in ("FLOPs", "cosine", "MRR", "same first")}
        timed = speed and speed.cells.get(f"{share}%, experts of {way.expert_size}")
        time = f"{timed['time']:.2f}" if timed else ""
        if (flops := numbers["FLOPs"]) is not None:
            lines.append(
                f"| {share}% | {way.name} | {way.router} | {flops.mean:.0%} | {numbers['cosine']:.4f} "
                f"| {numbers['MRR']:.3f} | {numbers['same first']:.1%} | {time} |"
            )
    largest = record.cells[CASES[0][1].cell(100, 0)]["largest"]
    samples = record.finished(way.cells(share) for share, way in CASES if way.data)
    ranks, same = (
        [found for cell in record.cells.values() if (found := cell.get(f"{name} error of the queries"))]
        for name in ("MRR", "same first")
    )  # older cells are without
    text = f"Samples of calibration text: {samples}. Errors in the table are those of this text alone."
    if ranks:
        text += f" Over the queries, the difference of a MRR from dense's has one of {min(ranks):.3f} to"
        text += (
            f" {max(ranks):.3f}, and a share of the same first has one of {min(same):.1%} to {max(same):.1%} (in the"
        )
        text += f" {len(ranks)} cells that tell)."
    return [
        *lines,
        "",
        f"At 100% the largest difference of an embedding's component is {largest:.0e}.",
        *wrap(text, 118),
    ]
