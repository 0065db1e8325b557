"""What conversion costs a real encoder: quality and speed against the active share, as a table in docs/convert.md."""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import sparse_ffn as sf
from benchmarks import machine
from benchmarks.encoder import CALIBRATION, EVALUATION, Encoder, pairs, reciprocal_ranks
from benchmarks.timing import Run, race

SHARES = (75, 50, 25)


@dataclass(frozen=True)
class Way:
    """A way to make experts and their router."""

    experts: str
    router: str
    options: Mapping[str, str]
    data: bool
    expert_size: int = 128


WAYS = (
    Way("contiguous", "Avg-K", {"init": "split"}, data=False),
    Way("contiguous", "fitted", {"init": "split"}, data=True),
    Way("clusters of keys", "Avg-K", {"init": "cluster"}, data=False),
    Way("clusters of keys", "fitted", {"init": "cluster", "cluster_by": "keys"}, data=True),
    Way("clusters of co-activation", "Avg-K", {"init": "cluster", "router_init": "mean_keys"}, data=True),
    Way("clusters of co-activation", "fitted", {"init": "cluster"}, data=True),
    Way("clusters of co-activation", "fitted", {"init": "cluster"}, data=True, expert_size=32),
)


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    share: int
    experts: str
    router: str
    flops: float
    """Of the FFNs, router included, over the dense ones."""
    cosine: float
    """Of sentence embeddings with the dense model's, mean."""
    mrr: float
    """Mean reciprocal rank of the retrieval task."""
    same_first: float
    """Share of queries whose best document is the dense model's."""
    largest: float
    """Largest difference of an embedding's component."""
    time: float = 0.0
    """Of the encoder's forward pass over the dense model's, median of paired rounds."""


def converted(
    encoder: Encoder, way: Way, share: int, calibration: Mapping[str, Tensor]
) -> tuple[nn.Module, sf.convert.Report]:
    """A converted copy of the encoder's model."""
    model = copy.deepcopy(encoder.model)
    n_experts = 1536 // way.expert_size
    config = sf.MoEConfig(router="unweighted", expert_size=way.expert_size, k=n_experts * share // 100, **way.options)
    return model, sf.sparsify_(model, config, calibration=calibration if way.data else None)


def measure(n_pairs: int, n_calibration: int, seconds: float) -> tuple[list[Measured], dict[str, str]]:
    """All rows, and what was measured on what."""
    encoder = Encoder.load()
    task, texts = pairs(EVALUATION, n_pairs), [" ".join(pair) for pair in pairs(CALIBRATION, n_calibration)]
    heads, rests = [head for head, _ in task], [rest for _, rest in task]
    calibration = sf.calibrate(encoder.model, encoder.batches(texts))
    queries, documents = encoder.embed(encoder.model, heads), encoder.embed(encoder.model, rests)
    first = (queries @ documents.t()).argmax(1)
    models: dict[str, nn.Module] = {"dense": encoder.model}
    rows = [Measured(100, "dense", "", 1.0, 1.0, reciprocal_ranks(queries, documents).mean().item(), 1.0, 0.0)]
    for share, way in _cases():
        model, report = converted(encoder, way, share, calibration)
        q, d = encoder.embed(model, heads), encoder.embed(model, rests)
        before, after = (sum(new.flops[i] for new in report.replacements) for i in (0, 1))
        rows.append(
            Measured(
                share,
                f"{1536 // way.expert_size} {way.experts}",
                way.router,
                after / before,
                torch.cat([(q * queries).sum(1), (d * documents).sum(1)]).mean().item(),
                reciprocal_ranks(q, d).mean().item(),
                ((q @ d.t()).argmax(1) == first).float().mean().item(),
                max((q - queries).abs().max().item(), (d - documents).abs().max().item()),
            )
        )
        models[str(len(rows) - 1)] = model
        print(_line(rows[-1]), flush=True)
    batch = next(encoder.batches(rests))
    times = _times(models, batch, seconds)
    names = ["dense", *map(str, range(1, len(rows)))]
    rows = [Measured(**{**asdict(row), "time": times[name]}) for row, name in zip(rows, names, strict=True)]
    facts = {
        "task": f"{len(task)} docstrings of the standard library: the first paragraph finds the rest among all",
        "calibration": f"{len(texts)} docstrings of torch, {len(next(iter(calibration.values())))} tokens kept",
        "timed": f"one batch of {tuple(batch['input_ids'].shape)} tokens, forward without gradients",
        **machine.describe(torch.device("cpu")),
    }
    return rows, facts


def _cases() -> Iterator[tuple[int, Way]]:
    yield 100, WAYS[0]
    yield from ((share, way) for share in SHARES for way in WAYS)


@torch.no_grad()
def _times(models: Mapping[str, nn.Module], batch: Mapping[str, Tensor], seconds: float) -> dict[str, float]:
    runs = {name: Run(lambda: None, lambda model=model: model(**batch)) for name, model in models.items()}
    samples = race(runs, seconds, lead=["dense"])
    return {name: samples.ratio(name, "dense").median for name in models}


def _line(row: Measured) -> str:
    return (
        f"| {row.share}% | {row.experts} | {row.router or '-'} | {row.flops:.0%} | {row.cosine:.4f} | {row.mrr:.3f} "
        f"| {row.same_first:.0%} | {row.time:.2f} |"
    )


def table(rows: Sequence[Measured], facts: Mapping[str, str]) -> str:
    """The generated part of the page."""
    lines = [
        "| active | experts | router | FLOPs | cosine | MRR | same first | time |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
        *map(_line, rows),
        "",
        f"At 100% the largest difference of an embedding's component is {rows[1].largest:.0e}.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    return "\n".join(lines)


MARKS = "<!-- written by python -m benchmarks.bench_convert -->", "<!-- end of what it wrote -->"


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pairs", type=int, default=300, help="docstrings in the retrieval task")
    arguments.add_argument("--calibration", type=int, default=300, help="docstrings to calibrate on")
    arguments.add_argument("--seconds", type=float, default=120, help="for the timing, about")
    arguments.add_argument("--json", type=Path, default=Path("runs/bench/convert.json"))
    arguments.add_argument("--page", type=Path, default=Path("docs/convert.md"), help="its marked part is written anew")
    options = arguments.parse_args(argv)
    torch.manual_seed(0)
    rows, facts = measure(options.pairs, options.calibration, options.seconds)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "facts": facts}, indent=1))
    text = table(rows, facts)
    print(text)
    begin, end = MARKS
    page = options.page.read_text()
    new = re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
    options.page.write_text(new)


if __name__ == "__main__":
    main()
