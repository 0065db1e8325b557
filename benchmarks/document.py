"""Writes the documentation's pages, README table and pictures of measured numbers, from each machine's JSON."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import targets
from benchmarks.measuring.report import markdown
from benchmarks.pages import comparison, gpu_page, machines
from benchmarks.pages.machines import PUBLISHED, Machine
from benchmarks.shapes import LARGE, PERCENTS

INTRODUCTION = """\
# Benchmarks

Is it faster for you? Look for the machine and the shape that are nearest to yours, or run `make bench`. Every number
on this page was written by `python -m benchmarks.document` from the JSON in `benchmarks/results`.

![Time of a training step relative to the dense FFN of equal parameters](images/result-light.svg#only-light)
![Time of a training step relative to the dense FFN of equal parameters](images/result-dark.svg#only-dark)

With enough tokens a mixture of experts takes a fraction of the time of the dense FFN that it replaces. A dense FFN of
equal arithmetic, which has far fewer parameters, can be faster: the second table says where. All are of one dtype here.
Without 16-bit instructions bf16 is slower than fp32, and a dense FFN in bf16 no measure; the README's table takes the
faster of both. Where a dense FFN of equal arithmetic is slower in fp32, it is torch's product that is slow.
"""
BUSY = "**{} was busy before this run. Do not trust its numbers.**\n"
REPLACED = """\
## Against the dense FFN that it replaces

Our time relative to a dense FFN with as many parameters: of a training step / of a forward pass without gradients.
0.25 is four times faster. "2048 tokens of 512, 4 of 16 experts of 128" has d_model = 512, k = 4, E = 16 and G = 128.
"""
COMPUTED = """\
## Against a dense FFN of equal arithmetic

Our time relative to a dense FFN that has only the k·G units that a token uses: of a training step / of a forward pass.
This is what sparsity costs: routing, gathering rows, and reading every expert's weights. Above 1 we are slower.
"""
PEERS = """\
## Against other implementations

How many times longer their training step takes, the least and the most over the shapes above (on GPUs of libraries that
tune themselves at every shape: over the first shape, in bf16, with a tenth of the time that they give each trial, and
Liger's without its trials). Where some shapes were not timed, the count says of how many it is; the rows say why. The
experts of transformers are gated (SiLU), the others use ReLU. `python -m benchmarks.rows --contenders` says more.
"""
OLD_LOOP = """\
**The per-expert loop was a slower one** where no commit is named above: autograd made a gradient of a whole stack for
each expert, which the loop of now does not pay for. Of that one no machine has been published yet.
"""
TOPK = """\
## TopKFFN

Its time relative to the dense FFN of 1536 units that it replaces: of a training step / of a forward pass. It keeps 10%
of the units here; [from 1% to all](benchmarks-targets.md#topkffn-from-1-to-all-units) is on another page.
"""
KEPT = """\
## Memory of a training step

Millions of numbers that autograd keeps for the backward pass, beyond the input and the parameters.
"""
EXPERTS = """\
## Many experts

Milliseconds of a training step with d_model 512 and k = 4 experts of 128 units, beside the dense FFN of as many
parameters (a CPU: 4096 tokens, fp32; a GPU: 32768 tokens, bf16). The paper (appendix B) claims that the time of a
mixture is nearly flat.
"""
METHOD = """\
## How it is measured

- **Checked first.** Output and all gradients of each contender are compared with the reference in float64 at the same
  weights, on inputs without near-ties; what is wrong is reported and not timed. In bf16 a `TopKFFN` or a memory may
  select other units: there a copy in fp32 is compared so, and of the layer itself the output alone, widely (70%).
  st-moe-pytorch is compared in fp32, on 64 tokens for which it has room; transformers' batched_mm on 64 tokens.
- **Routing.** Routers are new and inputs random, so that loads are nearly even. Trained routers load some experts more.
- **In turns.** Contenders take turns in random order. Each ratio is taken within a round, and its median is shown. What
  takes long has few rounds. What takes longer than its share of the time, as the dense FFN of equal parameters often
  does, is called once, cold, before the rounds, and its ratio is to our call of the first round: not a pair.
- **Warm.** A call of less than 2 ms is repeated, after one that is not timed: weights that fit are read from caches. In
  a model other layers may have taken their place: [cold](benchmarks-targets.md#steps-and-their-floors), few tokens take
  several times as long and the ratios are others.
- **Training step** is forward and backward, with the balance loss and new gradients. **Forward** is without gradients.
- A contender that fails, is wrong, or needs more than half of the free memory is named as such and never left out.

## On your machine

```sh
make bench                                      # on a machine that does nothing else
python -m benchmarks.rows --results runs/bench  # all rows: quartiles, memory, errors
python -m benchmarks.rows --machine intel       # all rows of a published machine
python -m benchmarks.publish                    # adds the run to these pages
```

[Targets and passes](benchmarks-targets.md) is a page for developers.
"""
TARGETS = """\
# Targets and passes

This page is for developers. It is written by `python -m benchmarks.document`; [Benchmarks](benchmarks.md) says what
was measured and how. Shapes are T,D,E,G,k: tokens, d_model, experts, units of an expert, selected experts.

## Targets

Of the peers of a row the tables show the one that comes nearest, of the shares of a TopKFFN the worst. A target that
was missed has the number of its reason below the table. "No AMX here": it is a target of processors with matrix units;
on others a training step in bf16 and a pass of a few tokens are held to 1.05 times what was published before, which
tells only whether the core became slower. "Set by this run": the bar is from this very measurement, and tells nothing.
`python -m benchmarks.targets` prints the same of a run of your own.
"""
SWEEP = """\
## TopKFFN: from 1% to all units

Its time relative to the dense FFN that it replaces, which has 1536 units: of a training step / of a forward pass.
"""
PASSES = """\
## Steps and their floors

Milliseconds of a step of the CPU core, router and balance loss included. The floor is the arithmetic of the step at
the rate of `torch.mm` in the same process, in fp32 or the layer's dtype, whichever is faster. Beyond the floor a step
packs gathered rows and weights, adds up a token's experts, computes the last tile of each expert, and waits for memory.
Decoding reads weights most of the time. Where the rate of reading was measured, it stands beside that of `torch.sum`
over as many bytes, and the floor is the longer of both; where not, the floor says little. Of one token both rates are
those of short, cold calls: a step may be below such a floor.
`python -m benchmarks.rows --part passes` prints every pass of every step.
"""
FEW = (10,)  # percent of the units of a TopKFFN
BEGIN, END = "<!-- written by python -m benchmarks.document -->", "<!-- end of what it wrote -->"


def page(found: Sequence[Machine]) -> str:
    """The page for readers: processors side by side, then graphics cards."""
    cpus, cards = ([m for m in found if m.device == device] for device in ("cpu", "cuda"))
    of_cards = (f"#{text}" for text in _sections(cards))  # a level deeper
    return "\n".join([INTRODUCTION, *_sections(cpus), gpu_page.section(cards), *of_cards, METHOD])


def _sections(found: Sequence[Machine]) -> Iterator[str]:
    """Each begins with its heading; none without machines."""
    if not found:
        return
    said = comparison.instructions(found)
    busy = "".join(f"\n{BUSY.format(m.title)}" for m in found if m.busy)
    facts = markdown(comparison.facts(found)).replace("---:", "---")  # words, to the left
    yield f"## The machines\n\n{facts}\n{busy}"
    yield f"{REPLACED}\n{said}\n\n{markdown(comparison.replaced(found))}\n"
    yield f"{COMPUTED}\n{said}\n\n{markdown(comparison.computed(found))}\n"
    old = f"{OLD_LOOP}\n" if any("sparse-ffn" not in m.facts for m in found) else ""
    yield f"{PEERS}\n{old}{said}\n\n{markdown(comparison.peers(found))}\n"
    if any(m.rows("topk") for m in found):
        yield f"{TOPK}\n{said}\n\n{markdown(comparison.topk(found, FEW))}\n"
    yield f"{KEPT}\n{markdown(comparison.kept(found))}\n"


def targets_page(found: Sequence[Machine]) -> str:
    """The page for developers."""
    parts = [TARGETS, *map(_judged, found)]
    cpus = [m for m in found if m.device == "cpu"]
    if any(m.rows("topk") for m in cpus):
        parts.append(f"{SWEEP}\n{comparison.instructions(cpus)}\n\n{markdown(comparison.topk(cpus, PERCENTS))}\n")
    if any(row.group == "experts" for m in found for row in m.rows("sweeps")):
        parts.append(f"{EXPERTS}\n{markdown(comparison.experts(found))}\n")
    profiled = [m for m in found if m.profiles]
    parts += [PASSES] if profiled else []
    parts += [
        f"**{m.name}** (16-bit instructions: {m.instructions})\n\n{markdown(comparison.steps(m))}\n" for m in profiled
    ]
    return "\n".join([*parts, gpu_page.predicted()])


def _judged(m: Machine) -> str:
    """The targets of one machine, and why it missed some."""
    found = targets.of_machine(m)
    table, reasons = targets.table(found, m.facts)
    head = f"**{m.name}** (16-bit instructions: {m.instructions}): {targets.counted(found)}."
    why = "".join(f"{i}. {reason.why} `{reason.command}`\n" for i, reason in enumerate(reasons, 1))
    return "\n\n".join(filter(None, (head, markdown(table), why.rstrip()))) + "\n"


def readme(text: str, found: Sequence[Machine]) -> str:
    """The README with its table written anew."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    cpus = [m for m in found if m.device == "cpu"]
    table = markdown(comparison.first_screen(cpus, LARGE))
    return f"{before}{BEGIN}\n{table}\n\n{comparison.instructions(cpus)}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    add = arguments.add_argument
    add("--results", nargs="+", type=Path, default=[PUBLISHED], help="folders of machines; default: the published ones")
    add("--docs", type=Path, default=Path("docs"), help="where the pages go; the README is looked for beside it")
    options = arguments.parse_args(argv)
    from benchmarks.pages import pictures  # it needs matplotlib, the texts do not

    found = machines.load(options.results)
    if not found:
        raise SystemExit(f"no machine's folder in {', '.join(map(str, options.results))}: run make bench")
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.docs / "benchmarks.md").write_text(page(found))
    (options.docs / "benchmarks-targets.md").write_text(targets_page(found))
    front = options.docs.parent / "README.md"
    if front.is_file() and BEGIN in front.read_text():
        front.write_text(readme(front.read_text(), found))
    pictures.draw(found, options.docs / "images")


if __name__ == "__main__":
    main()
