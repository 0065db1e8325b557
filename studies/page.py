"""Writes docs/evidence.md, its pictures and the README's headline from the results of the runs that have finished."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Any

from benchmarks.measuring.report import markdown

from . import headline, paper, picture, plan
from .reasons import reasons
from .results import EMULATED, RESULTS, STOPPED, Record, emulated, load, load_all
from .sizes import SIZES
from .statistics import ERRORS, LEAST_FREEDOM, Noise, noise, once_in
from .tables import beside_the_paper, bits_of, chosen, comparison, course, spread, verdicts
from .variants import BOUND, DENSE, SIGMA, VARIANTS

INTRODUCTION = """\
# Evidence

Does a model learn as well with a sparse layer as with a dense FFN of as many parameters? This page is written by
`python -m studies.page` from the results of `python -m studies.enwik8`, which are in `studies/results`. No result here
was typed but the paper's, which are marked so.
"""
METHOD = f"""\
## How it is done

- **Text.** enwik8, bytes: 90 MB for training, 5 MB for validation, 5 MB for the test, as in the paper. Windows of the
  training text are drawn at random. Learning curves are of {{windows}} windows of the validation text, the same each
  time; the tables' bits per byte are of the whole test text, cut into windows that start without context.
- **Model.** The demo's transformer: pre-LN, rotary positions, every FFN replaced. bfloat16 autocast: a processor
  without instructions for it multiplies the rounded operands in fp32, and rounds the result. No dropout at sizes S
  and M, whose runs see less text than there is; size L has the paper's. Adam, a warm-up, then a cosine to 0.
- **Equal parameters.** [`parameter_equal`](parameter-equal.md) gives each layer the parameters of the dense FFN.
- **Same start, order and rate.** For one seed all layers start from the same weights outside the FFNs and see the
  same windows in the same order. One learning rate serves all layers of size S: that of the lowest sum of dense's and
  SigmaMoE's validation bits per byte at seed 0. The rate's trials are also both layers' runs of seed 0 at this size:
  chosen for low bits, they may favour these two layers a little over the others. At size M, twice as wide, the rate is
  half of that. Other layers were not asked, and may want another. Size L has the paper's, and a fifth of its steps.
- **Differences** are paired by seed; ± is their standard error. Chance is taken to be as large in all runs of a size,
  and is what the layers' and the seeds' own shares leave of all its results (least squares). A difference within
  {ERRORS} standard errors is called none. All differences from dense share dense's runs, so that they err together.
  An interval of that width misses the true mean once in {once_in(4)} times where the error has 4 degrees of freedom,
  once in {once_in(10)} with 10, once in {once_in(40)} with 40: in a table of many rows, some verdicts are chance. Of
  fewer than {LEAST_FREEDOM} no error is told, and nothing called.
- **FLOPs** of training count the forward pass thrice, routers included. **Time** is what the processor computes in
  training steps, without waiting for a core, or wall-clock time where a GPU computes. Evaluation is left out, and so
  are processors without instructions for bfloat16, where it costs more than fp32 would.
- **Layers.** SigmaMoE has the entropy loss and the sizes that the table of sizes gives, SoftmaxMoE too: it differs in
  its gates only. SwitchMoE has experts of k times the size, of which one is used. SBaseMoE and NoisyTopKMoE have
  SigmaMoE's sizes. All else is the layers' own default: dense and TopKFFN have biases and the others none, as in the
  paper, and each has its own initialisation, as in the paper too but for SwitchMoE: its keys start 3.2 and its values
  1.6 times as large as there. A mixture's outputs start smaller than dense's, for a part of the units makes them, and
  smallest where gates share out one (SoftmaxMoE, NoisyTopKMoE).

## What differs from the paper

