"""Smoothing scales channel by channel: descent from SmoothQuant's, which follow one exponent for all channels.

An outlier has to be scaled down; the channels that share its token's range need not. With step sizes in the place of
errors (a value rounded with step D is off by D^2 / 12 on average), the two errors of `smooth_search` are

    activations   sum over blocks b of  E_t[D_tb^2] / 12 * sum_{j in b} s_j^2 |W_:j|^2
    weights       sum over groups g of  sum_i D_ig^2 / 12 * sum_{j in g} c_j / s_j^2

D_tb the step of token t in block b (its range, divided by the number of steps), D_ig that of row i in group g, c_j what
an error of column j costs. Each depends on the largest values only, so what doubling or halving one s_j would make of
them is known without rounding anything. One channel of every group is looked at at a time, and a step is taken where
the sum falls: it never rises, and scales that were powers of two stay so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_SWEEPS = 8
_LEAST_GAIN = 1e-6  # relative: below, a step is float32 noise


@dataclass(frozen=True)
class Steps:
    """How activations are quantized, as far as step sizes go.

    Attributes:
        levels: steps in the range.
        blocks: whether every group of columns has a range of its own, the same to both sides; otherwise the whole token
            has one, from its smallest value (or 0) to its largest.
    """

    levels: int
    blocks: bool


# By scheme. A calibrated range belongs to no token, so nothing is known of its step by token.
STEPS: dict[str, Steps | Literal["unknown"] | None] = {
    "per_block": Steps(127, blocks=True),
    "per_token": Steps(255, blocks=False),
    "per_row": Steps(255, blocks=False),
    "static_int8": "unknown",
    "static_uint8": "unknown",
    "float": None,
}


def descend(
    weight: Tensor,
    costs: Tensor,
    samples: Tensor,
    scales: Tensor,
    size: int,
    bits: int,
    steps: Steps | None,
    limit: int,
) -> Tensor:
    """Better scales than `scales`, or the same.

    Args:
        weight: [rows, in].
        costs: [in], what a squared error of each column costs.
        samples: [tokens, in], inputs before smoothing.
        scales: float64 [in].
        size: columns of a group; divides `in`.
        bits: of the weights.
        steps: None for activations in floating point.
        limit: scales stay within 2^-limit and 2^limit.

    Returns:
        float64 [in].
    """
    state = _State(weight, costs, samples, scales, size, bits, steps)
    for _ in range(_SWEEPS):
        if not state.sweep(2.0**limit):
            break
    return state.scales.T.flatten().to(torch.float64)


class _State:
    """All by [channel within its group, ..., group], so that one channel of every group is one slice."""

    def __init__(
        self,
        weight: Tensor,
        costs: Tensor,
        samples: Tensor,
        scales: Tensor,
        size: int,
        bits: int,
        steps: Steps | None,
    ) -> None:
        def arranged(x: Tensor) -> Tensor:  # [..., in] -> [size, ..., groups]
            return x.to(torch.float32).unflatten(-1, (-1, size)).movedim(-1, 0).contiguous()

        self.size, self.steps = size, steps
        self.weight, self.scales = arranged(weight.abs()), arranged(scales)
        self.inputs = arranged(samples.abs() if steps is not None and steps.blocks else samples)
        self.energy = arranged(weight.square().sum(0))  # |W_:j|^2
        self.costs = arranged(costs) / (12 * (2.0 ** (bits - 1) - 0.5) ** 2)

    def sweep(self, bound: float) -> bool:
        """One look at every channel; whether any scale has changed."""
        scales, changed = self.scales, False
        scaled = self.weight * scales[:, None]
        inputs = self.inputs / scales[:, None]
        # Largest values among the channels behind each, as they are, and among those before it, as they have become.
        behind = _suffix_maxima(scaled)
        highs, lows = _suffix_maxima(inputs), _suffix_maxima(-inputs)
        before = torch.zeros_like(scaled[0])
        high = low = torch.zeros_like(inputs[0])
        whole_high, whole_low = torch.maximum(highs[0], high), torch.maximum(lows[0], low)  # of each group
        for channel in range(self.size):
            others = torch.maximum(before, behind[channel + 1])
            other_high = torch.maximum(high, highs[channel + 1])
            other_low = torch.maximum(low, lows[channel + 1])
            old = scales[channel].clone()
            weights = _Weights(self, channel, others)
            activations = _Activations(self, channel, other_high, other_low, whole_high, whole_low)
            now = weights.error(old) + activations.error(old)
            options = [old * 2, old / 2]
            errors = [weights.error(each) + activations.error(each) for each in options]
            for error, option in zip(errors, options, strict=True):
                error[(option > bound) | (option < 1 / bound)] = torch.inf
            up = errors[0] < errors[1]
            gain = now - torch.minimum(*errors)
            take = gain > _LEAST_GAIN * now
            if bool(take.any()):
                new = torch.where(take, torch.where(up, options[0], options[1]), old)
                # Steps in several groups at once may undo each other where a range is shared by all groups.
                if activations.shared and not self._falls(weights, activations, old, new):
                    alone = torch.zeros_like(take)
                    alone[gain.argmax()] = True
                    new = torch.where(alone, new, old)
                scales[channel], changed = new, True
            before = torch.maximum(before, self.weight[channel] * scales[channel])
            own = self.inputs[channel] / scales[channel]
            high, low = torch.maximum(high, own), torch.maximum(low, -own)
            whole_high, whole_low = torch.maximum(other_high, own), torch.maximum(other_low, -own)
        return changed

    @staticmethod
    def _falls(weights: _Weights, activations: _Activations, old: Tensor, new: Tensor) -> bool:
        before, after = (float(weights.error(each).sum()) + activations.whole(each) for each in (old, new))
        return after < before


class _Weights:
    """The weights' error by the scale of one channel of every group; the other channels stay."""

    def __init__(self, state: _State, channel: int, others: Tensor) -> None:
        self._own, self._others, self._cost = state.weight[channel], others, state.costs[channel]
        scales = state.scales
        self._rest = (state.costs / scales.square()).sum(0) - self._cost / scales[channel].square()

    def error(self, scale: Tensor) -> Tensor:
        """[groups] -> [groups]."""
        steps = torch.maximum(self._others, self._own * scale).square().sum(0)
        return steps * (self._rest + self._cost / scale.square())


