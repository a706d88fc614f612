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


@dataclass(frozen=True, eq=False)
class Objective:
    """What the sum above is taken of.

    Attributes:
        weight: [rows, in].
        costs: [in], what a squared error of each column costs.
        samples: [tokens, in], inputs before smoothing.
        size: columns of a group; divides `in`.
        bits: of the weights.
        steps: None for activations in floating point.
    """

    weight: Tensor
    costs: Tensor
    samples: Tensor
    size: int
    bits: int
    steps: Steps | None


def descend(objective: Objective, scales: Tensor, limit: int) -> Tensor:
    """Better scales than `scales`, or the same.

    Args:
        scales: float64 [in].
        limit: scales stay within 2^-limit and 2^limit.

    Returns:
        float64 [in].
    """
    state = _State(objective, scales)
    for _ in range(_SWEEPS):
        if not state.sweep(2.0**limit):
            break
    return state.scales.T.flatten().to(torch.float64)


class _State:
    """All by [channel within its group, ..., group], so that one channel of every group is one slice."""

    def __init__(self, objective: Objective, scales: Tensor) -> None:
        def arranged(x: Tensor) -> Tensor:  # [..., in] -> [size, ..., groups]
            return x.to(torch.float32).unflatten(-1, (-1, objective.size)).movedim(-1, 0).contiguous()

        self.size, self.steps = objective.size, objective.steps
        self.weight, self.scales = arranged(objective.weight.abs()), arranged(scales)
        blocks = self.steps is not None and self.steps.blocks
        self.inputs = arranged(objective.samples.abs() if blocks else objective.samples)
        self.energy = arranged(objective.weight.square().sum(0))  # |W_:j|^2
        self.costs = arranged(objective.costs) / (12 * (2.0 ** (objective.bits - 1) - 0.5) ** 2)

    def sweep(self, bound: float) -> bool:
        """One look at every channel; whether any scale has changed."""
        scales, changed = self.scales, False
        widest = _Maxima(self.weight * scales[:, None])
        ranges = None if self.steps is None else _Ranges(self, self.steps)
        for channel in range(self.size):
            old = scales[channel].clone()
            weights = _Weights(self, channel, widest.others(channel))
            activations = None if ranges is None else _Activations(self, channel, ranges)
            now, options = _error(weights, activations, old), [old * 2, old / 2]
            errors = [_error(weights, activations, each) for each in options]
            for error, option in zip(errors, options, strict=True):
                error[(option > bound) | (option < 1 / bound)] = torch.inf
            up = errors[0] < errors[1]
            gain = now - torch.minimum(*errors)
            take = gain > _LEAST_GAIN * now
            if bool(take.any()):
                new = torch.where(take, torch.where(up, options[0], options[1]), old)
                # Steps in several groups at once may undo each other where a range is shared by all groups.
                if activations is not None and activations.shared and not self._falls(weights, activations, old, new):
                    alone = torch.zeros_like(take)
                    alone[gain.argmax()] = True
                    new = torch.where(alone, new, old)
                scales[channel], changed = new, True
            widest.add(self.weight[channel] * scales[channel])
            if ranges is not None:
                ranges.add(self.inputs[channel] / scales[channel])
        return changed

    @staticmethod
    def _falls(weights: _Weights, activations: _Activations, old: Tensor, new: Tensor) -> bool:
        before, after = (float(weights.error(each).sum()) + activations.whole(each) for each in (old, new))
        return after < before


class _Maxima:
    """The largest values, or 0, over all channels of a group but one: of those before it as they have become."""

    def __init__(self, values: Tensor) -> None:
        """values: [size, ..., groups]."""
        self._before, self._behind = torch.zeros_like(values[0]), _suffix_maxima(values)

    def others(self, channel: int) -> Tensor:
        """[..., groups]. Those before `channel` have been added."""
        return torch.maximum(self._before, self._behind[channel + 1])

    def add(self, values: Tensor) -> None:
        """values: [..., groups], what the next channel has become."""
        self._before = torch.maximum(self._before, values)


class _Ranges:
    """The two ends of every token's range."""

    def __init__(self, state: _State, steps: Steps) -> None:
        inputs = state.inputs / state.scales[:, None]
        self.steps, self.high, self.low = steps, _Maxima(inputs), _Maxima(-inputs)

    def add(self, values: Tensor) -> None:
        """values: [tokens, groups]."""
        self.high.add(values)
        self.low.add(-values)


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

    def __init__(self, state: _State, channel: int, ranges: _Ranges) -> None:
        self._levels, self.shared = ranges.steps.levels, not ranges.steps.blocks
        self._own, self._energy = state.inputs[channel], state.energy[channel]
        energies = state.energy * state.scales.square()
        self._group_high, self._group_low = ranges.high.others(channel), ranges.low.others(channel)
        self._group_rest = energies.sum(0) - energies[channel]
        # What stays while the channel of one group changes: the rest of its group or, of a shared range, of all groups.
        self._high, self._low, self._rest = self._group_high, self._group_low, self._group_rest
        if self.shared:
            own = self._own / state.scales[channel]
            self._high = torch.maximum(self._high, _largest_elsewhere(torch.maximum(self._group_high, own)))
            self._low = torch.maximum(self._low, _largest_elsewhere(torch.maximum(self._group_low, -own)))
            self._rest = energies.sum() - energies[channel]

    def error(self, scale: Tensor) -> Tensor:
        """[groups] -> [groups]; of shared ranges, of all groups if only this one changed."""
        own = self._own / scale
        width = torch.maximum(self._high, own)
        if self.shared:
            width = width + torch.maximum(self._low, -own)
        return self._scaled(width.square().mean(0) * (self._rest + self._energy * scale.square()))

    def whole(self, scale: Tensor) -> float:
        """Of shared ranges, with all groups changed at once."""
        own = self._own / scale
        high = torch.maximum(self._group_high, own).amax(-1)
        low = torch.maximum(self._group_low, -own).amax(-1)
        energy = (self._group_rest + self._energy * scale.square()).sum()
        return float(self._scaled((high + low).square().mean() * energy))

    def _scaled(self, error: Tensor) -> Tensor:
        return error / (12 * self._levels**2)


def _error(weights: _Weights, activations: _Activations | None, scale: Tensor) -> Tensor:
    """[groups] -> [groups], of both; None for activations in floating point."""
    own = weights.error(scale)
    return own if activations is None else own + activations.error(scale)


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
