"""What conversion costs a real encoder and a real decoder: the tables of docs/convert.md.

Quality takes tens of minutes and may be stopped: what is finished is kept and never computed again. Speed is a part of
its own, for a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.pages.machines import PUBLISHED
from benchmarks.pretrained import decoder_rows, encoder_rows
from benchmarks.pretrained.cells import Cell, Record, finish
from benchmarks.pretrained.decoder import GEMMA3
from benchmarks.pretrained.decoder_rows import Decoding, methods
from benchmarks.pretrained.encoder_rows import Encoding

RESULTS = PUBLISHED / "conversion"
PAGE = Path(__file__).parents[1] / "docs" / "convert.md"


@dataclass(frozen=True)
class Part:
    """A file of cells: what they depend on, and how they are computed."""

    settings: Mapping[str, str]
    cells: Callable[[float], Iterator[Cell]]
    timed: bool = False


def parts() -> dict[str, Part]:
    """All parts, quality first."""
    encoding, decoding = Encoding(), Decoding()
    another = Decoding(methods=methods(GEMMA3.d_ff), load=GEMMA3.load, name=GEMMA3.name)
    about = decoding.settings
    quality = ("model", "held-out text", "calibration")
    return {
        "encoder": Part(encoding.settings(), lambda _: encoding.quality()),
        "decoder": Part(about(*quality), lambda _: decoding.quality()),
        "another-decoder": Part(another.settings(*quality), lambda _: another.quality()),
        "recovery": Part(about(*quality, "fine-tuning"), lambda _: decoding.recovery()),
        "encoder-speed": Part({"timed": "a batch of 32 texts of 64 tokens"}, encoding.speed, timed=True),
        "decoder-speed": Part(about("model", "timed"), decoding.speed, timed=True),
    }


def tables(results: Path) -> dict[str, str]:
    """The tables of the page, by the names of their marks: those whose numbers are there."""
    files = {path.stem: Record.load(path) for path in sorted(results.glob("*.json"))}
    made = {}
    if "encoder" in files:
        speed = files.get("encoder-speed")
        made["encoder"] = [*encoder_rows.table(files["encoder"], speed), "", *_facts(files["encoder"], speed)]
    for name, table in (
        ("decoder", decoder_rows.quality_table),
        ("another-decoder", decoder_rows.quality_table),
        ("recovery", decoder_rows.recovery_table),
        ("decoder-speed", decoder_rows.speed_table),
    ):
        if name in files:
            made[name] = [*table(files[name]), "", *_facts(files[name])]
    return {name: "\n".join(lines) for name, lines in made.items()}


def _facts(record: Record, speed: Record | None = None) -> list[str]:
    on = (speed or record).machine
    facts = {
        **record.settings,
        **(speed.settings if speed else {}),
        "processor": f"{on['processor']}; cores: {on['cores']}",
        "versions": f"Python {on['python']}, torch {on['torch']}, CPU core {on['CPU core']}",
    }
    if "timed" in facts:
        facts[machine.OTHERS] = on[machine.OTHERS]
    return [f"- {name}: {text}" for name, text in facts.items()]


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a table in the page."""
    return f"<!-- {name}: written by python -m benchmarks.bench_convert -->", f"<!-- end of {name} -->"


def written(page: str, made: Mapping[str, str]) -> str:
    """The page with these tables written anew."""
    for name, text in made.items():
        begin, end = marks(name)
        inside = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
        page = inside.sub(lambda _, new=f"{begin}\n{text}\n{end}": new, page)
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    known = parts()
    arguments = argparse.ArgumentParser(description=__doc__)
    add = arguments.add_argument
    add("parts", nargs="*", metavar="part", help=f"of {', '.join(known)}; default: all that are not timed")
    add("--seconds", type=float, default=8, help="for each cell of a timed part, about")
    add("--results", type=Path, default=RESULTS, help="folder of the JSON files, which also say what is finished")
    add("--only-page", action="store_true", help="compute nothing")
    add("--page", type=Path, default=PAGE, help="its marked parts are written anew")
    options = arguments.parse_args(argv)
    if unknown := [name for name in options.parts if name not in known]:
        arguments.error(f"part must be one of {', '.join(known)}, got {', '.join(unknown)}")
    asked = options.parts or [name for name, part in known.items() if not part.timed]
    for name in [] if options.only_page else asked:
        part, facts = known[name], machine.describe(torch.device("cpu"))
        if part.timed and machine.was_busy(facts):
            raise SystemExit(
                f"{name} is timed, and others use {facts[machine.OTHERS]} processors: run it on an idle machine"
            )
        finish(options.results / f"{name}.json", part.settings, facts, part.cells(options.seconds))
    options.page.write_text(written(options.page.read_text(), tables(options.results)))


if __name__ == "__main__":
    main()
