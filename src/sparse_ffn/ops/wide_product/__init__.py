"""Wide product: a batched product with fp32 results, for scores that selections compare."""
