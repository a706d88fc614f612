"""What BoA and GPTQ need to know of one decoder block, collected in one forward pass over the calibration text.

The block's linears are hooked for their inputs; its attention is routed, by the extension point that `transformers`
offers, through a function that sees queries and keys after RoPE and the attention weights themselves. All covariances
are means over tokens times two, the Hessians of a squared error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from toolchain.families import DecoderSpec, LayerNames

_RECORDER = "boa_edge_recorder"
_active: list[_Recorder] = []


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics of one block.

    Attributes:
        inputs: column Hessians 2 E[x x^T] by linear name, [in, in]; linears that share an input share the tensor.
        keys: 2 E[k k^T] after RoPE, [kv_heads, hd, hd].
        queries: 2 E[q q^T] after RoPE, [heads, hd, hd].
        values: per key-value head, 2 E[(X A_h^T)(X A_h^T)^T] averaged over its query heads with weights
            |W_O,h|^2, [kv_heads, in, in]; None where attention was not recorded.
        positions: sequence length, over which the RoPE mean is taken.
    """

    inputs: dict[str, Tensor]
    keys: Tensor | None
    queries: Tensor | None
    values: Tensor | None
    positions: int


@dataclass
class _Covariance:
    """Running 2 E[x x^T] over tokens."""

    total: Tensor
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self.total.addmm_(rows.mT, rows)
        self.tokens += rows.shape[0]

    def hessian(self) -> Tensor:
        return self.total * (2.0 / self.tokens)


@dataclass
class _Recorder:
    """Accumulates the attention statistics of the block that is running."""

    spec: DecoderSpec
    head_weights: Tensor  # [heads], mean 1 within each group
    keys: Tensor
    queries: Tensor
    values: Tensor
    x: Tensor | None = None
    tokens: int = 0
    positions: int = field(default=0)

    def record(self, query: Tensor, key: Tensor, weights: Tensor) -> None:
        """query [B, H, L, hd], key [B, G, L, hd] after RoPE, weights [B, H, L, L], which are overwritten."""
        assert self.x is not None
        if float(weights.triu(1).amax()) != 0.0:
            raise AssertionError("attention weights lie above the diagonal: the causal mask is missing")
        batch, heads, length, hd = query.shape
        groups = key.shape[1]
        for total, values in ((self.queries, query), (self.keys, key)):
            flat = values.transpose(0, 1).reshape(-1, batch * length, hd)
            total.baddbmm_(flat.mT, flat)
        # Per key-value head: sum over its query heads of A_h^T A_h, then X^T (.) X; one product for the whole group.
        weights *= self.head_weights.sqrt()[:, None, None]
        stacked = weights.view(batch, groups, heads // groups * length, length)
        for sequence in range(batch):
            x = self.x[sequence]
            mixing = torch.bmm(stacked[sequence].mT, stacked[sequence])
            self.values.baddbmm_(x.mT.expand(groups, -1, -1), mixing @ x)
        self.tokens += batch * length
        self.positions = length


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Plain softmax attention under the mask that the block was given; shapes as `transformers` passes them."""
    groups = query.shape[1] // key.shape[1]
    scores = (query * scaling) @ key.repeat_interleave(groups, 1).mT
    if attention_mask is not None:
        scores += attention_mask
    weights = torch.softmax(scores, -1)
    output = weights @ value.repeat_interleave(groups, 1)
    for recorder in _active:
        recorder.record(query, key, weights)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_RECORDER, _recording_attention)


def causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [1, 1, length, length]: 0 at and below the diagonal, the lowest finite number above."""
    full = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype)
    return full.triu(1)[None, None]


class BlockCollector:
    """Collects the statistics of one block while the caller runs it.

    Args:
        linears: the block's linears by name.
        names: which of them is which.
        attention: also collect what the two-sided Hessians need.
    """

    def __init__(
        self, spec: DecoderSpec, names: LayerNames, linears: dict[str, nn.Linear], config: Any, *, attention: bool
    ) -> None:
        self._names, self._linears, self._config = names, linears, config
        # Linears that read the same tensor share one covariance, taken at the first of them.
        self._shared = {names.q: (names.q, names.k, names.v), names.gate: (names.gate, names.up)}
        self._shared |= {names.o: (names.o,), names.down: (names.down,)}
        self._covariances = {
            first: _Covariance(linears[first].weight.new_zeros(linears[first].in_features, linears[first].in_features))
            for first in self._shared
        }
        self._recorder: _Recorder | None = None
        if attention:
            o = linears[names.o].weight
            per_head = o.square().view(o.shape[0], spec.heads, spec.head_dim).sum((0, 2))
            grouped = per_head.view(spec.kv_heads, -1)
            hd, d = spec.head_dim, spec.hidden_size
            self._recorder = _Recorder(
                spec=spec,
                head_weights=(grouped / grouped.mean(1, keepdim=True).clamp_min(1e-30)).reshape(-1),
                keys=o.new_zeros(spec.kv_heads, hd, hd),
                queries=o.new_zeros(spec.heads, hd, hd),
                values=o.new_zeros(spec.kv_heads, d, d),
            )

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hooks are in place inside this context."""
        handles = [self._linears[first].register_forward_pre_hook(self._hook(first)) for first in self._shared]
        implementation = self._config._attn_implementation
        if self._recorder is not None:
            self._config._attn_implementation = _RECORDER
            _active.append(self._recorder)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self._recorder is not None:
                _active.remove(self._recorder)
                self._config._attn_implementation = implementation

    def _hook(self, first: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._covariances[first].add(inputs[0])
            if first == self._names.q and self._recorder is not None:
                self._recorder.x = inputs[0]

        return record

    def statistics(self) -> BlockStatistics:
        """What was collected so far."""
        inputs: dict[str, Tensor] = {}
        for first, members in self._shared.items():
            hessian = self._covariances[first].hessian()
            inputs.update(dict.fromkeys(members, hessian))
        recorder = self._recorder
        if recorder is None:
            return BlockStatistics(inputs, None, None, None, 0)
        factor = 2.0 / recorder.tokens
        group = recorder.spec.heads // recorder.spec.kv_heads
        return BlockStatistics(
            inputs=inputs,
            keys=recorder.keys * factor,
            queries=recorder.queries * factor,
            values=recorder.values * (factor / group),
            positions=recorder.positions,
        )