class _Activations:
    """The same of the activations."""

    def __init__(
        self, state: _State, channel: int, high: Tensor, low: Tensor, whole_high: Tensor, whole_low: Tensor
    ) -> None:
        self._steps, self._own, self._energy = state.steps, state.inputs[channel], state.energy[channel]
        self.shared = self._steps is not None and not self._steps.blocks
        self._high, self._low = high, low
        energies = state.energy * state.scales.square()
        self._rest = energies.sum(0) - self._energy * state.scales[channel].square()
        if self.shared:
            self._everything = energies.sum()
            self._now = self._energy * state.scales[channel].square()
            self._high = torch.maximum(high, _largest_elsewhere(whole_high))
            self._low = torch.maximum(low, _largest_elsewhere(whole_low))
            self._group_high, self._group_low = high, low

    def error(self, scale: Tensor) -> Tensor:
        """[groups] -> [groups]; of shared ranges, of all groups if only this one changed."""
        if self._steps is None:
            return torch.zeros_like(scale)
        own = self._own / scale
        width = torch.maximum(self._high, own)
        energy = self._rest
        if self.shared:
            width = width + torch.maximum(self._low, -own)
            energy = self._everything - self._now
        return self._scaled(width.square().mean(0) * (energy + self._energy * scale.square()))

    def whole(self, scale: Tensor) -> float:
        """Of shared ranges, with all groups changed at once."""
        own = self._own / scale
        high = torch.maximum(self._group_high, own).amax(-1)
        low = torch.maximum(self._group_low, -own).amax(-1)
        energy = (self._rest + self._energy * scale.square()).sum()
        return float(self._scaled((high + low).square().mean() * energy))

    def _scaled(self, error: Tensor) -> Tensor:
        assert self._steps is not None
        return error / (12 * self._steps.levels**2)


def _suffix_maxima(x: Tensor) -> Tensor:
    """x [n, ...] -> [n + 1, ...]: the largest of 0 and x[i:], 0 behind the last."""
    flipped = torch.cat([torch.zeros_like(x[:1]), x.flip(0)])
    return flipped.cummax(0).values.flip(0)


def _largest_elsewhere(x: Tensor) -> Tensor:
    """x [tokens, groups] -> the largest of the other groups, 0 where there is none."""
    if x.shape[-1] == 1:
        return torch.zeros_like(x)
    top = x.topk(2, -1)
    own = torch.arange(x.shape[-1], device=x.device)
    return torch.where(top.indices[:, :1] == own, top.values[:, 1:], top.values[:, :1])
