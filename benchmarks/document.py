"""Writes docs/benchmarks.md, docs/benchmarks-rows.md and their pictures from the JSON of the benchmarks' last runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import gpu_page, machine, passes, plot, report
from benchmarks.results import MODES, Report, Row

INTRODUCTION = """\
# Benchmarks

This page is written by `make bench`, which runs all of it anew on your machine. No number here was typed. The
tables of [all rows](benchmarks-rows.md) have a page of their own.

## The machine

"""
ROWS = """\
# Benchmarks: all rows

This page is written by `make bench`. What the columns mean, and the machine: see [Benchmarks](benchmarks.md).
"""
BUSY = """
**The machine was busy before this run: these numbers are not to be trusted.** Run `make bench` in a quiet moment.
"""
METHOD = """\
## How it is measured

- **Checked first.** Output and all gradients (input, keys, values, router or sub-keys) of each contender are compared
  with the library's reference in float64 at the same weights. One that is wrong is reported with its error and not
  timed. Inputs whose selection is a near-tie are drawn again: there fp32 and float64 may honestly differ. A contender
  that ranks in bf16 selects other units than float64: it is checked in fp32 at the same weights, and in bf16 only
  that its output is near.
- **Paired and interleaved.** Contenders take turns in rounds, in random order. A ratio is taken within a round; shown
  are the median over the rounds and the quartiles. A slow contender takes part in fewer rounds.
- **Forward, no grad** (fwd) is evaluation under `torch.no_grad()`. **Forward + backward** (fwdbwd) is a training step
  of the layer: gradients of the input and of all parameters into fresh memory; resetting them is not timed. Balance
  losses are included, those of peers too; peers of which only the experts are used do without.
- **Kept** is the number of elements that autograd keeps for the backward pass beyond the input and the parameters,
  counted exactly. **Peak** is the highest memory during the pass above what was in use before: on a CPU the resident
  memory of the process, scratch memory of native code included; on a GPU torch's counter.
- On a GPU the device's own clock is taken (CUDA events), after overwriting its second-level cache.
- "failed", "wrong", "too large" (for half of the free memory) and "not importable" are said, never left out.

## How to reproduce

```sh
make bench                                # everything on this page
python -m benchmarks.bench_layers --help  # one part of it: --device --dtype --shapes --layers --peers --pass --seconds
python -m benchmarks.bench_cvmm --help
python -m benchmarks.sweeps --help
python -m benchmarks.passes --help
python -m benchmarks.document             # this page again, from the numbers of the last run in runs/bench
benchmarks/run_gpu.sh                     # everything on a machine with a GPU: tests, benchmarks, sweeps, tuning
```

Run it on a machine that does nothing else: sparse and dense layers use memory and caches differently, so that other
programs do not slow them down alike. Shapes are T,D,E,G,k: tokens, d_model, experts, units of an expert, selected
experts.
"""
SWEEPS = """\
## Many experts

The paper's sweeps (c) and (e) (appendix B), scaled to a CPU: k = 4 experts of 128 units, forward and backward; on a GPU
`python -m benchmarks.sweeps --device cuda` runs (a) to (e) at the paper's sizes. Its
claim is that time and memory are nearly flat in the number of experts N_E, while those of the dense network of equal
parameters grow with it.

![Time and memory against the number of experts and the width](images/bench-sweeps.png)
"""
PASSES = f"""\
## Where the time goes

