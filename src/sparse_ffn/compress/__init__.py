"""Compression: a model's experts measured, pruned, and read from a file instead of from memory."""

from sparse_ffn.compress.statistics import ExpertStats as ExpertStats
from sparse_ffn.compress.statistics import expert_stats as expert_stats
