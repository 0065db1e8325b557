"""The sizes that are measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MoEShape:
    """T tokens, D d_model, E experts of G units, k selected."""

    T: int
    D: int
    E: int
    G: int
    k: int

    @classmethod
    def parse(cls, text: str) -> MoEShape:
        """From ``T,D,E,G,k``.

        Raises:
            ValueError: not five positive integers with k <= E.
        """
        sizes = [int(part) for part in text.split(",")]
        if len(sizes) != 5 or min(sizes) < 1 or sizes[4] > sizes[2]:
            raise ValueError(f"a shape is T,D,E,G,k, positive and with k <= E, got {text!r}")
        return cls(*sizes)

    def __str__(self) -> str:
        return f"{self.T},{self.D},{self.E},{self.G},{self.k}"


@dataclass(frozen=True)
class MemoryShape:
    """T tokens, D d_model, n sub-keys a half, H heads, k values a head."""

    T: int = 2048
    D: int = 512
    n: int = 128
    H: int = 4
    k: int = 32

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} n={self.n} H={self.H} k={self.k}"


@dataclass(frozen=True)
class TopKShape:
    """T tokens, D d_model, F units, k kept."""

    T: int = 2048
    D: int = 512
    F: int = 2048
    k: int = 64

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} d_ff={self.F} k={self.k}"


TOPK_TOKENS = (1, 32, 1024)
PERCENTS = (1, 3, 5, 10, 25, 50, 100)


def topk_sweep(tokens: int) -> tuple[TopKShape, ...]:
    """From 1% to all of the units."""
    return tuple(TopKShape(tokens, 576, 1536, round(15.36 * percent)) for percent in PERCENTS)


LARGE = tuple(MoEShape.parse(s) for s in ("2048,512,16,128,4", "2048,1024,32,128,4", "4096,1024,64,64,8"))
SMALL = MoEShape.parse("512,412,16,128,4")
DECODE = MoEShape.parse("32,1024,32,128,4")
SINGLE = MoEShape.parse("1,512,16,128,4")
MOE_SHAPES = (*LARGE, SMALL, DECODE, SINGLE)
WIDE_SINGLE = MoEShape.parse("1,1024,32,128,4")
SERVED = MoEShape.parse("2048,2048,64,768,8")  # a GLU, as large as a layer of a language model that is served

GPU_WIDE, GPU_FINE = (MoEShape.parse(s) for s in ("16384,1024,64,256,8", "16384,1024,64,128,8"))
GPU_SHAPES = (
    GPU_WIDE,
    GPU_FINE,
    *(MoEShape.parse(s) for s in ("16384,512,16,128,4", "16384,1024,256,64,16", "16384,2048,256,128,16")),
    MoEShape.parse("16384,1024,512,128,8"),
    DECODE,
)
GPU_MEMORY = MemoryShape(T=16384, D=1024, n=512, H=4, k=32)
GPU_TOPK = TopKShape(T=16384, D=1024, F=4096, k=128)


def moe_shapes(device: torch.device) -> tuple[MoEShape, ...]:
    """What is measured on a device if nothing is asked for."""
    return GPU_SHAPES if device.type == "cuda" else MOE_SHAPES


def memory_shape(device: torch.device) -> MemoryShape:
    """See moe_shapes."""
    return GPU_MEMORY if device.type == "cuda" else MemoryShape()


def topk_shape(device: torch.device) -> TopKShape:
    """See moe_shapes."""
    return GPU_TOPK if device.type == "cuda" else TopKShape()
