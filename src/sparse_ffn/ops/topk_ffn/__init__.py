"""Top-k FFN: a two-layer FFN of which only the k largest hidden units count (arXiv 2310.10837, Eq. 6-7)."""
