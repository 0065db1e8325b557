"""Hugging Face transformers: its MoE models on this library's kernels; converted models saved and loaded."""

from sparse_ffn.integrations.experts import register as register
from sparse_ffn.integrations.padding import mask_padding as mask_padding
from sparse_ffn.integrations.pretrained import from_pretrained as from_pretrained
from sparse_ffn.integrations.pretrained import record_conversion as record_conversion
from sparse_ffn.integrations.quantized import teach as _teach

_teach()
