"""Writes the tables into docs/compatibility.md."""

from __future__ import annotations

from .table import PAGE, written

PAGE.write_text(written(PAGE.read_text()))
