"""A decoder-only pre-LN transformer over bytes, whose feed-forward layers come from a factory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

N_BYTES = 256


def init_linear_(linear: nn.Linear, n_layers: int) -> None:
    """The paper's pre-LN initialisation: std sqrt(2 / (L * fan_in)), biases zero. The sparse layers use the same."""
    nn.init.normal_(linear.weight, std=math.sqrt(2 / (n_layers * linear.in_features)))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class Rotary(nn.Module):
    """Rotary positions: turns pairs of channels by an angle that grows with the position.

    An odd head size (the paper's 41) leaves its last channel unturned.
    """

    def __init__(self, d_head: int, context: int) -> None:
        super().__init__()
        n_pairs = d_head // 2
        frequencies = 10_000.0 ** (-torch.arange(n_pairs) / n_pairs)
        angles = torch.arange(context)[:, None] * frequencies
        self.n_pairs = n_pairs
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], dim=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., time, d_head]
        time = x.shape[-2]
        cos, sin = self.get_buffer("cos")[:time], self.get_buffer("sin")[:time]  # fp32, under autocast too
        pairs, rest = x[..., : 2 * self.n_pairs], x[..., 2 * self.n_pairs :]
        turned = pairs * cos + pairs.roll(self.n_pairs, dims=-1) * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, [..., time, d_head] each."""
    if v.device.type != "cpu" or v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # torch's fused kernel for CPUs takes over twice the time of plain products in this dtype
    time, d_head = q.shape[-2:]
    future = torch.full((time, time), -math.inf, dtype=v.dtype).triu(1)
    scores = (q * d_head**-0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores.add_(future), dim=-1) @ v


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, d_model: int, n_heads: int, d_head: int, context: int, n_layers: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * n_heads * d_head, bias=False)
        self.out = nn.Linear(n_heads * d_head, d_model, bias=False)
        self.rotary = Rotary(d_head, context)
        for linear in (self.qkv, self.out):
            init_linear_(linear, n_layers)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "batch time (three head c) -> three batch head time c", three=3, head=self.n_heads
        )
        y = attend(self.rotary(q), self.rotary(k), v)
        out: Tensor = self.out(rearrange(y, "batch head time c -> batch time (head c)"))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, d_model: int, attention: Attention, ffn: nn.Module, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention
        self.ffn_norm = nn.LayerNorm(d_model)
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x


class ByteModel(nn.Module):
    """Logits of the next byte for every position of `tokens` [batch, time], by blocks between embedding and head."""

    blocks: nn.ModuleList

    def __init__(self, d_model: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(N_BYTES, d_model)
        nn.init.xavier_uniform_(self.embedding.weight)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, N_BYTES)

    @property
    def ffns(self) -> list[nn.Module]:
        return [block.get_submodule("ffn") for block in self.blocks]

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-1] > self.context:
            raise ValueError(f"{tokens.shape[-1]} bytes are more than the model's context of {self.context}")
        logits: Tensor = self.head(self.norm(self.body(self.embedding(tokens))))
        return logits


class ByteTransformer(ByteModel):
    """A pre-LN decoder."""

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_head: int,
        context: int,
        dropout: float,
        make_ffn: Callable[[int], nn.Module],
    ) -> None:
        super().__init__(d_model, context)
        # Everything but the FFNs is drawn first, so that with one seed all variants start from the same backbone.
        attentions = [Attention(d_model, n_heads, d_head, context, n_layers) for _ in range(n_layers)]
        self.blocks = nn.ModuleList(
            Block(d_model, attention, make_ffn(i), dropout) for i, attention in enumerate(attentions)
        )
