"""Triton kernels, one concept a file, each beside the function that launches it; imported on first use only.

Rules that all of them keep:

- sums and elementwise arithmetic in fp32, whatever the tensors' dtype; no float atomics, so equal runs are bit-equal;
- addresses in 64 bits wherever a row or an expert is multiplied by a stride;
- every masked load names its ``other``; every axis of a ``tl.dot`` is at least 16;
- the host code never waits for the device: sizes that depend on the routing stay in its memory, grids are upper bounds.
"""
