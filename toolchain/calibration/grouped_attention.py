"""Attention of one new token over a cache, on grouped heads as they are: keys and values are read once, never expanded.

`transformers` repeats each key-value head for every query head that reads it and, with a static cache, works over the
positions that are not filled yet; at one token per step that copying is much of the time. Here the query heads of a
group become rows of one small product with the group's keys, and a layer's cache is a buffer of which only the filled
part is handed out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

_NAME = "boa_edge_grouped"
_ROWS = 4  # products with a multiple of so many rows are up to twice as fast (MKL on AVX2, three query heads per group)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention of the last tokens of a text.

    Args:
        query: float [batch, heads, new, hd]; head h reads key-value head h // (heads / kv_heads).
        key, value: float [batch, kv_heads, length, hd].
        attention_mask: bool [batch or 1, 1, new, length], True where a query may look; None: at all that is before it.
        scaling: of the scores; None: 1 / sqrt(hd).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).

    Returns:
        float [batch, new, heads, hd], and None for the weights.
    """
    batch, heads, new, hd = query.shape
    groups, length = key.shape[1], key.shape[2]
    rows = query.reshape(batch, groups, heads // groups * new, hd) * (hd**-0.5 if scaling is None else scaling)
    spare = -rows.shape[2] % _ROWS
    scores = nn.functional.pad(rows, (0, 0, 0, spare)) @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None and new > 1:
        attention_mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)[None, None]
    if attention_mask is not None:
        mask = nn.functional.pad(attention_mask.repeat(1, 1, heads // groups, 1), (0, 0, 0, spare), value=True)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    mixed = torch.softmax(scores, -1) @ value
    mixed = mixed[:, :, : rows.shape[2]].reshape(batch, heads, new, value.shape[-1])
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, grouped_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


class _FilledLayer(CacheLayerMixin):
    """Keys and values of one layer: room for the whole text, of which the filled part is handed out.

    Keys lie transposed, as the product with the queries reads them. A layer with a sliding window keeps everything too;
    the window is then in the mask.
    """

    is_sliding = False

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room, self._filled = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, groups, _, _ = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(batch, groups, key_states.shape[-1], self._room).mT
        self.values = value_states.new_empty(batch, groups, self._room, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._filled = self._filled, self._filled + key_states.shape[-2]
        self.keys[:, :, start : self._filled] = key_states
        self.values[:, :, start : self._filled] = value_states
        return self.keys[:, :, : self._filled], self.values[:, :, : self._filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._filled + query_length, 0

    def get_seq_length(self) -> int:
        return self._filled

    def get_max_length(self) -> int:
        return self._room


def filled_cache(config: Any, room: int) -> Cache:
    """A cache for `room` positions, for use inside `grouped`."""
    return Cache(layers=[_FilledLayer(room) for _ in range(config.get_text_config().num_hidden_layers)])


@contextmanager
def grouped(config: Any) -> Iterator[None]:
    """The model of `config` attends by `grouped_attention` inside this context."""
    implementation = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = implementation
