"""Predicted errors: how much each projection of a block, at each bit width, would disturb the residual stream.

All are in one unit, so that projections and blocks can be added up and traded against each other: the mean over tokens
of |e|^2 / |x|^2, e the change of what the block adds to the residual stream, x the stream behind the block. The norms
that read the stream divide by its size, so it is the relative change that later blocks see; and taken token by token,
the few tokens of huge activations count as what they are, a few tokens.

With D = rounded - original weight, e is to first order

    o, down    D z, its output itself
    v          W_O D (A x): BoA's column Hessian of v, and W_O,h^T W_O,h per head for the rows
    q, k       through the softmax: the Gauss-Newton rows (`toolchain.statistics.gauss_newton`)
    gate, up   W_D diag(slope) D x, with the slope by which the other factor and the activation let a change through

and where a family norms what attention and MLP put out, the change is scaled as that norm scales the output. D is not
guessed from a formula but made: GPTQ solves a sample of the rows at each bit width. Rows are solved independently and
their errors are hardly correlated, so of the row Hessians the diagonals are enough, and the sample is scaled up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from toolchain import distributed
from toolchain.block import BlockRunner, Stream
from toolchain.families import DecoderSpec
from toolchain.grids import GridFormat, find_grid
from toolchain.quantized import SUPPORTED_BITS
from toolchain.solvers import gptq
from toolchain.solvers.linear_algebra import InverseFactor, inverse_factor
from toolchain.solvers.refine import losses
from toolchain.statistics.block import BlockStatistics, Wanted, collect
from toolchain.statistics.gauss_newton import POSITIONS

_ROWS = 128  # rows of a projection that are solved
_EVERY = 8  # one token in so many is looked at for the slopes of the MLP

Errors = dict[str, dict[int, float]]


def predict_errors(
    runner: BlockRunner,
    spec: DecoderSpec,
    text: Stream,
    token_weights: list[Tensor] | None,
    output_norms: Mapping[str, nn.Module],
    fmt: GridFormat,
    damping: float,
) -> Errors:
    """Predicted error by role and bits, none of them above that of fewer bits; `text.following` is filled.

    Args:
        text: what the full-precision model takes into this block.
        token_weights: [B, L] per batch, or None for all one.
        output_norms: what norms the outputs of `o` and `down`, by role; empty where they are added as they are.
        fmt: the grids' format but for the bits.
    """
    look = _FirstLook(runner, spec, text, token_weights, output_norms)
    if output_norms:
        stages = {("q", "k", "v", "o"): look.weights["o"], ("gate", "up", "down"): look.weights["down"]}
    else:
        stages = {tuple(runner.parts): look.weights["down"]}
    errors: Errors = {}
    for roles, weights in stages.items():
        stage = tuple(role for role in roles if role in runner.parts)
        wanted = Wanted(attention=True, gauss_newton=True)
        statistics, _ = collect(runner, spec, stage, text, None, wanted, weights)
        scale = distributed.total(sum(float(w.sum(dtype=torch.float64)) for w in weights)) / look.tokens
        drawn = min(POSITIONS, text.hidden[0].shape[1])
        sampled = drawn * distributed.total(sum(float(w.mean(1).sum(dtype=torch.float64)) for w in weights))
        factors: dict[int, InverseFactor] = {}
        for role in stage:
            importance = _importance(runner, spec, statistics, role, sampled, look.slopes)
            columns = statistics.inputs[role].unsqueeze(0)
            if role == "v":
                assert statistics.values is not None
                columns = statistics.values
            if columns.data_ptr() not in factors:
                factors[columns.data_ptr()] = inverse_factor(columns, damping)
            stack = runner.original(role).view(importance.shape[0], -1, columns.shape[-1])
            solved = _solved_errors(stack, columns, factors[columns.data_ptr()], importance, fmt)
            errors[role] = _falling({bits: error * scale / 2 for bits, error in solved.items()})
    return errors


class _FirstLook:
    """What one pass through the block shows before any statistics can be weighted.

    Attributes:
        weights: by role of the half's last projection, [B, L] per batch: one over the power of the stream behind the
            block, times the gain of a norm on that projection's output, times the token's own weight.
        slopes: weighted mean squares [inter] of the factor with which a change of gate's and up's outputs goes on.
        tokens: the sum of the tokens' own weights.
    """

    def __init__(
        self,
        runner: BlockRunner,
        spec: DecoderSpec,
        text: Stream,
        token_weights: list[Tensor] | None,
        output_norms: Mapping[str, nn.Module],
    ) -> None:
        self.weights: dict[str, list[Tensor]] = {"o": [], "down": []}
        width = runner.original("up").shape[0]
        gated = "gate" in runner.parts
        like = runner.original("up")
        self.slopes = {role: like.new_zeros(width) for role in (("gate", "up") if gated else ("up",))}
        seen = tokens = 0.0
        for batch in range(len(text.hidden)):
            taps = runner.run(text, batch, final=False, inputs=("up",), outputs=tuple(output_norms))
            assert taps.hidden is not None
            text.following.append(text.keep(taps.hidden))
            power = taps.hidden.square().sum(-1).clamp_min(torch.finfo(taps.hidden.dtype).tiny)
            own = torch.ones_like(power) if token_weights is None else token_weights[batch].to(power)
            tokens += float(own.sum(dtype=torch.float64))
            for role, weights in self.weights.items():
                gain = _gain(output_norms[role], taps.outputs[role]) if role in output_norms else 1.0
                weights.append(own * gain / power)
            sample = self.weights["down"][-1].reshape(-1)[::_EVERY]
            x = taps.inputs["up"]
            seen += float(sample.sum(dtype=torch.float64))
            for role, slope in _slopes(runner, spec, x.reshape(-1, x.shape[-1])[::_EVERY]).items():
                self.slopes[role] += sample @ slope.square()
        distributed.add_up(*self.slopes.values())
        seen = distributed.total(seen)
        self.tokens = distributed.total(tokens)
        for slope in self.slopes.values():
            slope /= seen


def _gain(norm: nn.Module, output: Tensor) -> Tensor:
    """How much larger the squared size of each token's output is behind its norm, [B, L]."""
    return norm(output).square().sum(-1) / output.square().sum(-1).clamp_min(1e-30)


