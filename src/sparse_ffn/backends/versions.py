"""version_of: the version of an installed package."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """A package's version, or None without it; one of another distribution's name, as ROCm's Triton, is imported."""
    with suppress(PackageNotFoundError):
        return version(package)
    with suppress(ImportError):
        return getattr(import_module(package), "__version__", None)
    return None
