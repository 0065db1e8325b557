"""The study's headline in the README: the layers of every size beside dense."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from textwrap import fill

from benchmarks.measuring.report import markdown

from . import paper
from .results import Record
from .sizes import CORE
from .statistics import ERRORS, Difference, Noise, noise, once_in, paired
from .tables import bits_of, diverged_of, without_one
from .variants import BOUND, DENSE, VARIANTS

BEGIN, END = "<!-- evidence: written by python -m studies.page -->", "<!-- end of evidence -->"


def headline(records: Mapping[str, Sequence[Record]]) -> str:
    """A row for each size at which all of them have two runs or more, the paper's above; else a sentence."""
    core = [name for name in CORE if name != DENSE]
    others, rows = [*core, BOUND], []
    said: list[str] = []
    rates: list[str] = []
    shares: list[str] = []
    for size, found in records.items():
        bits = bits_of(found)
        chance = noise(bits)
        differences = {name: paired(bits.get(name, {}), bits.get(DENSE, {}), chance) for name in others}
        ran = {name: [record for record in found if record["variant"] == name] for name in [DENSE, *others]}
        lost = {name: sum(bool(record["diverged"]) for record in of) for name, of in ran.items()}
        if all(len(ran[name]) > 1 for name in CORE):
            cells = [_cell(differences[name], lost[name]) if len(ran[name]) > 1 else "" for name in others]
            parameters, text = (ran[DENSE][0][key] / 1e6 for key in ("parameters", "training_bytes"))
            of_core = {name: differences[name] for name in core}
            seeds = {difference.n for difference in of_core.values() if difference}
            what = [f"{size}: {parameters:.1f}M parameters", f"{text:.0f} MB of text"]
            what += [f"{'/'.join(map(str, sorted(seeds)))} seed{'' if seeds == {1} else 's'}"] if seeds else []
            what += [f"{lost[DENSE]} of dense diverged"] if lost[DENSE] else []
            rows.append([", ".join(what), *cells])
            said.append(_said(size, of_core, diverged_of(found)))
            if chance:
                freedom = f"({chance.freedom} degrees of freedom)"
                rates.append(f"once in {once_in(chance.freedom)} times at size {size} {freedom}")
                shares += _mostly(size, chance, without_one(bits))
    if not rows:
        return "The runs that the [evidence](docs/evidence.md) is to come from have not finished."
    quoted = [_of_dense(paper.LAYERS[name].e8) for name in core]
    rows.insert(0, ["the paper: 41M parameters, 1.6 GB, one run", *quoted, ""])
    if rates:
        said.append(f"Chance alone takes a layer beyond {ERRORS} standard errors {', '.join(rates)};")
        said += ["the layers of a size share dense's runs, and err together.", *shares]
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
    words = {
        "higher": f"above dense by more than {ERRORS} standard errors",
        "none": f"within {ERRORS} standard errors of dense",
        "lower": f"below dense by more than {ERRORS} standard errors",
        "few": "of too few runs to call",
        "diverged": "with runs that diverged",
    }
    named: dict[str, list[str]] = {called: [] for called in words}
    for name, difference in differences.items():
        called = difference.verdict if difference and difference.error is not None else "few"
        named["diverged" if name in diverged else called].append(VARIANTS[name].label)
    text = "; ".join(
        f"{words[called]}: {'all four sparse layers' if len(labels) == len(differences) else ' / '.join(labels)}"
        for called, labels in named.items()
        if labels
    )
    return f"Size {size}, {text}."


def _mostly(size: str, chance: Noise, without: Mapping[str, float]) -> list[str]:
    """A sentence that names the layer which adds more to the errors than all others, if one does."""
    one = min(without, key=without.__getitem__, default=None)
    if one is None or without[one] >= chance.deviation / 2:
        return []
    share = f"{without[one] / chance.deviation:.0%}"
    return [f"Without {VARIANTS[one].label}'s runs size {size}'s errors would be {share} of what they are."]


def _of_dense(bits: float) -> str:
    return f"{bits - paper.LAYERS[DENSE].e8:+.2f}"


def _cell(difference: Difference | None, diverged: int) -> str:
    said = [str(difference)] if difference else []
    return ", ".join([*said, f"{diverged} diverged"] if diverged else said) or "–"


def written(readme: str, records: Mapping[str, Sequence[Record]]) -> str:
    """The README with the headline written anew between its marks."""
    inside = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return inside.sub(lambda _: f"{BEGIN}\n{headline(records)}\n{END}", readme)
