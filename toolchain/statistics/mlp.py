"""Row Hessians of the projections before a gated (or plain) activation: what the MLP's output makes of their errors.

With y = W_D (s(g) o u), a change of u reaches the output by W_D diag(s(g)), one of g by W_D diag(u o s'(g)). So

    up     E[x x^T] (x) (W_D^T W_D o E[s s^T])
    gate   E[x x^T] (x) (W_D^T W_D o E[r r^T]),  r = u o s'(g)

the expectation of a product again replaced by the product of expectations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toolchain.statistics.covariance import Covariance

Activation = Callable[[Tensor], Tensor]


class MlpRows:
    """Accumulates E[s s^T] and, with a gate, E[r r^T] over a sample of tokens.

    Args:
        up, gate: original weights [inter, d]; gate None for a plain MLP.
        every: one token in so many is looked at.
    """

    def __init__(
        self,
        up: Tensor,
        gate: Tensor | None,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
        activation: Activation,
        every: int = 8,
    ) -> None:
        self._up, self._gate, self._up_bias, self._gate_bias = up, gate, up_bias, gate_bias
        self._activation, self._every = activation, every
        self._slopes = {role: Covariance(up.shape[0], up) for role in (("gate", "up") if gate is not None else ("up",))}

    def add(self, x: Tensor, token_weights: Tensor | None) -> None:
        """x [..., d], the MLP's input."""
        rows = x.reshape(-1, x.shape[-1])[:: self._every]
        weights = None if token_weights is None else token_weights.reshape(-1)[:: self._every]
        up = torch.nn.functional.linear(rows, self._up, self._up_bias)
        if self._gate is None:
            self._slopes["up"].add(self._slope(up), weights)
            return
        gate = torch.nn.functional.linear(rows, self._gate, self._gate_bias)
        self._slopes["up"].add(self._activation(gate), weights)
        self._slopes["gate"].add(up * self._slope(gate), weights)

    def _slope(self, x: Tensor) -> Tensor:
        """The activation's derivative, by central differences in float64: it serves any activation."""
        wide, step = x.to(torch.float64), 1e-4
        return ((self._activation(wide + step) - self._activation(wide - step)) / (2 * step)).to(x.dtype)

    def hessians(self, down: Tensor) -> dict[str, Tensor]:
        """Row Hessians [1, inter, inter] by role; down [d, inter]."""
        gram = down.mT @ down
        return {role: (gram * slope.hessian()).unsqueeze(0) for role, slope in self._slopes.items()}
