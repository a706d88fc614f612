"""What the two-sided Hessians need of attention, recorded where attention is computed.

`transformers` lets a name stand for an attention function; ours computes what the default one does and, while a block
is being looked at, hands queries and keys after RoPE, values and the attention weights themselves to a recorder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from toolchain import distributed
from toolchain.statistics.covariance import gram_root, mirrored, panels
from toolchain.statistics.gauss_newton import GaussNewtonRows
from toolchain.text import spread

T = TypeVar("T")

ATTENTION = "boa_edge"
_BLOCK = 128
_OVERLAP_POSITIONS = 32  # of each sequence, from which the overlap of heads is estimated


class Stop(Exception):  # noqa: N818  not an error: ends a forward pass that has shown what was wanted
    """Raised inside a block once nothing further of it is needed."""


# (query [B, H, L, hd], key [B, G, L, hd], value [B, G, L, hd], mask, scaling, softcap) -> output [B, L, H, hd], or None
# to have it computed.
Handler = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float | None], Tensor | None]
_handlers: list[Handler] = []
# (key, value) -> (key, value) [B, G, L, hd]: what a cache hands out for them.
Kept = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_kept: list[Kept] = []


def handled_by(handler: Handler | None) -> AbstractContextManager[None]:
    """Inside, attention is first offered to `handler`."""
    return _in_force(_handlers, handler)


def cached_by(kept: Kept | None) -> AbstractContextManager[None]:
    """Inside, attention and its handlers see keys and values as `kept` hands them out."""
    return _in_force(_kept, kept)


@contextmanager
def _in_force(stack: list[T], item: T | None) -> Iterator[None]:
    if item is None:
        yield
        return
    stack.append(item)
    try:
        yield
    finally:
        stack.remove(item)


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """softmax(q k^T * scaling + mask), [B, H, L, L]; query [B, H, L, hd], key [B, G, L, hd]."""
    batch, heads, length, hd = query.shape
    groups = key.shape[1]
    stacked = (query * scaling).reshape(batch, groups, heads // groups * length, hd)
    scores = (stacked @ key.mT).view(batch, heads, length, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores += mask
    return torch.softmax(scores, -1)


def score_slopes(query: Tensor, key: Tensor, scaling: float, softcap: float) -> Tensor:
    """How much of a change of q k^T * scaling a cap lets through, [B, H, L, L]."""
    scores = (query * scaling) @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    return 1 - torch.tanh(scores / softcap).square()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention under the mask that the block was given; shapes as `transformers` passes them."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _kept:
        key, value = _kept[-1](key, value)
    if _handlers:
        output = _handlers[-1](query, key, value, attention_mask, scale, softcap)
        if output is not None:
            return output, None
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        result = _scaled_dot_product(query, key, value, attention_mask, scale)
    else:
        weights = attention_weights(query, key, attention_mask, scale, softcap)
        result = weights @ value.repeat_interleave(groups, 1)
    return result.transpose(1, 2), None


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of as many heads of queries as of keys; what the mask hides from a whole block of queries is left out,
    which PyTorch's kernel for CPUs does not do (1.5 times the time at 512 tokens).
    """
    length = query.shape[2]
    if mask is None or length <= _BLOCK or not _looks_back(mask, length):
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    parts = [
        nn.functional.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, :stop],
            value[:, :, :stop],
            attn_mask=mask[:, :, start:stop, :stop],
            scale=scale,
        )
        for start, stop in ((start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK))
    ]
    return torch.cat(parts, 2)


def _looks_back(mask: Tensor, length: int) -> bool:
    """Whether a mask [.., .., L, L] that is added to scores hides from every token all that come after it."""
    if mask.dtype == torch.bool or mask.shape[2:] != (length, length):
        return False
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    return bool((mask <= torch.finfo(mask.dtype).min).logical_or_(~later).all())


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