The passes of a step, router and balance loss included, medians, timed inside the native core by
`python -m benchmarks.passes`. A pass's floor is its arithmetic at the rate of `torch.mm` of two matrices of
{passes.PRODUCT} x {passes.PRODUCT} in the same process, in fp32 or the layer's dtype, whichever is faster. What a pass
takes beyond its floor is the packing of gathered rows and of weights, the sums over a token's experts, the last tile of
each expert, writing the result, and waiting for memory: the rows of an expert are anywhere, and each expert's weights
are read again in every pass. With few tokens reading the weights is all there is, and the floor of arithmetic says
little. *The rest* is Python, autograd, the balance loss and, in a ProductKeyMemory, torch's products for the gradients;
each step follows other programs' steps, so that little of it is in a cache.
"""


def page(
    layers: Report,
    sweeps: Report | None,
    cards: gpu_page.Cards,
    profiles: Sequence[passes.Passes] = (),
) -> str:
    """The text of the page, without the tables of all rows."""
    parts = [INTRODUCTION + _facts(layers), "## The targets\n", report.markdown(report.targets(layers.rows)) + "\n"]
    parts.append("Of the peers of a row, the one that comes nearest is shown.\n")
    parts.append("![Times relative to the baseline](images/bench-layers.png)\n")
    parts.append("## Against each peer\n\nHow many times slower than sparse-ffn, medians.\n")
    for group, rows in layers.groups():
        if any(result.kind == "peer" for result in rows[0].results):
            parts.append(f"### {report.GROUPS[group]}\n\n{report.markdown(report.peers(rows))}\n")
    if profiles:
        parts.append(PASSES)
        parts += [f"**{found.title()}**\n\n{report.markdown(found.table())}\n" for found in profiles]
    parts += [gpu_page.section(cards), METHOD, AFTER, *_contenders(layers)]
    if sweeps is not None:
        parts += [SWEEPS, *_rows(sweeps.rows)]
    return "\n".join(parts)


def rows_page(layers: Report, cvmm: Report | None) -> str:
    """The text of the page of all rows."""
    parts = [ROWS, "## Layers\n", *_rows(layers.rows)]
    if cvmm is not None:
        parts += ["## cvmm\n", *_rows(cvmm.rows)]
    return "\n".join(parts)


GPU, AFTER = "## On a GPU\n", "## The contenders\n"


def refreshed(text: str, cards: gpu_page.Cards) -> str:
    """A page of an earlier run with the section on GPUs, and what is said of the method, written anew.

    Raises:
        ValueError: it is no such page.
    """
    method = METHOD.splitlines(keepends=True)[0]
    if method not in text or AFTER not in text:
        raise ValueError(f"not a page that this program wrote: it lacks {method!r} or {AFTER!r}")
    before = text.partition(GPU if GPU in text else method)[0]
    return f"{before}{gpu_page.section(cards)}\n{METHOD}\n{AFTER}{text.partition(AFTER)[2]}"


def _facts(layers: Report) -> str:
    lines = [["command", f"`{layers.command}`"], *([name, value] for name, value in layers.machine.items())]
    facts = report.markdown((("", ""), lines)).replace("---:", "---") + "\n"
    return facts + BUSY if machine.was_busy(layers.machine) else facts


def _contenders(layers: Report) -> Iterable[str]:
    for group, rows in layers.groups():
        yield f"**{report.GROUPS[group]}**\n"
        yield "\n".join(f"- {result.name} ({result.kind}): {result.about}" for result in rows[0].results) + "\n"


def _rows(rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        heading = f"**{report.GROUPS.get(row.group, row.group)}: {row.shape}, {row.dtype}, {MODES[row.mode]}**"
        yield f"{heading}\n\n{report.markdown(report.contenders(row))}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/bench"), help="where the JSON files are")
    arguments.add_argument("--docs", type=Path, default=Path("docs"), help="where the pages go")
    arguments.add_argument(
        "--gpu", type=Path, default=Path("benchmarks/gpu"), help="a card's folder, or one of such folders"
    )
    options = arguments.parse_args(argv)
    cards, target = gpu_page.load(options.gpu), options.docs / "benchmarks.md"
    gpu_page.draw(cards, options.docs / "images")
    reports = (options.runs / f"{name}.json" for name in ("layers", "cvmm", "sweeps"))
    found = {path.stem: Report.load(path) for path in reports if path.is_file()}
    timed = options.runs / "passes.json"
    profiles = passes.load(timed) if timed.is_file() else []
    if "layers" not in found:
        if not target.is_file():
            raise SystemExit(f"{options.runs / 'layers.json'} is missing: run make bench")
        target.write_text(refreshed(target.read_text(), cards))
        print(f"no {options.runs / 'layers.json'}: the numbers of the CPU in {target} are left as they were")
        return
    target.write_text(page(found["layers"], found.get("sweeps"), cards, profiles))
    (options.docs / "benchmarks-rows.md").write_text(rows_page(found["layers"], found.get("cvmm")))
    plot.ratios(found["layers"], options.docs / "images" / "bench-layers.png")
    if "sweeps" in found:
        plot.growth(found["sweeps"], options.docs / "images" / "bench-sweeps.png")


if __name__ == "__main__":
    main()
