"""What the compiled libraries share: where they are found, and the numbers of the dtypes in their C interfaces."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the fast backends compute in."""


def find(name: str, variable: str) -> Path | None:
    """The library: named by an environment variable, beside the package, or where an editable install puts it."""
    if variable in os.environ:
        return Path(os.environ[variable])
    package = Path(__file__).parent
    places = (package, *(Path(entry, package.name) for entry in sys.path if entry))
    return next((place / name for place in places if (place / name).is_file()), None)
