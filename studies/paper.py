"""What the paper reports for the layers of the study (arXiv 2310.10837v3): single runs, at equal parameters."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """Bits per character of Enwik8 (41M parameters) and perplexity of WikiText-103 (47M, sub-words)."""

    e8: float
    wt_s: float
    source: str


COLUMNS = {"e8": "the paper's Enwik8", "wt_s": "the paper's WikiText-103"}
SAME_TEXT = "e8"
LAYERS = {
    "dense": Row(1.08, 11.81, "Table 3"),
    "sigma": Row(1.08, 11.71, "Table 3"),
    "sigma-8": Row(1.09, 11.90, "Tables 4 and 10, K = 2"),
    "topk-16": Row(1.07, 11.74, "Table 1, K = 128"),
    "topk-4": Row(1.08, 11.68, "Table 1, K = 512"),
    "pkm": Row(1.11, 12.75, "Table 6, its initialisation"),
    "pkm-softmax": Row(1.16, 13.96, "Table 6"),
    "softmax-after": Row(1.09, 11.89, "Tables 4 and 10"),
    "softmax-before": Row(1.09, 12.05, "Tables 4 and 10"),
    "switch": Row(1.10, 11.88, "Tables 4 and 10, no dropout"),
    "sbase": Row(1.17, 13.01, "Tables 4 and 10"),
}
SWITCH_WITH_DROPOUT = 1.08
"""Of Enwik8, Table 10. The study's layers have no dropout."""
ABLATIONS = {
    "sigma": Row(1.08, 11.59, "Tables 4 and 10: another run than Table 3's"),
    "sigma-2": Row(1.08, 11.58, "Tables 4 and 10, K = 8"),
    "sigma-no-balance": Row(1.08, 11.83, "Tables 4 and 10, no expert dropout either"),
    "sigma-values-std": Row(1.08, 11.80, "Tables 4 and 10, standard init"),
    "sigma-k1": Row(1.09, 11.90, "Tables 4 and 10, K = 1, G = 512"),
    "sigma-k2": Row(1.09, 11.84, "Tables 4 and 10, K = 2, G = 256"),
    "sigma-k8": Row(1.08, 11.63, "Tables 4 and 10, K = 8, G = 64"),
}


NEAR = {"e8": 0.01, "wt_s": 0.12}
"""Two numbers of a column that are no further apart may be of equal results: by rounding on Enwik8. On WikiText-103 the
paper has two runs of SigmaMoE, whose perplexities are so far apart."""


def direction(value: float, base: float, column: str) -> str:
    """In the words of the study's own differences."""
    near = NEAR[column] + 0.005  # of numbers with two digits
    return "none" if abs(value - base) < near else "lower" if value < base else "higher"


def excludes(value: float, base: float, interval: tuple[float, float]) -> bool:
    """Whether their difference on the same text, whatever was rounded off, lies outside of the interval."""
    low, high = interval
    return value - base + NEAR[SAME_TEXT] < low or value - base - NEAR[SAME_TEXT] > high
