"""Numbers on a command line."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A count."""
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value} is not from 1 to {2**31 - 1}")
    return value


def seed(text: str) -> int:
    """What generators take."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to {2**63 - 1}")
    return value
