"""One block's attention written out head by head, with its weights open to change: what laws are checked against."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from toolchain.families import DecoderSpec


class Attention:
    """Causal attention with RoPE and grouped queries.

    Args:
        layer: the block whose projections are copied.
        rotary: cos and sin, [1, length, head_dim].
    """

    def __init__(self, spec: DecoderSpec, layer: nn.Module, rotary: tuple[Tensor, Tensor]) -> None:
        self.spec = spec
        self.cos, self.sin = rotary
        self.weights = {p: getattr(layer.self_attn, f"{p}_proj").weight.detach().clone() for p in "qkvo"}

    @property
    def group(self) -> int:
        return self.spec.heads // self.spec.kv_heads

    def rotate(self, x: Tensor) -> Tensor:
        """RoPE on [..., length, head_dim]."""
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [B,H,L,hd], k, v [B,G,L,hd] (q, k after RoPE), A [B,H,L,L]."""
        batch, length, _ = x.shape
        hd = self.spec.head_dim
        q, k, v = ((x @ self.weights[p].mT).view(batch, length, -1, hd).transpose(1, 2) for p in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        scores = q @ k.repeat_interleave(self.group, 1).mT / math.sqrt(hd)
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
        return q, k, v, scores.softmax(-1)

    def output(self, x: Tensor) -> Tensor:
        """What the block adds to its residual stream, [B, L, d]."""
        _, _, v, a = self.parts(x)
        mixed = a @ v.repeat_interleave(self.group, 1)
        return mixed.transpose(1, 2).reshape(*x.shape[:2], -1) @ self.weights["o"].mT

    def error(self, x: Tensor, projection: str, rows: slice, change: Tensor) -> float:
        """|output(W + change) - output(W)|^2, `change` added to `rows` of one projection."""
        before = self.output(x)
        original = self.weights[projection]
        self.weights[projection] = original.clone()
        self.weights[projection][rows] += change
        try:
            return float((self.output(x) - before).square().sum())
        finally:
            self.weights[projection] = original