class AttentionRecorder:
    """Accumulates the attention statistics of one block, as a handler of its attention.

    Args:
        groups, head_dim, width: key-value heads, size of a head, and the width of the block's input.
        like: of whose dtype and device the sums are.
        heads: query heads, the first numbers of them reading the first key-value head.
        output_overlap: M [groups, g, g], tr(W_O,h^T W_O,h') of the query heads that share a key-value head, mean 1 on
            the diagonal; None where heads are to count alike and each for itself.
        logits: collect 2 E[q q^T] and 2 E[k k^T] after RoPE.
        values: collect, per key-value head, 2/g sum_hh' M_hh' E[(X A_h^T)(X A_h'^T)^T], and the overlap of what its
            query heads read, E[(X A_h^T)^T (X A_h'^T)].
        stops: end the pass once attention has been seen.
        gauss_newton: also shown every sequence.
    """

    def __init__(
        self,
        groups: int,
        head_dim: int,
        width: int,
        heads: int,
        like: Tensor,
        output_overlap: Tensor | None,
        *,
        logits: bool,
        values: bool,
        stops: bool,
        gauss_newton: GaussNewtonRows | None = None,
    ) -> None:
        self.logits, self.stops, self.gauss_newton = logits, stops, gauss_newton
        self._mixing = None if output_overlap is None else gram_root(output_overlap)
        new = like.new_zeros
        self.keys = new(groups, head_dim, head_dim)
        self.queries = new(heads, head_dim, head_dim)
        self.values = new(groups, width, width) if values else None
        self.overlap = new(groups, heads // groups, heads // groups) if values else None
        self.x: Tensor | None = None
        self.token_weights: Tensor | None = None
        self.weight = 0.0
        self._is_causal = False

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> Tensor | None:
        batch, heads, length, _ = query.shape
        root = None if self.token_weights is None else self.token_weights.sqrt()  # [B, L]
        self.weight += batch * length if root is None else float(root.square().sum(dtype=torch.float64))
        if self.logits:
            for total, vectors in ((self.queries, query), (self.keys, key)):
                seen = vectors if root is None else vectors * root[:, None, :, None]
                flat = seen.transpose(0, 1).reshape(seen.shape[1], batch * length, -1)
                total.baddbmm_(flat.mT, flat)
        output = None
        if self.values is not None or self.gauss_newton is not None:
            weights = attention_weights(query, key, mask, scaling, softcap)
            self._check_causal(weights)
            if not self.stops:
                output = (weights @ value.repeat_interleave(heads // value.shape[1], 1)).transpose(1, 2)
            if self.gauss_newton is not None:
                assert self.x is not None
                slopes = None if softcap is None else score_slopes(query, key, scaling, softcap)
                for b in range(batch):
                    own = None if self.token_weights is None else self.token_weights[b]
                    slope = None if slopes is None else slopes[b]
                    self.gauss_newton.add(self.x[b], query[b], key[b], value[b], weights[b], slope, own)
            if self.values is not None:
                self._add_values(weights, root)
        if self.stops:
            raise Stop
        return output

    def _check_causal(self, weights: Tensor) -> None:
        """Once: all batches have the same mask."""
        if not self._is_causal and float(weights.triu(1).amax()) != 0.0:
            raise AssertionError("attention weights lie above the diagonal: the causal mask is missing")
        self._is_causal = True

    def _add_values(self, weights: Tensor, root: Tensor | None) -> None:
        """Per key-value head: sum over its query heads of M_hh' A_h^T A_h', between X^T and X; weights are overwritten.

        With B_j = sum_h L_jh A_h and M = L^T L that is the sum of B_j^T B_j.
        """
        assert self.x is not None
        assert self.values is not None
        assert self.overlap is not None
        batch, heads, length, _ = weights.shape
        groups = self.values.shape[0]
        if root is not None:
            weights *= root[:, None, :, None]
        stacked = weights.view(batch, groups, heads // groups, length, length)
        looked_at = spread(torch.arange(length), _OVERLAP_POSITIONS)
        read = stacked.index_select(3, looked_at.to(weights.device)).flatten(2, 3) @ self.x[:, None]
        read = read.unflatten(2, (heads // groups, -1)).flatten(3)
        self.overlap += (read @ read.mT).sum(0)
        if self._mixing is not None:
            stacked = torch.einsum("gjh,bghlm->bgjlm", self._mixing, stacked)
        # B_j is lower triangular and both products are symmetric: blocks that are zero or known are left out.
        mixing = weights.new_empty(groups, length, length)
        parts = panels(self.values.shape[-1])
        for sequence in range(batch):
            x = self.x[sequence]
            for start in range(0, length, _BLOCK):
                stop = min(start + _BLOCK, length)
                rows = stacked[sequence, :, :, start:, :stop].reshape(groups, -1, stop)
                mixing[:, :stop, start:stop] = rows.mT @ rows[:, :, start:]
                mixing[:, start:stop, :start] = mixing[:, :start, start:stop].mT
            mixed = mixing @ x
            for start, stop in parts:
                self.values[:, :stop, start:stop].baddbmm_(
                    x[:, :stop].mT.expand(groups, -1, -1), mixed[:, :, start:stop]
                )

    def reduce(self) -> None:
        """On to what all ranks have accumulated."""
        distributed.add_up(self.keys, self.queries, self.values, self.overlap)
        self.weight = distributed.total(self.weight)
        if self.gauss_newton is not None:
            self.gauss_newton.reduce()

    def value_hessians(self) -> Tensor | None:
        """The values' second moments so far, whole and symmetric."""
        if self.values is None:
            return None
        return mirrored(self.values)
