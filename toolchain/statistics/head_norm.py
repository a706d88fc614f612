"""Norms on each head of q and k (Qwen3, Gemma 3): what they do to a row Hessian.

With y = W x of one head, the norm puts out z = g o y / r, r = sqrt(|y|^2 / hd + eps), and a change of y reaches z by

    J = diag(g) (I - u u^T / hd) / r,    u = y / r

so a row Hessian M of z becomes E[J^T M J] of W, the mean over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolchain import distributed

_SAMPLE = 4096  # tokens


class HeadNorm:
    """The norm behind one projection, and a sample of what goes into it.

    Args:
        weight: of the projection, [heads * hd, d]; bias [heads * hd] or None.
        gain: what the norm multiplies by, [hd].
        batches: how many batches the sample will be taken from.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gain: Tensor, eps: float, batches: int) -> None:
        self._weight, self._bias, self._gain, self._eps = weight, bias, gain, eps
        self._per_batch = -(-_SAMPLE // batches)
        self._generator = torch.Generator().manual_seed(0)
        self._samples: list[Tensor] = []
        self._weights: list[Tensor] = []

    def before(self, x: Tensor) -> Tensor:
        """y [n, heads, hd] of the projection's input x [n, d]."""
        return nn.functional.linear(x, self._weight, self._bias).unflatten(-1, (-1, self._gain.shape[0]))

    def add(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        """x [..., d], of which a random part is kept; token_weights [...]."""
        rows = x.reshape(-1, x.shape[-1])
        chosen = torch.randperm(rows.shape[0], generator=self._generator)[: self._per_batch]
        self._samples.append(self.before(rows[chosen]))
        weights = rows.new_ones(chosen.shape[0]) if token_weights is None else token_weights.reshape(-1)[chosen]
        self._weights.append(weights)

    def skip(self, batches: list[int]) -> None:
        """Draw what other ranks draw for their batches of so many tokens, which come before this rank's."""
        for tokens in batches:
            torch.randperm(tokens, generator=self._generator)

    def reduce(self) -> None:
        """On to the samples of all ranks."""
        self._samples, self._weights = (_of_all(parts, self._gain.device) for parts in (self._samples, self._weights))

    def mean(self, hessians: Tensor) -> Tensor:
        """E[J^T M J] over the sample, exactly: M [heads, hd, hd] of what the norm puts out -> the same shape."""
        weights = torch.cat(self._weights).to(torch.float64)
        weights = weights / weights.sum()
        samples = torch.cat(self._samples)
        gain = self._gain.to(torch.float64)
        result = torch.empty_like(hessians)
        for head, hessian in enumerate(hessians):
            y = samples[:, head].to(torch.float64)
            hd = y.shape[1]
            square = y.square().mean(1) + self._eps
            u = y / square.sqrt()[:, None]
            shares = weights / square
            inner = gain[:, None] * hessian.to(torch.float64) * gain
            outer = (u * (shares / hd)[:, None]).mT @ u
            pulls = ((u @ inner) * u).sum(1)
            along = (u * (shares * pulls / hd**2)[:, None]).mT @ u
            result[head] = shares.sum() * inner - outer @ inner - inner @ outer + along
        return result

    def pull_back(self, vectors: Tensor, y: Tensor) -> Tensor:
        """J^T on the last dimension of vectors [n, m, hd], at y [n, hd]."""
        root = (y.square().mean(-1) + self._eps).sqrt()[:, None, None]
        u = y[:, None, :] / root
        scaled = vectors * self._gain
        return (scaled - (scaled * u).sum(-1, keepdim=True) * u / y.shape[-1]) / root


def _of_all(parts: list[Tensor], place: torch.device) -> list[Tensor]:
    """The tensors of all ranks; by way of the processor, since each rank has a device of its own."""
    return [part.to(place) for own in distributed.gather([part.cpu() for part in parts]) for part in own]