Its Enwik8 model is a Transformer-XL of 41M parameters, which sees 1.6 GB of text in segments of 512 bytes and remembers
earlier ones. Its SigmaMoE uses 4 experts of 128 units for a token, 512 units in all, and it found that experts of fewer
than 128 units usually hurt, and fewer than 256 to 512 units for a token. Experts are smaller at sizes S and M, and at
size S a token has fewer units. Its Enwik8 mixtures have an expert dropout of 0.05 and a tenth of the weight of the
entropy loss that sizes S and M have, which have no expert dropout and the weight of its WikiText-103 models in its
Table 3; those of its Tables 4 and 10 had a tenth of that, by all signs. Those models read sub-words. Its
ProductKeyMemory read all values; its Switch loss was weaker than its Eq. 17, the regulariser of its renormalised
softmax did not see all logits, and its Sinkhorn iteration did not balance: see [the research
code](reference-code.md). Its numbers are of single runs. So only directions and orders can be compared.
"""
REPRODUCE = """\
## How to reproduce

```sh
python -m studies.enwik8 --plan         # what is left, and how long that takes here
nice python -m studies.enwik8 --jobs 2  # run it; stopped at any time, it goes on next time
python -m studies.page                  # this page again
```

A run that was stopped goes on from its last checkpoint to the same numbers, if the source of the layers and of the
training is the same, and the processor, the backend, the versions of torch and Triton, and the number of threads; else
it starts anew. Finished runs are not run again unless their file is deleted. Those of dense and SigmaMoE of seed 0 at
size S are copies of trials in `learning-rate`, which come back unless those are deleted too. On another processor or
with another number of threads the last digits differ.
"""


def page(
    records: Mapping[str, Sequence[Record]],
    trials: Sequence[Record],
    twice: Sequence[Record],
    stopped: Sequence[Record] = (),
) -> str:
    """The text; `records` by size, `twice` those that were made again, `stopped` those given up."""
    parts = [INTRODUCTION, missing(records)]
    if any(records.values()):
        parts += [trained(records)]
    for size, found in records.items():
        if found:
            parts += [f"## Size {size}\n", *layers(found), *units(found), *ablations(found)]
    if any(records.values()):
        parts += [reasons(records), "## Curves\n", *pictures(records), METHOD.format(windows=_windows(records))]
    if trials:
        parts += [learning_rates(trials, noise(bits_of(records[plan.TUNED_AT])))]
    if stopped:
        parts += [given_up(stopped)]
    if any(records.values()):
        runs = [record for found in records.values() for record in found]
        parts += [machines([*runs, *(trial for trial in trials if trial not in runs)])]
        parts += [rounded(runs, twice)]
    return "\n".join([*parts, REPRODUCE])


def missing(records: Mapping[str, Sequence[Record]]) -> str:
    """What there are no results of yet: nothing, or which layers and seeds of each size."""
    lines = []
    for size, found in records.items():
        finished = {(record["variant"], record["seed"]) for record in found}
        runs = plan.runs_of(size)
        left = [run for run in runs if (run.variant, run.seed) not in finished]
        if not left:
            lines.append(f"- Size {size} is complete: {len(runs)} runs.")
        elif SIZES[size].needs_gpu and not found:
            lines.append(f"- Size {size}, the paper's model, needs a GPU: none of its {len(runs)} runs has been made.")
        elif not found:
            lines.append(f"- Size {size}: none of its {len(runs)} runs has finished.")
        else:
            seeds: dict[str, list[str]] = {}
            for run in left:
                seeds.setdefault(run.variant, []).append(str(run.seed))
            text = "; ".join(f"{VARIANTS[name].label} (seed {', '.join(which)})" for name, which in seeds.items())
            lines.append(f"- Size {size}: **{len(left)} of {len(runs)} runs missing**: {text}.")
    return "\n".join(["## What there is\n", *lines]) + "\n"


def trained(records: Mapping[str, Sequence[Record]]) -> str:
    """The sizes, as they were trained."""
    rows = []
    for size, found in records.items():
        for record in found[:1]:
            config = record["config"]
            rows.append(
                [
                    size,
                    str(config["d_model"]),
                    str(config["n_layers"]),
                    str(config["d_ff"]),
                    _span([r["parameters"] for r in found if r["variant"] != "dense-equal-flops"]),
                    f"{config['steps'] * config['batch_size'] * config['context'] / 1e6:.0f} MB",
                    f"{config['batch_size']} x {config['context']}",
                    " / ".join(f"{rate:g}" for rate in sorted({r["config"]["learning_rate"] for r in found})),
                    f"{config['experts_k']} of {config['n_experts']} x {config['expert_size']}",
                    f"{config['balance_weight']:g}",
                    f"{config['expert_dropout']:g}",
                    f"{config['pkm_heads']} x {config['pkm_k']}",
                ]
            )
    header = ["size", "d_model", "layers", "dense d_ff", "parameters", "text of a run", "batch, bytes", "learning rate"]
    header += ["SigmaMoE's experts", "weight of its loss", "its expert dropout", "ProductKeyMemory's heads x k"]
    return markdown((header, rows)) + "\n"


def _span(counts: Sequence[int]) -> str:
    low, high = (f"{count / 1e6:.2f}" for count in (min(counts), max(counts)))
    return f"{low}M" if low == high else f"{low}M to {high}M"


def layers(records: Sequence[Record]) -> Iterator[str]:
    """The layers against dense, then the order beside the paper's."""
    names = [name for name, variant in VARIANTS.items() if not variant.ablation]
    yield from verdicts(records, [name for name in names if name != BOUND], DENSE)
    yield "\nTest bits per byte, the mean over a layer's own seeds; lower is better."
    if len({frozenset(of) for of in bits_of(records).values()}) > 1:
        yield "Where layers have unlike seeds, only the differences compare them: they are of the seeds that both have."
    yield f"{spread(records)}\n"
    yield comparison(records, names, DENSE, paper.LAYERS)
    yield from beside_the_paper(records, names, DENSE, paper.LAYERS)
    yield course(records, names, DENSE)
    yield chosen(records)


