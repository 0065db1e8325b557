"""What the documentation says of GPUs: whether anything was measured, and what the peak rates allow."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import predict
from benchmarks.measuring import report
from benchmarks.measuring.records import Result
from benchmarks.pages.bars import TO_DENSE
from benchmarks.pages.machines import Machine
from benchmarks.shapes import GPU_FINE, GPU_MEMORY, GPU_SHAPES, GPU_WIDE

NOTHING = """\
## On a GPU

**No GPU was at hand.** There are kernels in Triton and CUDA, tested in emulators, and none of them has been timed: we
claim no speed on a GPU. One command proves and measures all of this in three calls of nine minutes; see its `--help`.

```sh
benchmarks/fetch_gpu_peers.sh                        # first, with a network: the peers
benchmarks/run_gpu.sh tests                          # then bench, and tune
python -m benchmarks.publish runs/gpu/<card>-<code>  # adds the card to these pages
```
"""
MEASURED = """\
## On a GPU

Measured by `benchmarks/run_gpu.sh`. Times are the device's own (CUDA events), of a call that was captured in a CUDA
graph and is replayed. Before each the second-level cache is overwritten. A contender that waits for the device within a
call cannot be captured. It is timed as it runs, waits included; the device is kept busy for about two milliseconds
before, which hides its launching up to the first wait. `python -m benchmarks.rows` says of each which of the two it is.

Without a graph a call takes at least as long as the host needs to launch it. Milliseconds of the device, and of the
host until a call returns:
"""
PREDICTED = """\
## Predicted for a GPU, not measured

The table says what rates near an H100's best allow in bf16 (`benchmarks/predict.py`). Each kernel takes its operations
at {compute:.0%} of {operations:.0f} TF/s or its bytes at {stream:.0%} of {memory:.1f} TB/s, whichever is longer, and
{launch:.0f} µs. For another library's kernels, tuned for this card (Liger-Kernel, pull request 1294), the same model
predicts the forward rate that is reported there, and 1.2 times that of both passes. So these are hopes rather than
forecasts. "Of dense" is the rate of both passes over that of the dense FFN of equal arithmetic, predicted likewise. "In
cache" is what it would be if rows that are gathered or handed from kernel to kernel never left the second-level cache.
"Whole layer" counts the router, too, and the blocks of columns that this card gets, which stay in its cache, and reads
gathered rows from memory once; `python -m benchmarks.predict` prints what each decision of the design changes in it.
"Kept" is for the backward pass, with x. The targets with ReLU are {wide} for the first shape and {fine} for the second.
"""


def section(cards: Sequence[Machine]) -> str:
    """What stands before the tables of cards, or in their place."""
    return f"{MEASURED}\n{report.markdown(hosts(cards))}\n" if cards else NOTHING


def hosts(cards: Sequence[Machine]) -> report.Table:
    """The device's and the host's time of our layers and of the network that a row is compared with."""
    header = ("card", "", "shape", "dtype", "pass", "device", "host", "by", "dense: device", "host")
    body = []
    for card in cards:
        for row in card.rows():
            (ours, name), dense = (row.results[0], report.GROUPS[row.group]), row.of(row.baseline)
            if ours.host is not None:
                cells = [*_times(ours), ours.clock, *_times(dense)]
                body.append([card.title, name.partition(" (")[0], row.shape, row.dtype, row.mode, *cells])
    return header, body


def _times(result: Result) -> list[str]:
    return ["-" if q is None else report.digits(q.median * 1e3) for q in (result.seconds, result.host)]


def predicted() -> str:
    """The section of predictions."""
    milliseconds = f"{predict.bag(GPU_MEMORY) * 1e3:.2f} ms"
    memory = f"Predicted for the read of a product-key memory of {GPU_MEMORY} in bf16: {milliseconds}.\n"
    return f"{_predicted()}\n{report.markdown(predictions())}\n\n{memory}"


def _predicted() -> str:
    card = predict.H100
    return PREDICTED.format(
        compute=card.compute, operations=card.operations / 1e12, stream=card.stream, memory=card.memory / 1e12,
        launch=card.launch * 1e6, wide=f"{1 / TO_DENSE['cuda', 'moe', str(GPU_WIDE), 'fwdbwd']['bf16']:.2f}",
        fine=f"{1 / TO_DENSE['cuda', 'moe', str(GPU_FINE), 'fwdbwd']['bf16']:.2f}",
    )  # fmt: skip


def predictions() -> report.Table:
    """Of the experts, beside the dense network of equal compute."""
    rates, ratios = ("forward, TF/s", "backward, TF/s"), ("of dense", "of dense, in cache", "of dense, whole layer")
    header = ("T,D,E,G,k", "", *rates, *ratios, "kept, MiB")
    body = []
    for shape in GPU_SHAPES:
        if shape.T < 1024:  # there the launches count, not the rates
            continue
        for glu in (False, True):
            step, baseline = predict.experts(shape, glu=glu), predict.dense(shape, glu=glu)
            forward, backward = (f"{rate / 1e12:.0f}" for rate in step.rates)
            kept = f"{predict.kept_bytes(shape, glu=glu) / 2**20:.0f}"
            best = predict.experts(shape, glu=glu, cached=True)
            whole = predict.layer(shape, glu=glu)
            found = [f"{s.rate / baseline.rate:.2f}" for s in (step, best, whole)]
            body.append([str(shape), "GLU" if glu else "ReLU", forward, backward, *found, kept])
    return header, body
