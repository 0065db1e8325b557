"""The study's headline in the README: the layers of every size beside dense."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from benchmarks.measuring.report import markdown

from .results import Record
from .sizes import CORE
from .statistics import paired
from .tables import bits_of
from .variants import DENSE, VARIANTS

BEGIN, END = "<!-- evidence: written by python -m studies.page -->", "<!-- end of evidence -->"


def headline(records: Mapping[str, Sequence[Record]]) -> str:
    """A row for each size at which all of them have a difference with an error; a sentence if there is none."""
    rows = []
    for found in records.values():
        bits = bits_of(found)
        differences = [paired(bits.get(name, {}), bits.get(DENSE, {})) for name in CORE if name != DENSE]
        if found and all(difference is not None and difference.error is not None for difference in differences):
            dense = next(record for record in found if record["variant"] == DENSE)
            what = f"{dense['parameters'] / 1e6:.1f}M parameters, {dense['training_bytes'] / 1e6:.0f} MB of text"
            rows.append([what, *map(str, differences)])
    if not rows:
        return "The runs that the [evidence](docs/evidence.md) is to come from have not finished."
    table = markdown((["enwik8", *(VARIANTS[name].label for name in CORE if name != DENSE)], rows))
    return (
        "In small models trained here, test bits per byte above those of a dense FFN of as many parameters, with the\n"
        f"standard error over seeds ([all of it](docs/evidence.md)):\n\n{table}"
    )


def written(readme: str, records: Mapping[str, Sequence[Record]]) -> str:
    """The README with the headline written anew between its marks."""
    inside = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return inside.sub(lambda _: f"{BEGIN}\n{headline(records)}\n{END}", readme)
