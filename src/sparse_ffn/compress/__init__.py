"""Compression: experts measured, pruned, quantised, read from a file, or kept in host memory beside a GPU."""

from sparse_ffn.compress.config import ExpertQuantization as ExpertQuantization
from sparse_ffn.compress.encrypted import block_mask_ as block_mask_
from sparse_ffn.compress.encrypted import polynomial_units_ as polynomial_units_
from sparse_ffn.compress.mapped import map_experts_ as map_experts_
from sparse_ffn.compress.offload import offload_experts_ as offload_experts_
from sparse_ffn.compress.offload import offload_stats as offload_stats
from sparse_ffn.compress.prune import prune_experts_ as prune_experts_
from sparse_ffn.compress.quantize import dequantize_experts_ as dequantize_experts_
from sparse_ffn.compress.quantize import quantize_experts_ as quantize_experts_
from sparse_ffn.compress.report import CompressedLayer as CompressedLayer
from sparse_ffn.compress.report import CompressionReport as CompressionReport
from sparse_ffn.compress.report import PrunedLayer as PrunedLayer
from sparse_ffn.compress.report import PruningReport as PruningReport
from sparse_ffn.compress.report import QuantizationReport as QuantizationReport
from sparse_ffn.compress.report import QuantizedLayer as QuantizedLayer
from sparse_ffn.compress.residual import compress_experts_ as compress_experts_
from sparse_ffn.compress.sensitivity import quantization_error as quantization_error
from sparse_ffn.compress.statistics import ExpertStats as ExpertStats
from sparse_ffn.compress.statistics import expert_stats as expert_stats
