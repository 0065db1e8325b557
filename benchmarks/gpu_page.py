"""The section on GPUs of docs/benchmarks.md: what was measured, or that nothing was; and what the peak rates allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import plot, predict, report
from benchmarks.results import MODES, Report, Row
from benchmarks.shapes import GPU_FINE, GPU_MEMORY, GPU_SHAPES, GPU_WIDE
from benchmarks.targets import TO_DENSE

PARTS = ("layers", "cvmm", "sweeps", "tuned")
Cards = Mapping[str, Mapping[str, Report]]  # by the folder's name, then by part

NOTHING = """\
## On a GPU

**No GPU was at hand: nothing in this section was measured, and no speed on a GPU is claimed.** One command measures all
of it on a machine that has one (on one H100 in less than ten minutes), tests first:

```sh
benchmarks/run_gpu.sh                                   # JSON and pictures in runs/gpu/<card>
python -m benchmarks.document --gpu runs/gpu/<card>     # this section from them
```
"""
MEASURED = """\
## On a GPU

Measured by `benchmarks/run_gpu.sh`. Times are the device's own, by CUDA events: before each call the second-level
cache is overwritten, and the device is kept busy for about half a millisecond, so that the host's launching is hidden
if it takes no longer.
"""
PREDICTED = """\
### Predicted, not measured

What the peak rates of an H100 allow in bf16, by `benchmarks/predict.py`: each kernel takes its operations at
{compute:.0%} of {operations:.0f} TF/s or its bytes at {stream:.0%} of {memory:.1f} TB/s, whichever is longer, and
{launch:.0f} µs. Of another library's kernels, tuned for this card (Liger-Kernel, pull request 1294), the same model
predicts the forward rate that is reported there, and 1.2 times that of both passes; so these are bounds rather than
forecasts. "Of dense" is the rate of both passes over that of the dense network of equal compute, predicted likewise;
"in cache" is what it would be if rows gathered or handed from kernel to kernel never left the second-level cache. The
targets are {wide} for the first shape and {fine} for the second, with ReLU. Kept is for the backward pass, x included.
"""


def load(folder: Path) -> Cards:
    """The reports in a card's folder, or in a folder that has one for each card."""
    cards, places = {}, [folder] if any(folder.glob("*.json")) else sorted(folder.glob("*/"))
    for place in places:
        found = {part: Report.load(place / f"{part}.json") for part in PARTS if (place / f"{part}.json").is_file()}
        if found:
            cards[place.name] = found
    return cards


def section(cards: Cards) -> str:
    """The section's text."""
    parts = [MEASURED if cards else NOTHING]
    for name, reports in cards.items():
        parts += list(_card(name, reports))
    parts += [_predicted(), report.markdown(predictions()) + "\n", _memory()]
    return "\n".join(parts)


def draw(cards: Cards, images: Path) -> None:
    """The pictures that the section shows."""
    for name, reports in cards.items():
        for part, found in reports.items():
            (plot.growth if part == "sweeps" else plot.ratios)(found, images / _picture(name, part))


def _picture(name: str, part: str) -> str:
    return f"gpu-{name}-{part}.png"


def _card(name: str, reports: Mapping[str, Report]) -> Iterator[str]:
    any_report = next(iter(reports.values()))
    yield f"### {any_report.machine.get('GPU', name)}\n"
    facts = [[fact, value] for fact, value in any_report.machine.items()]
    facts += [[f"command, {part}", f"`{found.command}`"] for part, found in reports.items()]
    yield report.markdown((("", ""), facts)).replace("---:", "---") + "\n"
    verdicts = report.targets(row for found in reports.values() for row in found.rows)
    if verdicts[1]:
        yield f"Targets, of the peers of a row the nearest one:\n\n{report.markdown(verdicts)}\n"
    for part, found in reports.items():
        yield f"![{part}, {name}](images/{_picture(name, part)})\n"
        for group, rows in found.groups():
            heading = f"**{report.GROUPS.get(group, group)}**"
            if any(result.kind == "peer" for row in rows for result in row.results) and part != "sweeps":
                yield f"{heading}: times slower than sparse-ffn\n\n{report.markdown(report.peers(rows))}\n"
            yield from (_row(row) for row in rows)


def _row(row: Row) -> str:
    heading = f"**{report.GROUPS.get(row.group, row.group)}: {row.shape}, {row.dtype}, {MODES[row.mode]}**"
    return f"{heading}\n\n{report.markdown(report.contenders(row))}\n"


def _predicted() -> str:
    card = predict.H100
    return PREDICTED.format(
        compute=card.compute, operations=card.operations / 1e12, stream=card.stream, memory=card.memory / 1e12,
        launch=card.launch * 1e6, wide=f"{1 / TO_DENSE['cuda', 'moe', str(GPU_WIDE), 'fwdbwd']['bf16']:.2f}",
        fine=f"{1 / TO_DENSE['cuda', 'moe', str(GPU_FINE), 'fwdbwd']['bf16']:.2f}",
    )  # fmt: skip


def predictions() -> report.Table:
    """Of the experts, beside the dense network of equal compute."""
    header = ("T,D,E,G,k", "", "forward, TF/s", "backward, TF/s", "of dense", "of dense, in cache", "kept, MiB")
    body = []
    for shape in GPU_SHAPES:
        if shape.T < 1024:  # there the launches count, not the rates
            continue
        for glu in (False, True):
            step, baseline = predict.experts(shape, glu=glu), predict.dense(shape, glu=glu)
            forward, backward = (f"{rate / 1e12:.0f}" for rate in step.rates)
            kept = f"{predict.kept_bytes(shape, glu=glu) / 2**20:.0f}"
            best = predict.experts(shape, glu=glu, cached=True)
            ratios = [f"{s.rate / baseline.rate:.2f}" for s in (step, best)]
            body.append([str(shape), "GLU" if glu else "ReLU", forward, backward, *ratios, kept])
    return header, body


def _memory() -> str:
    return (
        f"A product-key memory's read at {GPU_MEMORY} in bf16: {predict.bag(GPU_MEMORY) * 1e3:.2f} ms predicted, not "
        "measured.\n"
    )
