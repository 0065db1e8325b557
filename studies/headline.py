"""The study's headline in the README: the layers of every size beside dense."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from textwrap import fill

from benchmarks.measuring.report import markdown

from . import paper
from .results import Record
from .sizes import CORE
from .statistics import Difference, noise, paired
from .tables import bits_of
from .variants import BOUND, DENSE, VARIANTS

BEGIN, END = "<!-- evidence: written by python -m studies.page -->", "<!-- end of evidence -->"


def headline(records: Mapping[str, Sequence[Record]]) -> str:
    """A row for each size at which all of them have two runs or more, the paper's above; else a sentence."""
    core = [name for name in CORE if name != DENSE]
    others, rows = [*core, BOUND], []
    said: list[str] = []
    for size, found in records.items():
        bits = bits_of(found)
        chance = noise(bits)
        differences = [paired(bits.get(name, {}), bits.get(DENSE, {}), chance) for name in others]
        ran = {name: [record for record in found if record["variant"] == name] for name in others}
        lost = {name: sum(bool(record["diverged"]) for record in ran[name]) for name in others}
        if all(len(ran[name]) > 1 for name in core):
            cells = [
                _cell(difference, lost[name]) if len(ran[name]) > 1 else ""
                for name, difference in zip(others, differences, strict=True)
            ]
            dense = next(record for record in found if record["variant"] == DENSE)
            seeds = {difference.n for difference in differences[: len(core)] if difference}
            parameters, text = dense["parameters"] / 1e6, dense["training_bytes"] / 1e6
            what = f"{size}: {parameters:.1f}M parameters, {text:.0f} MB of text"
            rows.append([f"{what}, {'/'.join(map(str, sorted(seeds)))} seeds", *cells])
            diverged = [name for name, n in lost.items() if n]
            said.append(_said(size, dict(zip(others, differences, strict=True)), diverged))
    if not rows:
        return "The runs that the [evidence](docs/evidence.md) is to come from have not finished."
    quoted = [_of_dense(paper.LAYERS[name].e8) for name in core]
    rows.insert(0, ["the paper: 41M parameters, 1.6 GB, one run", *quoted, ""])
    said.append("Their learning rate was tuned on dense and SigmaMoE, at size S.")
    if any(cells[0].startswith("M:") for cells in rows):
        said.append("Size M has half of it, untuned: with all of it SigmaMoE's loss rose.")
    said.append(f"The paper's SwitchMoE is without dropout; with it {_of_dense(paper.SWITCH_WITH_DROPOUT)}.")
    table = markdown((["enwik8", *(VARIANTS[name].label for name in others)], rows))
    return (
        "Models trained here are far smaller and see far less text. Their test bits per byte minus those of a dense\n"
        "FFN of as many parameters (lower is better), ± standard error, from [the evidence](docs/evidence.md). The\n"
        f"last column is a smaller dense FFN, with as many FLOPs as SigmaMoE:\n\n{table}\n\n{fill(' '.join(said), 118)}"
    )


def _said(size: str, differences: Mapping[str, Difference | None], diverged: Collection[str]) -> str:
    """In words: which layers differ from dense."""
    core = {name: difference for name, difference in differences.items() if name != BOUND}
    named: dict[str, list[str]] = {}
    for name, difference in core.items():
        if name in diverged:
            named.setdefault("diverged", []).append(VARIANTS[name].label)
        elif difference and difference.error is not None:
            named.setdefault(difference.verdict, []).append(VARIANTS[name].label)
    words = {"higher": "above dense by more than chance", "none": "not told from dense", "lower": "below it by more"}
    words["diverged"] = "with runs that diverged"
    text = "; ".join(
        f"{words[verdict]}: {'all four sparse layers' if len(labels) == len(core) else ' / '.join(labels)}"
        for verdict, labels in named.items()
    )
    return f"Size {size}, {text}."


def _of_dense(bits: float) -> str:
    return f"{bits - paper.LAYERS[DENSE].e8:+.2f}"


def _cell(difference: Difference | None, diverged: int) -> str:
    said = [str(difference)] if difference else []
    return ", ".join([*said, f"{diverged} diverged"] if diverged else said)


def written(readme: str, records: Mapping[str, Sequence[Record]]) -> str:
    """The README with the headline written anew between its marks."""
    inside = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return inside.sub(lambda _: f"{BEGIN}\n{headline(records)}\n{END}", readme)
