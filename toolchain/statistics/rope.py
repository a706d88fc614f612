"""What rotary position embedding does to a row Hessian: its mean over the positions, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def position_mean(covariance: Tensor, inv_freq: Tensor, positions: int) -> Tensor:
    """mean over l in [0, positions) of R_l^T C R_l, without a rotation per position.

    A post-RoPE key k = R_m k' meets a query R_l W x, so W_Q's row Hessian is the mean of R_l^T E[k k^T] R_l (and the
    other way round for W_K). Writing each pair (a, a + hd/2) as one complex number, a rotation is a phase, and the mean
    multiplies the two complex parts of C elementwise by means of phases.

    Args:
        covariance: [..., hd, hd], symmetric.
        inv_freq: [hd / 2], radians per position.
    Returns: [..., hd, hd], in the dtype of `covariance`.
    """
    C = covariance.to(torch.float64)
    half = C.shape[-1] // 2
    C11, C12, C22 = C[..., :half, :half], C[..., :half, half:], C[..., half:, half:]
    same = torch.complex((C11 + C22) / 2, -(C12 - C12.mT) / 2)
    mixed = torch.complex((C11 - C22) / 2, -(C12 + C12.mT) / 2)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inv_freq.to(torch.float64)
    phases = torch.polar(torch.ones_like(angles), angles)
    same = same * (phases.conj().mT @ phases / positions)
    mixed = mixed * (phases.mT @ phases / positions)
    top = torch.cat([(same + mixed).real, -(same + mixed).imag], -1)
    bottom = torch.cat([-(same + mixed).imag.mT, (same - mixed).real], -1)
    return torch.cat([top, bottom], -2).to(covariance.dtype)


def turn_back(vectors: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """R_l^T on the last dimension of vectors [P, n, hd], l = positions[p] int64 [P]."""
    half = vectors.shape[-1] // 2
    angles = positions.to(torch.float64)[:, None] * inv_freq.to(torch.float64)
    cos, sin = (part.to(vectors.dtype)[:, None, :] for part in (angles.cos(), angles.sin()))
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
