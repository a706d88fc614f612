"""The factor that GPTQ-like solvers need of a Hessian, with bounded, reported damping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = (10.0, 100.0)  # of the damping asked for, where that does not do
_SMALLEST_BLOCK = 64


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

    def costs(self) -> Tensor:
        """1 / U_jj^2, [n, d] in the variables' own order: what a squared error of each costs once those after it have
        made up for it.
        """
        return self.put_back(self.upper.diagonal(dim1=1, dim2=2).square().reciprocal()[:, None], 2)[:, 0]

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
    lower, used, order = _from_the_end(hessian, damping, ordered)
    _invert(lower)
    return InverseFactor(lower.to(hessian.dtype).flip(1, 2), used, order)


def remaining_costs(hessian: Tensor, damping: float) -> Tensor:
    """1 / U_jj^2 of the factor in activation order, [n, d] in the variables' own order: what a squared error of each
    costs once those after it have made up for it.

    Args, Raises: as `inverse_factor`.
    """
    lower, used, order = _from_the_end(hessian, damping, ordered=True)
    costs = lower.diagonal(dim1=1, dim2=2).flip(1).square().to(hessian.dtype)
    return InverseFactor(costs, used, order).put_back(costs[:, None], 2)[:, 0]


def _invert(lower: Tensor) -> None:
    """Lower triangular matrices [n, d, d] become their inverses, by halves: matrix products do nearly all of it.

    In place, since at 8192 columns each copy is half a gigabyte.
    """
    size = lower.shape[-1]
    if size <= _SMALLEST_BLOCK:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, last, between = lower[:, :half, :half], lower[:, half:, half:], lower[:, half:, :half]
    _invert(first)
    _invert(last)
    between.copy_(last @ between @ first).neg_()


def _from_the_end(hessian: Tensor, damping: float, ordered: bool) -> tuple[Tensor, float, Tensor | None]:
    """Lower triangular L [n, d, d] in float64 with L L^T the damped Hessian, its variables taken from the last to the
    first: H = J L L^T J with the reversal J, so that U = J L^-1 J. With it, the damping used and the order.
    """
    order = None
    if ordered:
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        last_first = order.flip(-1)
        H = hessian.gather(1, last_first[:, :, None].expand_as(hessian))
        H = H.gather(2, last_first[:, None, :].expand_as(hessian))
    else:
        H = hessian.flip(1, 2)
    H = H.to(torch.float64)
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    own = diagonal.clone()
    mean = own.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    own += torch.where(own <= 0, mean, torch.zeros_like(mean))
    diagonal.copy_(own + damping * mean)
    lower, failed = torch.linalg.cholesky_ex(H)
    used = damping
    left = failed.nonzero()[:, 0]  # matrices that no step has mended yet
    for step in _STEPS:
        if left.numel() == 0:
            break
        used = damping * step
        diagonal[left] = own[left] + used * mean[left]
        lower[left], failed = torch.linalg.cholesky_ex(H[left])
        left = left[failed > 0]
    if left.numel():
        raise ArithmeticError(f"a Hessian is not positive definite even with damping {used}")
    return lower, used, order
