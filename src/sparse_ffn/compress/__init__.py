"""Making trained models smaller: the experts' rows quantised, and back."""

from sparse_ffn.compress.config import ExpertQuantization as ExpertQuantization
from sparse_ffn.compress.quantize import dequantize_experts_ as dequantize_experts_
from sparse_ffn.compress.quantize import quantize_experts_ as quantize_experts_
from sparse_ffn.compress.report import QuantizationReport as QuantizationReport
from sparse_ffn.compress.report import QuantizedLayer as QuantizedLayer
