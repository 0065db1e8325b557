"""CVMM: each row times the matrix of its expert (arXiv 2310.10837, appendix B.1)."""
