"""Weighted bag: weighted sums of gathered value rows, the read of a key-value memory."""