def units(records: Sequence[Record]) -> Iterator[str]:
    """What dense FFNs use of their units, in the paper the sign that sparse layers can stand for them."""
    counts = [record["active_units"] for record in records if record["variant"] == DENSE and record.get("active_units")]
    if counts:
        config = records[0]["config"]
        of_layers = ", ".join(f"{mean(layer):.0f}" for layer in zip(*counts, strict=True))
        computed = config["experts_k"] * config["expert_size"]
        yield (
            f"Of its {config['d_ff']} hidden units the dense FFN uses for a byte, from the first layer to the last: "
            f"{of_layers} ({_counted(len(counts), 'seed')}). SigmaMoE computes {computed}. In the paper's models fewer "
            "than 15% are in use on Enwik8, depending much on the layer, and fewer than 10% on WikiText-103.\n"
        )


def _counted(n: int, noun: str) -> str:
    return f"one {noun}" if n == 1 else f"{n} {noun}s"


def ablations(records: Sequence[Record]) -> Iterator[str]:
    """SigmaMoE with one thing changed, against SigmaMoE."""
    names = [name for name, variant in VARIANTS.items() if variant.ablation]
    if any(record["variant"] in names for record in records):
        yield "### SigmaMoE with one thing changed\n"
        yield comparison(records, [SIGMA, *names], SIGMA, paper.ABLATIONS)
        yield from beside_the_paper(records, [SIGMA, *names], SIGMA, paper.ABLATIONS)


