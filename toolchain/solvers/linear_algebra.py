"""The factor that GPTQ-like solvers need of a Hessian, with bounded, reported damping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LADDER = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U with P H^-1 P^T = U^T U, after damping H += damping * mean(diag H) * I.

    Attributes:
        upper: [n, d, d].
        damping: the largest relative damping that was used; above the one asked for where an H was not positive
            definite, and for that H alone.
        order: int64 [n, d], the order P in which the variables are taken; None for their own.
    """

    upper: Tensor
    damping: float
    order: Tensor | None = None

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """`tensor` [m, ..., ...] with its entries along `dim` (1 or 2) in the factor's order; m = n, or n = 1."""
        return tensor if self.order is None else tensor.gather(dim, self._index(tensor, dim, self.order))

    def put_back(self, tensor: Tensor, dim: int) -> Tensor:
        """The inverse of `take`."""
        return tensor if self.order is None else tensor.gather(dim, self._index(tensor, dim, self.order.argsort(-1)))

    def _index(self, tensor: Tensor, dim: int, order: Tensor) -> Tensor:
        return order.unsqueeze(3 - dim).expand_as(tensor)

    def solve(self, right: Tensor) -> Tensor:
        """`right` [n, rows, d] times H^-1."""
        return self.put_back(self.take(right, 2) @ self.upper.mT @ self.upper, 2)


def inverse_factor(hessian: Tensor, damping: float, *, ordered: bool = False) -> InverseFactor:
    """Factor a stack of Hessians [n, d, d] in float64; the result has the input's dtype.

    Columns that no input ever used (zero diagonal) get the mean diagonal, so that they round to nearest.

    Args:
        ordered: take the variables by falling diagonal (GPTQ's activation order).

    Raises:
        ArithmeticError: not positive definite even at a hundred times the damping.
    """
    order = None
    H = hessian.to(torch.float64)
    if ordered:
        order = H.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        H = H.gather(1, order[:, :, None].expand_as(H)).gather(2, order[:, None, :].expand_as(H))
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    dead = torch.where(diagonal <= 0, mean, torch.zeros_like(mean))
    upper = torch.empty_like(H)
    left = torch.arange(H.shape[0], device=H.device)  # matrices that no step has mended yet
    for step in _LADDER:
        shift = dead[left] + damping * step * mean[left]
        lower, failed = torch.linalg.cholesky_ex(H[left] + torch.diag_embed(shift))
        inverse = torch.cholesky_inverse(lower)
        # The inverse of a positive definite matrix is one too, up to the rounding that made it unsymmetric.
        upper[left], failed_again = torch.linalg.cholesky_ex((inverse + inverse.mT) / 2, upper=True)
        left = left[(failed > 0) | (failed_again > 0)]
        if left.numel() == 0:
            return InverseFactor(upper.to(hessian.dtype), damping * step, order)
    raise ArithmeticError(f"a Hessian is not positive definite even with damping {damping * _LADDER[-1]}")
