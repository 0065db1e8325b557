"""What a run brings home: one archive, its summary and a few pictures, within limits that a lent machine may set."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path

FILES, FOLDERS, BYTES = 8, 2, 16 << 20
"""At most so many files, none deeper than so many folders, each of at most so many bytes."""
LOG = 1 << 20  # bytes of a log that are kept: half of them from its beginning
PICTURES = ("layers.png", "cvmm.png", "sweeps.png")


def deliver(work: Path, out: Path, leave: Collection[str]) -> list[str]:
    """Pack a run's folder into ``<its name>.tar.gz`` and lay summary and pictures beside it.

    Args:
        work: the run's folder.
        out: where what is to be carried away goes.
        leave: names of folders in ``work`` that stay.

    Returns:
        What is beyond the limits; empty if all is well.
    """
    out.mkdir(parents=True, exist_ok=True)
    archive, partial = out / f"{work.name}.tar.gz", work.parent / f"{work.name}.partial"
    with tarfile.open(partial, "w:gz") as tar:
        for file in _files(work, leave):
            name = str(Path(work.name) / file.relative_to(work))
            if file.suffix == ".log":
                content = _shortened(file.read_bytes())
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            else:
                tar.add(file, name)
    shutil.move(partial, archive)  # whole or not at all: the run may be stopped at any time
    for name in ("summary.json", *PICTURES):
        if (work / name).is_file():
            shutil.copyfile(work / name, out / name)
    return beyond(out)


def beyond(out: Path) -> list[str]:
    """Which of the limits a folder does not keep, in words."""
    found = [file for file in sorted(out.rglob("*")) if not file.is_dir()]
    wrong = [f"{len(found)} files, at most {FILES}"] if len(found) > FILES else []
    for file in found:
        place = file.relative_to(out)
        if len(place.parts) - 1 > FOLDERS:
            wrong.append(f"{place} is deeper than {FOLDERS} folders")
        if file.stat().st_size > BYTES:
            wrong.append(f"{place} has {file.stat().st_size:,} bytes, at most {BYTES:,}")
        if not re.fullmatch(r"[A-Za-z0-9._/-]+", str(place)):
            wrong.append(f"{place} has a name that is not made of letters, digits, '.', '_' and '-'")
    return wrong


def unpack(archive: Path, base: Path, name: str) -> None:
    """Lay out what an earlier run brought home, to go on with it.

    Raises:
        ValueError: it is no archive of the run of this name, which says the card and the state of the code.
    """
    try:
        with tarfile.open(archive) as tar:
            roots = {Path(entry.name).parts[0] for entry in tar}
            if roots != {name}:
                raise ValueError(
                    f"{archive} is of {', '.join(sorted(roots))}, and this is {name}: its results are others'"
                )
            tar.extractall(base, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{archive} cannot be read: {error}") from error


def _files(work: Path, leave: Collection[str]) -> Iterator[Path]:
    for file in sorted(work.rglob("*")):
        if file.is_file() and file.relative_to(work).parts[0] not in leave:
            yield file


def _shortened(log: bytes) -> bytes:
    if len(log) <= LOG:
        return log
    return log[: LOG // 2] + b"\n[...]\n" + log[-LOG // 2 :]
