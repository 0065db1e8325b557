"""Why results may be other than the paper's: each reason, with what was seen where it was tested."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill

from .results import Record
from .sizes import CORE
from .statistics import Difference, noise, paired
from .tables import bits_of, diverged_of, other_runs, risen
from .variants import BOUND, DENSE, SIGMA, VARIANTS

CHANGES = ("sigma-2", "sigma-8", "sigma-k8", "sigma-k2", "sigma-k1", "sigma-no-balance", "sigma-expert-dropout")
"""SigmaMoE with that changed which a reason names."""


def reasons(records: Mapping[str, Sequence[Record]]) -> str:
    """A section of the page."""
    found = [*_tested(records), *_by_size(records), *UNTESTED]
    bullets = (fill(f"- {text}", 118, subsequent_indent="  ", break_on_hyphens=False) for text in found)
    return "\n".join([INTRODUCTION, *bullets]) + "\n"


INTRODUCTION = """\
## Why results may be other than the paper's

What could be tested by changing one thing comes first, with what was seen. What is not said to be tested was not.
"""
UNTESTED = (
    "**Chance.** The paper's results are single runs, told to 0.01 bits: theirs may be what is other.",
    "**The learning rate.** All layers of a size have one. At size S dense and SigmaMoE were asked for it, as told "
    "below; the others may want another, and at size M all may.",
    "**Other code.** The paper's SwitchMoE starts smaller and has a weaker loss, its Sinkhorn iteration did not "
    "balance (SBaseMoE), and its ProductKeyMemory read all values ([the research code](reference-code.md)).",
)


def _tested(records: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    """By the first size that has all of the tests."""
    needed = {SIGMA, DENSE, "topk-16", "topk-4", *CHANGES}
    size, found = next(((size, of) for size, of in records.items() if needed <= bits_of(of).keys()), ("", ()))
    if not found:
        return
    bits, diverged = bits_of(found), diverged_of(found)
    chance = noise(bits)

    def of(name: str, base: str) -> str:
        difference = paired(bits[name], bits[base], chance)
        return f"{difference}, called {'diverged' if name in diverged else difference.verdict}" if difference else "–"

    def means(*names: str) -> str:
        differences = (paired(bits[name], bits[DENSE], chance) for name in names)
        return ", ".join(f"{difference.mean:+.4f}" if difference else "–" for difference in differences)

    def from_sigma(name: str) -> float:
        difference = paired(bits[name], bits[SIGMA], chance)
        return difference.mean if difference else math.inf

    config = found[0]["config"]
    units, block, d_ff = config["experts_k"] * config["expert_size"], config["expert_size"], config["d_ff"]
    yield (
        f"**A token uses few units.** The paper warns of fewer than 256 to 512. Differences from dense at size {size} "
        f"(their errors are in its tables), of SigmaMoE with {units // 2}, {units} and {2 * units} units for a token: "
        f"{means('sigma-8', SIGMA, 'sigma-2')}; of TopKFFN with {d_ff // 16} and {d_ff // 4}: "
        f"{means('topk-16', 'topk-4')}."
    )
    yield (
        f"**Experts are small.** The paper warns of fewer than 128 units. With experts of {block // 2}, {block}, "
        f"{2 * block} and {4 * block} units, and {units} for a token: "
        f"{means('sigma-k8', SIGMA, 'sigma-k2', 'sigma-k1')}."
    )
    yield (
        "**Regularisation.** The entropy loss weighs ten times what it does in the paper's Enwik8 models, which have "
        f"an expert dropout of 0.05 too. From SigmaMoE, without that loss: {of('sigma-no-balance', SIGMA)}; with that "
        f"dropout: {of('sigma-expert-dropout', SIGMA)}."
    )
    lowest = min(CHANGES, key=from_sigma)
    yield (
        f"The lowest of these {len(CHANGES)} changes of SigmaMoE, found by looking at all, and so by chance too low: "
        f"“{VARIANTS[lowest].label}”, {of(lowest, DENSE)}, from dense; {of(lowest, SIGMA)}, from SigmaMoE."
    )
    if left_out := other_runs(found, [name for name in VARIANTS if name in needed]):
        yield left_out


def _by_size(records: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    """What more text of the same run, or a larger model with more text, does to the differences from dense."""
    names = [name for name, variant in VARIANTS.items() if not variant.ablation and name != BOUND]
    said = "**The models of sizes S and M are far smaller and see far less text** than the paper's 41M parameters and "
    said += "1.6 GB."
    sizes: dict[str, dict[str, Difference]] = {}
    for size, found in records.items():
        if counted := risen(found, names, DENSE):
            said += f" From a quarter of size {size}'s text to its end the difference from dense, with its sign, "
            said += f"{counted}."
        bits = bits_of(found)
        chance = noise(bits)
        differences = {name: paired(bits.get(name, {}), bits.get(DENSE, {}), chance) for name in CORE if name != DENSE}
        known = {name: of for name, of in differences.items() if of and of.error is not None}
        if known:
            sizes[size] = known
    if len(sizes) > 1:
        told = (
            f"{VARIANTS[name].label} {', '.join(f'{of[name]} at {size}' for size, of in sizes.items() if name in of)}"
            for name in CORE
            if any(name in of for of in sizes.values())
        )
        said += f" Differences from dense: {'; '.join(told)}."
    yield said
