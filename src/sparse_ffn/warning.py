"""The class of this library's warnings."""

from __future__ import annotations


class SparseFFNWarning(UserWarning):
    """A warning of this library."""
