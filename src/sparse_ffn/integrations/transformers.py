"""Hugging Face transformers: its MoE models on this library's kernels, and converted models saved and loaded."""

from sparse_ffn.integrations.experts import register as register
