"""What calibration decides about an int8 cache: the scales of `per_head`, and how keys are smoothed against queries.

Both go by what errors of the cache cost. A query head of a group reads q^T (k + dk) and W_o sum a (v + dv), so that

    keys    sum over the group's query heads h of E|q_h^T dk|^2 = E[dk^T Q dk],  Q = sum_h E[q_h q_h^T]
    values  sum over h of E|W_o,h dv|^2 = E[dv^T M dv],                          M = sum_h W_o,h^T W_o,h

Smoothing divides k by s and multiplies q by s, as SmoothQuant does between a norm and a linear (arXiv 2211.10438, eq.
4, with q in the place of the weights):

    s_j = max|k_j|^alpha / max|q_j|^(1 - alpha)

It costs the weights nothing: their grids have scales per row, and whole rows are scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolchain.activations.cache import CachePlan, CacheScheme, Scales, through_cache
from toolchain.transforms.smooth_search import STRENGTHS, smoothing_scales

_FRACTIONS = tuple(0.94**step for step in range(28))  # of the largest magnitude, down to 0.19
_HIGHEST = 127


@dataclass
class HeadSamples:
    """What the attention of the layer at hand has seen.

    Attributes:
        query, key, value: per batch, [H, tokens, hd], [G, tokens, hd] twice; after RoPE, before R3.
    """

    query: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)

    def add(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """One batch, [B, H or G, L, hd]."""
        for held, x in ((self.query, query), (self.key, key), (self.value, value)):
            held.append(x.transpose(0, 1).flatten(1, 2))

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it, in float64, and forget it."""
        query, key, value = (torch.cat(held, 1).to(torch.float64) for held in (self.query, self.key, self.value))
        self.query, self.key, self.value = [], [], []
        return query, key, value


def key_metric(query: Tensor, groups: int) -> Tensor:
    """Q of each key-value head, [G, hd, hd], from queries [H, N, hd]."""
    moments = query.mT @ query / query.shape[1]
    return moments.unflatten(0, (groups, -1)).sum(1)


def value_metric(output: Tensor, heads: int, groups: int) -> Tensor:
    """M of each key-value head, float64 [G, hd, hd], from the weight [d, H * hd] of `o`."""
    columns = output.to(torch.float64).unflatten(1, (heads, -1)).transpose(0, 1)  # [H, d, hd]
    return (columns.mT @ columns).unflatten(0, (groups, -1)).sum(1)


def head_errors(change: Tensor, metric: Tensor) -> Tensor:
    """E[dx^T Q dx] of each head, [G], for dx [G, N, hd]."""
    return ((change @ metric) * change).sum((1, 2)) / change.shape[1]


def head_scales(x: Tensor, metric: Tensor) -> Tensor:
    """The scale of each head with the least error, clipping what is rare and large; float32 [G].

    Args:
        x: float64 [G, N, hd].
        metric: [G, hd, hd].
    """
    largest = x.abs().amax((1, 2)) / _HIGHEST
    largest = torch.where(largest > torch.finfo(torch.float32).tiny, largest, torch.ones_like(largest))
    best, chosen = torch.full_like(largest, torch.inf), largest
    for fraction in _FRACTIONS:
        tried = (largest * fraction).to(torch.float32).to(x.dtype)
        errors = head_errors(through_cache(x, tried) - x, metric)
        better = errors < best
        best, chosen = torch.where(better, errors, best), torch.where(better, tried, chosen)
    return chosen.to(torch.float32)


class CacheCalibration:
    """Collects, layer by layer, what `CachePlan` needs and the ranges that are recorded with it."""

    def __init__(self, scheme: CacheScheme) -> None:
        self._scheme = scheme
        self._scales: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._ranges: dict[str, list[list[list[float]]]] = {"keys": [], "values": []}

    def add(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """The next layer.

        Args:
            query, key, value: float64 [H, N, hd], [G, N, hd] twice; keys as they are kept, queries as they meet them.
            output: the weight [d, H * hd] of `o`.
        """
        groups = len(key)
        for name, x in (("keys", key), ("values", value)):
            ends = torch.stack([x.amin((1, 2)), x.amax((1, 2))], 1)
            self._ranges[name].append([[float(low), float(high)] for low, high in ends])
        if self._scheme == "per_head":
            self._scales[0].append(head_scales(key, key_metric(query, groups)))
            self._scales[1].append(head_scales(value, value_metric(output, len(query), groups)))

    def plan(self) -> CachePlan:
        """For all layers that were added."""
        keys, values = (_numbers(scales) for scales in self._scales)
        return CachePlan(self._scheme, key_scales=keys, value_scales=values)

    def to_document(self) -> dict[str, Any]:
        """Smallest and largest key and value, by layer and head; JSON-ready."""
        return {"scheme": self._scheme, "ranges": self._ranges}


def _numbers(scales: Sequence[Tensor]) -> Scales:
    return tuple(tuple(float(scale) for scale in heads) for heads in scales)


@dataclass(frozen=True, eq=False)
class KeySmoothing:
    """A choice of scales between q and k of one layer.

    Attributes:
        scales: float64 [G, hd], or [1, hd] where all heads share them.
        before, error: E|q^T dk|^2, summed over query heads, without smoothing and with it.
    """

    scales: Tensor
    before: float
    error: float


def search_key_smoothing(
    query: Tensor,
    key: Tensor,
    scheme: CacheScheme,
    pairs: int,
    *,
    joint: bool = False,
    turn: Callable[[Tensor], Tensor] = lambda x: x,
    strengths: Sequence[float] = STRENGTHS,
    powers_of_two: bool = True,
) -> KeySmoothing:
    """The scales with the least error of the logits, of each head by itself; never more than without smoothing.

    Args:
        query, key: float64 [H, N, hd], [G, N, hd], after RoPE.
        pairs: RoPE turns channels a and a + pairs together, for a below it: those have one scale.
        joint: all heads have the same scales (norms on q and k take them up).
        turn: what is done to queries and keys [..., hd] before they are kept (R3).
        powers_of_two: round scales so that they can be folded without rounding.
    """
    groups, _, hd = key.shape
    shared = torch.cat([torch.arange(pairs).repeat(2), torch.arange(pairs, hd - pairs)])
    largest_key = key.abs().amax(1)
    largest_query = query.abs().amax(1).unflatten(0, (groups, -1)).amax(1)
    if joint:
        largest_key, largest_query = (x.amax(0, keepdim=True) for x in (largest_key, largest_query))

    def errors(scales: Tensor) -> Tensor:
        spread = scales.expand(groups, hd)
        metric = key_metric(turn(query * spread.repeat_interleave(len(query) // groups, 0)[:, None]), groups)
        kept = turn(key / spread[:, None])
        found = head_errors(
            through_cache(kept, head_scales(kept, metric) if scheme == "per_head" else None) - kept, metric
        )
        return found.sum(0, keepdim=True) if joint else found

    chosen = torch.ones_like(largest_key)
    best = before = errors(chosen)
    for strength in strengths:
        heads = zip(largest_key, largest_query, strict=True)
        tried = torch.stack([smoothing_scales(k, q, shared, strength, powers_of_two)[shared] for k, q in heads])
        found = errors(tried)
        better = found < best
        best, chosen = torch.where(better, found, best), torch.where(better[:, None], tried, chosen)
    return KeySmoothing(chosen, float(before.sum()), float(best.sum()))
