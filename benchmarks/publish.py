"""Publishes a run: its JSON, shortened to four digits, becomes a machine's folder, and the documentation follows."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import document
from benchmarks.measuring.records import dump
from benchmarks.pages import machines
from benchmarks.pages.machines import PARTS, PUBLISHED, Machine


def slug(found: Machine) -> str:
    """The name of a machine's folder: maker, and what tells its generation."""
    generation = re.search(r"family \d+ model \d+", found.facts.get("processor", ""))
    name = f"{found.title} {generation[0] if generation and found.device == 'cpu' else ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def publish(run: Path, results: Path) -> Path:
    """Copy a run into the machine's folder, in the place of an earlier one.

    Raises:
        ValueError: it is not the folder of one run.
    """
    found = machines.load([run])
    if len(found) != 1 or found[0].name != run.name:
        raise ValueError(f"{run} is not the folder of a run: it needs one of {', '.join(f'{p}.json' for p in PARTS)}")
    place = results / slug(found[0])
    place.mkdir(parents=True, exist_ok=True)
    for part in (*PARTS, "passes"):
        (place / f"{part}.json").unlink(missing_ok=True)
        if (run / f"{part}.json").is_file():
            content = json.loads((run / f"{part}.json").read_text(), parse_float=_short)
            (place / f"{part}.json").write_text(dump(content))
    return place


def _short(number: str) -> float:
    return float(f"{float(number):.4g}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    add = arguments.add_argument
    add("run", type=Path, nargs="?", default=Path("runs/bench"), help="default: what make bench wrote")
    add("--results", type=Path, default=PUBLISHED, help="the folder of all machines")
    add("--docs", type=Path, default=Path("docs"), help="where the pages go")
    options = arguments.parse_args(argv)
    try:
        print(publish(options.run, options.results))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    document.main(["--results", str(options.results), "--docs", str(options.docs)])


if __name__ == "__main__":
    main()
