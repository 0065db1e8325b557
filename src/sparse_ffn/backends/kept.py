"""What ``python -m sparse_ffn.tune`` measured is kept in one JSON file for each device."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sparse_ffn.backends.warning import SparseFFNWarning

DIRECTORY_VARIABLE = "SPARSE_FFN_TUNED"
NO_HOME = f"there is no home directory for {{}}: set {DIRECTORY_VARIABLE} to a folder"
T = TypeVar("T")
Key = Mapping[str, Any]
"""What the numbers depend on: a file with another one does not count."""


def directory() -> Path:
    """$SPARSE_FFN_TUNED, or the folder sparse-ffn in the user's cache directory.

    Where there is no home, as in some containers, "~" stays as it is: a path at which nothing is written.
    """
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named:
        return Path(os.path.expanduser(named))
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache if cache and Path(cache).is_absolute() else os.path.expanduser("~/.cache"), "sparse-ffn")


def file_of(*words: str) -> Path:
    """The file that is named by these words."""
    return directory() / f"{re.sub('[^a-z0-9_]+', '-', ' '.join(words).lower()).strip('-')}.json"


def problem() -> str | None:
    """Why nothing can be kept, or None."""
    folder = directory()
    if folder.parts[:1] == ("~",):  # the current folder has no parts
        return NO_HOME.format(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f"{os.getpid()}.trial"
        trial.touch()
        trial.unlink()
    except OSError as error:
        return f"nothing can be written to {folder} ({error.strerror}): set {DIRECTORY_VARIABLE} to another folder"
    return None


def write(path: Path, key: Key, data: Mapping[str, Any], indent: int | None = None) -> None:
    """The whole file or nothing: another process may read or write it.

    Raises:
        FileNotFoundError: there is no home directory.
    """
    if path.parts[0] == "~":
        raise FileNotFoundError(NO_HOME.format(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({**key, **data}, indent=indent) + "\n")
    partial.replace(path)


def read(path: Path, key: Key, what: str, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """What a file says; None without a file or, with a warning, if it is of no use.

    Args:
        path: the file.
        key: what it must have been written with.
        what: is in it, for the warning.
        parse: makes it of the data; a ValueError says why it cannot.
    """
    try:
        data = json.loads(path.read_text())
        why = _other(data, key)
        if why is None:
            return parse(data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        why = f"it is damaged ({error})"
    warnings.warn(
        f"the measured {what} in {path} are not used: {why}. Built-in numbers are. Measure again with "
        "python -m sparse_ffn.tune, or delete the file.",
        SparseFFNWarning,
        stacklevel=3,
    )
    return None


def _other(data: Any, key: Key) -> str | None:
    """What of the key is another in a file's data."""
    if not isinstance(data, dict):
        return f"it is damaged (no object, but {type(data).__name__})"
    other = (
        f"its {name} is {data.get(name)!r}, here it is {key[name]!r}" for name in key if data.get(name) != key[name]
    )
    return next(other, None)
