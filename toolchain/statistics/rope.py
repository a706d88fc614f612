"""What rotary position embedding does to a row Hessian: its mean over the positions, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def position_mean(covariance: Tensor, inv_freq: Tensor, positions: int, scaling: float = 1.0) -> Tensor:
    """mean over l in [0, positions) of R_l^T C R_l, without a rotation per position.

    A post-RoPE key k = R_m k' meets a query R_l W x, so W_Q's row Hessian is the mean of R_l^T E[k k^T] R_l (and the
    other way round for W_K). Writing each pair (a, a + hd/2) as one complex number, a rotation is a phase, and the mean
    multiplies the two complex parts of C elementwise by means of phases.

    Args:
        covariance: [..., hd, hd], symmetric.
        inv_freq: [turning / 2], radians per position; the channels from `turning` on are not turned.
        scaling: factor on the turned channels.
    Returns: [..., hd, hd], in the dtype of `covariance`.
    """
    hd, turning = covariance.shape[-1], 2 * inv_freq.shape[-1]
    if turning == 0:
        return covariance
    inv_freq = inv_freq.to(covariance.device)
    if turning < hd:
        # Channels that stay are pairs that turn by nothing.
        order = torch.cat(
            [part.view(2, -1) for part in torch.arange(hd, device=covariance.device).split([turning, hd - turning])], 1
        ).flatten()
        back = order.argsort()
        gain = covariance.new_ones(hd)
        gain[order < turning] = scaling
        ordered = gain[:, None] * covariance[..., order, :][..., order] * gain
        still = inv_freq.new_zeros((hd - turning) // 2)
        return position_mean(ordered, torch.cat([inv_freq, still]), positions)[..., back, :][..., back]
    C = covariance.to(torch.float64) * scaling**2
    half = hd // 2
    C11, C12, C22 = C[..., :half, :half], C[..., :half, half:], C[..., half:, half:]
    same = torch.complex((C11 + C22) / 2, -(C12 - C12.mT) / 2)
    mixed = torch.complex((C11 - C22) / 2, -(C12 + C12.mT) / 2)
    angles = torch.arange(positions, dtype=torch.float64, device=C.device)[:, None] * inv_freq.to(torch.float64)
    phases = torch.polar(torch.ones_like(angles), angles)
    same = same * (phases.conj().mT @ phases / positions)
    mixed = mixed * (phases.mT @ phases / positions)
    top = torch.cat([(same + mixed).real, -(same + mixed).imag], -1)
    bottom = torch.cat([-(same + mixed).imag.mT, (same - mixed).real], -1)
    return torch.cat([top, bottom], -2).to(covariance.dtype)


def turn_back(vectors: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float = 1.0) -> Tensor:
    """R_l^T on the last dimension of vectors [P, n, hd], l = positions[p] int64 [P]; see `position_mean`."""
    half = inv_freq.shape[-1]
    angles = positions.to(torch.float64)[:, None] * inv_freq.to(torch.float64)
    cos, sin = (scaling * part.to(vectors)[:, None, :] for part in (angles.cos(), angles.sin()))
    first, second, still = vectors[..., :half], vectors[..., half : 2 * half], vectors[..., 2 * half :]
    return torch.cat([first * cos + second * sin, second * cos - first * sin, still], -1)