def pictures(records: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    """The links to what `picture.draw` makes."""
    drawn = {size: picture.of_shared_seeds(found) for size, found in records.items() if found}
    said = [f"Size {size} is not drawn: no seed has whole runs of all its layers." for size in drawn if not drawn[size]]
    if not any(drawn.values()):
        yield " ".join(said) + "\n"
        return
    what = "The last part of the runs; means over the seeds that all layers of a picture have."
    yield " ".join([what, *said]) + "\n"
    yield f"![Validation bits per byte against bytes](images/{picture.BYTES})\n"
    yield f"![Validation bits per byte against FLOPs and CPU time](images/{picture.COSTS})\n"


def _windows(records: Mapping[str, Sequence[Record]]) -> str:
    numbers = {record["config"]["eval_windows"] for found in records.values() for record in found}
    return " or ".join(str(number) for number in sorted(numbers))


def learning_rates(trials: Sequence[Record], chance: Noise | None) -> str:
    """Validation bits per byte of the trials."""
    rows = []
    for rate in plan.LEARNING_RATES:
        row = [f"{rate:g}"]
        for variant in (DENSE, SIGMA):
            found = [r for r in trials if r["variant"] == variant and r["config"]["learning_rate"] == rate]
            row.append(_valid(found[0]) if found else "not yet")
        rows.append(row)
    header = ["learning rate", *(VARIANTS[variant].label for variant in (DENSE, SIGMA))]
    what = f"Validation bits per byte at size {plan.TUNED_AT}, seed 0, after whole runs."
    return f"## The learning rate\n\n{what}\n\n{markdown((header, rows))}\n\n{_chosen(trials, chance)}"


def _chosen(trials: Sequence[Record], chance: Noise | None) -> str:
    """Which it is, and whether each of the two and a wider choice would have agreed."""
    best = {}
    for variant in (DENSE, SIGMA):
        found = [r for r in trials if r["variant"] == variant and not r["diverged"]]
        if len(found) < len(plan.LEARNING_RATES):
            return ""
        best[variant] = min(found, key=lambda r: r["bits_per_byte"]["valid"])["config"]["learning_rate"]
    sums = {
        rate: sum(r["bits_per_byte"]["valid"] for r in trials if r["config"]["learning_rate"] == rate)
        for rate in plan.LEARNING_RATES
    }
    chosen = min(sums, key=lambda rate: sums[rate])
    own = ", ".join(f"{VARIANTS[variant].label} alone would have {rate:g}" for variant, rate in best.items())
    way = {min(sums): "low", max(sums): "high"}.get(chosen)
    wider = f" It is the {way}est of the three that were tried: a {way}er one may be better still." if way else ""
    first, second = sorted(sums.values())[:2]
    near = f" The next sum is {second - first:.4f} above"
    if chance:
        near += f", where chance alone gives such a difference a standard deviation of about {2 * chance.deviation:.3f}"
    return fill(f"The lowest sum is that of {chosen:g}; {own}.{near}.{wider}", 118) + "\n"


def given_up(stopped: Sequence[Record]) -> str:
    """Why size M has another learning rate: runs that had that of size S."""
    rate = stopped[0]["learning_rate"]
    curves = {
        record["variant"]: dict(zip(record["curve"]["bytes"], record["curve"]["bits_per_byte"], strict=True))
        for record in stopped
    }
    points = sorted({done for curve in curves.values() for done in curve})
    rows = [
        [f"{done / 1e6:.1f} MB", *(f"{curve[done]:.4f}" if done in curve else "" for curve in curves.values())]
        for done in points
    ]
    return (
        f"Size M began with {rate:g} too. These two runs, of seed 0, were given up, since SigmaMoE's validation bits\n"
        "per byte rose while the rate was near its highest:\n\n"
        f"{markdown((['text', *(VARIANTS[variant].label for variant in curves)], rows))}\n\n"
        "Adam's steps add up over a unit's inputs, so that the best rate falls with the width\n"
        "([2203.03466](https://arxiv.org/abs/2203.03466)). Size M, twice as wide as size S, has half of its rate\n"
        "for all layers, with no trials of its own. Dense fell as long as it ran, and what it would have reached with\n"
        "the higher rate is not known: that all have the lower one may favour SigmaMoE.\n"
    )


def _valid(record: Record) -> str:
    return "diverged" if record["diverged"] else f"{record['bits_per_byte']['valid']:.4f}"


def machines(records: Sequence[Record]) -> str:
    """Where the runs were made, and with what."""

    def facts(record: Record) -> tuple[str, ...]:
        machine: dict[str, Any] = record["machine"]
        named = (machine[key] for key in ("processor", "CPU core", "torch", "sparse-ffn", "commit"))
        return (machine.get("GPU", "none"), str(record["threads"]), *named)

    counts = Counter(facts(record) for record in records)
    header = ["GPU", "threads", "processor", "CPU core", "torch", "sparse-ffn", "commit", "runs"]
    several = len({key[0] + key[2] + key[3] for key in counts}) > 1
    mixed = "\nA seed's runs may be of several of these, which order their sums in other ways.\n"
    table = markdown((header, [[*key, str(n)] for key, n in counts.most_common()]))
    return f"## The machines\n\n{table}\n{mixed if several else ''}"


def rounded(records: Sequence[Record], twice: Sequence[Record]) -> str:
    """Which runs of the tables are of a processor that multiplies rounded operands in fp32, and what that changes.

    `twice` are those of such a processor that another made again.
    """

    def bits(found: Sequence[Record], of: str) -> dict[tuple[str, str, int], float]:
        whole = (record for record in found if not record["diverged"])
        return {(r["size"], r["variant"], r["seed"]): r["bits_per_byte"][of] for r in whole}

    said = []
    if own := [f"{_label(r)} (size {r['size']}, seed {r['seed']})" for r in records if emulated(r)]:
        said += [f"Of the runs in the tables, {len(own)} are of a processor that multiplies rounded operands in fp32:"]
        said += [f"{', '.join(own)}."]
    changed = {}
    for of in ("test", "valid"):
        here, there = bits(records, of), bits(twice, of)
        changed[of] = [there[run] - here[run] for run in sorted(there.keys() & here.keys())]
    if test := changed["test"]:
        error = f" ± {stdev(test) / math.sqrt(len(test)):.4f}" if len(test) > 1 else ""
        furthest = max(map(abs, changed["valid"]))
        said += [f"{_counted(len(test), 'other run').capitalize()} of such a processor were made again by another that"]
        said += ["has such instructions, which are the ones in the tables: the first had"]
        said += [f"{mean(test):+.4f}{error} test bits per byte more, and validation bits that were up to"]
        said += [f"{furthest:.4f} away."]
    return fill(" ".join(said), 118) + "\n" if said else ""


def _label(record: Record) -> str:
    return VARIANTS[record["variant"]].label


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(prog="python -m studies.page", description=__doc__)
    arguments.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    arguments.add_argument("--docs", type=Path, default=Path("docs"), help="where the page goes (default: docs)")
    arguments.add_argument("--readme", type=Path, default=Path("README.md"), help="its headline (default: README.md)")
    options = arguments.parse_args(argv)
    records = {size: load_all(run.path(options.results) for run in plan.runs_of(size)) for size in SIZES}
    trials = load_all(run.path(options.results) for rate in plan.LEARNING_RATES for run in plan.trials(rate))
    target = options.docs / "evidence.md"
    twice = [
        record
        for size in SIZES
        for record in load_all(run.path(options.results / EMULATED) for run in plan.runs_of(size))
    ]
    stopped = [record for path in sorted((options.results / STOPPED).glob("*.json")) if (record := load(path))]
    target.write_text(page(records, trials, twice, stopped))
    picture.draw(records, options.docs / "images")
    options.readme.write_text(headline.written(options.readme.read_text(), records))
    print(f"written: {target} and {options.readme}, from {sum(map(len, records.values()))} finished runs")


if __name__ == "__main__":
    main()
