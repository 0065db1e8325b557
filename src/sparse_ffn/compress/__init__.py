"""Compression: a model's experts measured, pruned, quantised, and read from a file instead of from memory."""

from sparse_ffn.compress.config import ExpertQuantization as ExpertQuantization
from sparse_ffn.compress.encrypted import block_mask_ as block_mask_
from sparse_ffn.compress.encrypted import polynomial_units_ as polynomial_units_
from sparse_ffn.compress.mapped import map_experts_ as map_experts_
from sparse_ffn.compress.prune import PrunedLayer as PrunedLayer
from sparse_ffn.compress.prune import PruningReport as PruningReport
from sparse_ffn.compress.prune import prune_experts_ as prune_experts_
from sparse_ffn.compress.quantize import dequantize_experts_ as dequantize_experts_
from sparse_ffn.compress.quantize import quantize_experts_ as quantize_experts_
from sparse_ffn.compress.report import QuantizationReport as QuantizationReport
from sparse_ffn.compress.report import QuantizedLayer as QuantizedLayer
from sparse_ffn.compress.statistics import ExpertStats as ExpertStats
from sparse_ffn.compress.statistics import expert_stats as expert_stats
