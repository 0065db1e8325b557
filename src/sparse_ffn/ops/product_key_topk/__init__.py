"""Product-key top-k: the k largest of the n x n sums of two score tables (arXiv 2310.10837, Eq. 8)."""
