"""Gradient descent among orthogonal matrices: one Cayley step after the other never leaves them.

SpinQuant (arXiv 2405.16406, section 3.2) after Li et al. (arXiv 2002.01113, algorithm 1). With G the loss's gradient
at an orthogonal R, or a running sum of such,

    Y = G' - G'^T,   G' = G R^T - R R^T G R^T / 2  (= G R^T / 2)
    R <- (I + a/2 Y)^-1 (I - a/2 Y) R                                    = R - a Y R + O(a^2)

Y is skew, so that its Cayley transform is orthogonal. Li et al. bound a by |Y|; here a is set by it: a step turns by a
given angle, whatever the loss is measured in.
"""

from __future__ import annotations

import torch
from torch import Tensor


class CayleyDescent:
    """Moves orthogonal matrices.

    Attributes:
        rotation: float64 [..., n, n].

    Args:
        start: the same.
        momentum: how much of the former direction is kept.
        keep_ones: leave R 1 = 1 as it is.
    """

    def __init__(self, start: Tensor, *, momentum: float = 0.9, keep_ones: bool = False) -> None:
        self.rotation = start.to(torch.float64)
        self._momentum, self._keep_ones = momentum, keep_ones
        self._direction = torch.zeros_like(self.rotation)

    def step(self, gradient: Tensor, angle: float) -> None:
        """One step.

        Args:
            gradient: dL/dR, like `rotation`; where it is zero and has been, nothing moves.
            angle: root of the mean square of the angles by which the columns turn, in radians.
        """
        size = self.rotation.shape[-1]
        self._direction = self._momentum * self._direction + gradient.to(torch.float64)
        half = self._direction @ self.rotation.mT / 2
        skew = half - half.mT
        if self._keep_ones:
            skew = skew - skew.mean(-1, keepdim=True)
            skew = skew - skew.mean(-2, keepdim=True)
        self._direction = skew @ self.rotation  # its part along the manifold
        length = torch.linalg.matrix_norm(skew)[..., None, None]
        turn = torch.where(length > 0, skew * (angle * size**0.5 / 2) / length, torch.zeros_like(skew))
        one = torch.eye(size, dtype=turn.dtype, device=turn.device)
        self.rotation = torch.linalg.solve(one + turn, (one - turn) @ self.rotation)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix with the least |R - M|, float64 [..., n, n]: U V^T of M = U S V^T."""
    left, _, right = torch.linalg.svd(matrix.to(torch.float64))
    return left @ right
