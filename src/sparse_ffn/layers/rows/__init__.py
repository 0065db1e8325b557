"""Rows of hidden units that are stored in another form than one dense parameter."""

from sparse_ffn.layers.rows.base import ExpertRows as ExpertRows
from sparse_ffn.layers.rows.offloaded import OffloadedRows as OffloadedRows
from sparse_ffn.layers.rows.quantized import QuantizedRows as QuantizedRows
