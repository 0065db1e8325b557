"""Expert FFN: each token through the two-layer FFNs of its k experts, weighted by its gates."""
