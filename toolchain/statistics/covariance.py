"""Running second moments over tokens: the Hessians of a squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain import distributed

_PANEL = 256


def panels(width: int) -> list[tuple[int, int]]:
    """[start, stop) of the column panels in which a symmetric product is accumulated, down to the diagonal."""
    return [(start, min(start + _PANEL, width)) for start in range(0, width, _PANEL)]


def mirrored(total: Tensor) -> Tensor:
    """The symmetric matrices [..., d, d] whose upper triangles stand in `total`."""
    upper = total.triu()
    return upper + upper.triu(1).mT


class Covariance:
    """Running 2 E[w x x^T], [d, d], and, against a second stream, 2 E[w y x^T].

    Only the blocks on and above the diagonal are accumulated, up to half the work.

    Args:
        like: decides dtype and device.
    """

    def __init__(self, width: int, like: Tensor) -> None:
        self.total = like.new_zeros(width, width)
        self.weight = 0.0
        self._panels = panels(width)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """x [..., d]; weights [...] of the tokens, all one where None."""
        rows = x.reshape(-1, x.shape[-1])
        if weights is None:
            self.weight += rows.shape[0]
        else:
            rows = rows * weights.reshape(-1, 1).sqrt()
            self.weight += float(weights.sum(dtype=torch.float64))
        for start, stop in self._panels:
            self.total[:stop, start:stop].addmm_(rows[:, :stop].mT, rows[:, start:stop])

    def include(self, other: Covariance) -> None:
        """Add what another has accumulated."""
        self.total += other.total
        self.weight += other.weight

    def reduce(self) -> None:
        """On to what all ranks have accumulated."""
        distributed.add_up(self.total)
        self.weight = distributed.total(self.weight)

    def hessian(self) -> Tensor:
        """What was accumulated, symmetric."""
        return mirrored(self.total) * (2.0 / self.weight)


class CrossCovariance:
    """Running 2 E[w y x^T], [rows, columns]."""

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self.total = like.new_zeros(rows, columns)
        self.weight = 0.0

    def add(self, y: Tensor, x: Tensor, weights: Tensor | None = None) -> None:
        """y [..., rows], x [..., columns]; weights [...] of the tokens."""
        left, right = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if weights is None:
            self.weight += left.shape[0]
        else:
            left = left * weights.reshape(-1, 1)
            self.weight += float(weights.sum(dtype=torch.float64))
        self.total.addmm_(left.mT, right)

    def reduce(self) -> None:
        """On to what all ranks have accumulated."""
        distributed.add_up(self.total)
        self.weight = distributed.total(self.weight)

    def mean(self) -> Tensor:
        """What was accumulated."""
        return self.total * (2.0 / self.weight)


def gram_root(gram: Tensor) -> Tensor:
    """L [n, g, g] with L^T L = M, of Gram matrices M [n, g, g] of any rank."""
    values, vectors = torch.linalg.eigh(gram.to(torch.float64))
    return (values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT).to(gram.dtype)