def _slopes(runner: BlockRunner, spec: DecoderSpec, x: Tensor) -> dict[str, Tensor]:
    """By which factor a change of gate's or up's output reaches the input of down, [tokens, inter] by role."""
    activation = ACT2FN[spec.activation]

    def derivative(y: Tensor) -> Tensor:
        wide, step = y.to(torch.float64), 1e-4
        return ((activation(wide + step) - activation(wide - step)) / (2 * step)).to(y.dtype)

    up = nn.functional.linear(x, runner.original("up"), runner.bias("up"))
    if "gate" not in runner.parts:
        return {"up": derivative(up)}
    gate = nn.functional.linear(x, runner.original("gate"), runner.bias("gate"))
    return {"gate": up * derivative(gate), "up": activation(gate)}


def _importance(
    runner: BlockRunner,
    spec: DecoderSpec,
    statistics: BlockStatistics,
    role: str,
    sampled: float,
    slopes: Mapping[str, Tensor],
) -> Tensor:
    """The row Hessian's diagonal [units, rows]: what the block's output makes of a squared error of each row."""
    if role in ("q", "k"):
        moments = statistics.rows[role].diagonal(dim1=-2, dim2=-1)
        return moments * (spec.attention_scale**2 / sampled)
    if role == "v":
        assert statistics.value_rows is not None
        return statistics.value_rows.diagonal(dim1=-2, dim2=-1)
    if role in slopes:
        return (runner.original("down").square().sum(0) * slopes[role])[None]
    weight = runner.original(role)
    return weight.new_ones(1, weight.shape[0])


def _solved_errors(
    stack: Tensor, columns: Tensor, factor: InverseFactor, importance: Tensor, fmt: GridFormat
) -> dict[int, float]:
    """sum_i importance_i d_i H_col d_i^T of GPTQ's solution at each bit width, from a sample of rows.

    Args:
        stack: [n, rows, columns].
        columns: [1 or n, columns, columns].
        importance: [n, rows].
    """
    units, rows, _ = stack.shape
    count = min(rows, max(1, _ROWS // units))
    chosen = torch.linspace(0, rows - 1, count, device=stack.device).round().to(torch.int64)
    part, weights = stack[:, chosen].contiguous(), importance[:, chosen] * (rows / count)
    errors = {}
    for bits in SUPPORTED_BITS:
        grid = find_grid(part, replace(fmt, bits=bits), "hessian", columns)
        codes = gptq.solve(part, factor.upper, grid)
        loss = losses(grid.values(codes) - part, columns, None)
        errors[bits] = float((loss * weights).sum(dtype=torch.float64))
    return errors


def _falling(errors: dict[int, float]) -> dict[int, float]:
    least = float("inf")
    falling = {}
    for bits in sorted(errors):
        if not math.isfinite(errors[bits]):
            raise ArithmeticError(f"a predicted error at {bits} bits is {errors[bits]}")
        least = falling[bits] = min(least, max(0.0, errors[bits]))
    return falling
