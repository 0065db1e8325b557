"""What the compiled libraries share: where they are found, and the dtypes that they compute in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the fast backends compute in, each with its number in the C interface of the CUDA kernels."""


def find(name: str, variable: str) -> Path | None:
    """The library: named by an environment variable, or in a folder of the package itself.

    An editable install gives the package two: that of the sources, and that of what was built. Nothing else is
    searched: code from a folder that others can write into, such as the current one, would run in this process.
    """
    if named := os.environ.get(variable):
        return Path(named).absolute()  # a bare name would be looked for in the system's folders
    places = (Path(folder, name).absolute() for folder in sys.modules["sparse_ffn"].__path__)
    return next((place for place in places if place.is_file()), None)
