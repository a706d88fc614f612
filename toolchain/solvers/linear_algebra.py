"""The factor that GPTQ-like solvers need of a Hessian, with bounded, reported damping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LADDER = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U with H^-1 = U^T U, after damping H += damping * mean(diag H) * I.

    Attributes:
        upper: [n, d, d].
        damping: the relative damping that was used; above the one asked for where H was not positive definite.
    """

    upper: Tensor
    damping: float


def inverse_factor(hessian: Tensor, damping: float) -> InverseFactor:
    """Factor a stack of Hessians [n, d, d] in float64; the result has the input's dtype.

    Columns that no input ever used (zero diagonal) get the mean diagonal, so that they round to nearest.

    Raises:
        ArithmeticError: not positive definite even at a hundred times the damping.
    """
    H = hessian.to(torch.float64)
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    dead = torch.where(diagonal <= 0, mean, torch.zeros_like(mean))
    for step in _LADDER:
        shift = dead + damping * step * mean
        lower, failed = torch.linalg.cholesky_ex(H + torch.diag_embed(shift))
        if not bool(failed.any()):
            inverse = torch.cholesky_inverse(lower)
            # The inverse of a positive definite matrix is one too, up to the rounding that made it unsymmetric.
            upper, failed = torch.linalg.cholesky_ex((inverse + inverse.mT) / 2, upper=True)
            if not bool(failed.any()):
                return InverseFactor(upper.to(hessian.dtype), damping * step)
    raise ArithmeticError(f"a Hessian is not positive definite even with damping {damping * _LADDER[-1]}")
