"""The class of this library's warnings, and how messages say that something is to be installed."""

from __future__ import annotations


class SparseFFNWarning(UserWarning):
    """A warning of this library."""


def how_to_install(extra: str = "", options: str = "") -> str:
    """The command that installs this library. From a clone: no package index has it, so anyone could take its name."""
    what = f"'.[{extra}]'" if extra else "."
    return f"{' '.join(filter(None, ('pip install', options, what)))} in a clone of the repository"
