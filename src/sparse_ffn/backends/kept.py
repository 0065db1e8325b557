"""Where what ``python -m sparse_ffn.tune`` measured is kept."""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY_VARIABLE = "SPARSE_FFN_TUNED"


def directory() -> Path:
    """$SPARSE_FFN_TUNED, or the folder sparse-ffn in the user's cache directory."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache") / "sparse-ffn"
