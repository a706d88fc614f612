"""Choose sequences, and weights for them, whose statistics together are closest to the whole pool's.

The distance is quadratic in the weights, (w - 1/M)^T G (w - 1/M) with the similarity G of all M sequences, so that no
statistic is looked at again:

1. greedy: add the sequence that brings the mean of the chosen closest to the target;
2. swaps: exchange one chosen for one other as long as that helps;
3. weights: a convex problem in a box, solved by moving weight between the two sequences that gain most by it.

No random numbers, no ties but by index: the same pool gives the same choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LIGHTEST, HEAVIEST = 0.25, 4.0
_SWAPS_PER_SEQUENCE = 4
_MOVES_PER_SEQUENCE = 50
_GAP = 1e-9


@dataclass(frozen=True)
class Selection:
    """A weighted part of a pool.

    Attributes:
        chosen: int64 [n], in the order in which the greedy search took them, swapped ones in the place of the old.
        weights: float64 [n] in [0.25, 4], mean 1.
        mismatch: distance of the weighted choice to the target over the target's own size.
        unselected: the same for the first n of the pool, equally weighted.
    """

    chosen: Tensor
    weights: Tensor
    mismatch: float
    unselected: float


def select(similarity: Tensor, count: int) -> Selection:
    """`count` of the pool's sequences.

    Args:
        similarity: float64 [pool, pool], symmetric, positive semidefinite; the target is the pool's mean.
    """
    target = similarity.mean(1)
    chosen = _greedy(similarity, target, count)
    _swap(similarity, target, chosen)
    order = torch.tensor(chosen)
    weights = _weigh(similarity[order][:, order], target[order])
    plain = torch.arange(count)
    return Selection(
        order,
        weights,
        mismatch(similarity, order, weights),
        mismatch(similarity, plain, torch.ones(count, dtype=torch.float64)),
    )


def mismatch(similarity: Tensor, chosen: Tensor, weights: Tensor) -> float:
    """|sum_s w_s S_s / n - T| / |T| of a weighted choice, weights float64 [n] of mean 1."""
    pool = similarity.shape[0]
    difference = torch.full((pool,), -1 / pool, dtype=torch.float64)
    difference[chosen] += weights / chosen.numel()
    size = float(similarity.mean())
    return (max(float(difference @ similarity @ difference), 0.0) / max(size, 1e-300)) ** 0.5


def _greedy(similarity: Tensor, target: Tensor, count: int) -> list[int]:
    own = similarity.diagonal()
    together = torch.zeros_like(own)  # inner products with the sum of the chosen
    chosen: list[int] = []
    free = torch.ones_like(own, dtype=torch.bool)
    for size in range(1, count + 1):
        gain = (2 * together + own) / size**2 - 2 * target / size
        best = int(torch.where(free, gain, torch.inf).argmin())
        chosen.append(best)
        free[best] = False
        together += similarity[best]
    return chosen


def _swap(similarity: Tensor, target: Tensor, chosen: list[int]) -> None:
    """Improve `chosen` in place."""
    count, pool = len(chosen), similarity.shape[0]
    own = similarity.diagonal()
    for _ in range(_SWAPS_PER_SEQUENCE * count):
        inside = torch.tensor(chosen)
        outside = torch.ones(pool, dtype=torch.bool)
        outside[inside] = False
        others = outside.nonzero()[:, 0]
        if not others.numel():
            return
        together = similarity[inside].sum(0)
        linear = 2 * together / count**2 - 2 * target / count
        pairs = own[inside][:, None] + own[others][None] - 2 * similarity[inside][:, others]
        change = pairs / count**2 + linear[others][None] - linear[inside][:, None]
        best = int(change.argmin())
        if float(change.view(-1)[best]) >= -_GAP * float(similarity.mean().abs()):
            return
        chosen[best // others.numel()] = int(others[best % others.numel()])


def _weigh(similarity: Tensor, target: Tensor) -> Tensor:
    """Weights of mean 1 within [LIGHTEST, HEAVIEST] for the chosen, by pairwise descent."""
    count = similarity.shape[0]
    weights = torch.ones(count, dtype=torch.float64)
    gradient = similarity.sum(1) - count * target  # of half the distance, in units of 1 / count^2
    own = similarity.diagonal()
    tolerance = _GAP * count * float(target.abs().amax())
    for _ in range(_MOVES_PER_SEQUENCE * count):
        giver = int(torch.where(weights > LIGHTEST, gradient, -torch.inf).argmax())
        taker = int(torch.where(weights < HEAVIEST, gradient, torch.inf).argmin())
        slope = float(gradient[giver] - gradient[taker])
        if slope <= tolerance:
            break
        curvature = float(own[giver] + own[taker] - 2 * similarity[giver, taker])
        room = min(float(weights[giver]) - LIGHTEST, HEAVIEST - float(weights[taker]))
        moved = min(slope / curvature, room) if curvature > 0 else room
        weights[giver] -= moved
        weights[taker] += moved
        gradient += moved * (similarity[taker] - similarity[giver])
    return weights
