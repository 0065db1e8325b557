"""Pretrained models, and what conversion, pruning and quantisation do to them."""
