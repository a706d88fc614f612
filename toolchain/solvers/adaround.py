"""Learned rounding on the stored loss tr(H_row D H_col D^T): each weight goes to one of its two neighbouring codes.

AdaRound (arXiv 2004.10568) with the objective of aespa (arXiv 2402.08958): the Hessians hold all that the loss needs of
the data, so every step sees the whole calibration text at the cost of one matrix product per Hessian. With a code
c = low + h, h = clamp(1.2 sigmoid(v) - 0.1, 0, 1), the logits v follow Adam on

    tr(H_row D H_col D^T) / unit + strength sum(1 - |2 h - 1|^b),   D = s (low + h - z) - w

b falls from 20 to 2 once a fifth of the steps, which go without the second term, is over. The unit is the mean of
s^2 H_row,ii H_col,jj over the weights of a problem, which makes the strength a number without scale. The gradient is
written out, so this runs under `torch.inference_mode`; nothing is random.

A problem is a row where H_row is the identity, a head otherwise; the learned codes are kept where they are better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.grids import Grid
from toolchain.quantized import code_range
from toolchain.solvers.linear_algebra import InverseFactor
from toolchain.solvers.refine import losses

_LOWEST, _HIGHEST = -0.1, 1.1  # of the rectified sigmoid before it is clamped
_STIFFEST, _SOFTEST = 20.0, 2.0  # the exponent b, at the beginning and at the end
_WARM_UP = 0.2
_BETAS = (0.9, 0.999)
_RATE, _RATE_STEPS = 0.015, 2000
_CHUNK = 1 << 17  # weights learned at a time, so that a step's buffers stay in the processor's cache


def compensated(
    target: Tensor, codes: Tensor, grid: Grid, column_factor: InverseFactor, row_factor: InverseFactor | None
) -> Tensor:
    """What each weight had become when GPTQ (or BoA's two-sided solver) rounded it, from the codes it arrived at.

    W - Q = U_r^T E U_c with the solver's errors E, and a weight stood at q + e U_r,ii U_c,jj.

    Args:
        target, codes: [n, rows, columns].
        column_factor, row_factor: those the codes were solved with.
    Returns: [n, rows, columns].
    """
    scales, zeros = grid.expand(target.shape[-1])
    rounded = (codes - zeros) * scales

    upper = column_factor.upper.expand(target.shape[0], -1, -1)
    errors = torch.linalg.solve_triangular(upper, column_factor.take(target - rounded, 2), upper=True, left=False)
    errors = column_factor.put_back(errors * upper.diagonal(dim1=-2, dim2=-1)[:, None, :], 2)
    if row_factor is not None:
        upper = row_factor.upper
        errors = torch.linalg.solve_triangular(upper.mT, row_factor.take(errors, 1), upper=False)
        errors = row_factor.put_back(errors * upper.diagonal(dim1=-2, dim2=-1)[:, :, None], 1)
    return rounded + errors


def learn_rounding(
    target: Tensor,
    codes: Tensor,
    start: Tensor,
    grid: Grid,
    columns: Tensor,
    rows: Tensor | None,
    iterations: int,
    *,
    learning_rate: float | None = None,
    strength: float = 3.0,
) -> Tensor:
    """Codes [n, rows, columns] (float holding integers) of a loss that is nowhere higher.

    Args:
        target: what the codes are to stand for, [n, rows, columns], float.
        codes: the solution to start from, [n, rows, columns], float holding integers in the grid's range.
        start: weights whose place between two codes the logits start at (`compensated`), [n, rows, columns].
        columns: [1 or n, columns, columns], H_col.
        rows: [n, rows, rows], H_row, or None for the identity.
        iterations: steps; none leaves the codes as they are.
        learning_rate: of Adam; None takes the published 0.015 of 2000 steps times sqrt(2000 / iterations): with fewer
            steps the logits have to go as far.
    """
    n, height, width = target.shape
    scales, zeros = grid.expand(width)
    if learning_rate is None:
        learning_rate = _RATE * (_RATE_STEPS / max(1, iterations)) ** 0.5
    low, place = neighbours(codes, start / scales + zeros, grid.format.bits)
    learned = torch.empty_like(codes)
    step = height if rows is not None else max(1, _CHUNK // width)
    for unit in range(n):
        own_rows = None if rows is None else rows[unit]
        own_columns = columns[unit if columns.shape[0] > 1 else 0]
        for first in range(0, height, step):
            part = (unit, slice(first, first + step))
            learned[part] = _learn(
                place[part],
                (low[part] - zeros[part]) * scales[part] - target[part],
                scales[part],
                own_columns,
                own_rows,
                iterations,
                learning_rate,
                strength,
            )
    learned += low
    before = losses((codes - zeros) * scales - target, columns, rows)
    after = losses((learned - zeros) * scales - target, columns, rows)
    return torch.where((after < before)[..., None], learned, codes)


def neighbours(codes: Tensor, place: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The lower of the two codes that each weight may take, and where between them, in [0, 1], it starts.

    Rounding the start gives `codes` back, whatever `place` (a weight in steps, zero point included) says.
    """
    lowest, highest = code_range(bits)
    low = torch.where(place < codes, codes - 1, codes).clamp_(lowest, highest - 1)
    upper = codes > low
    return low, torch.where(upper, (place - low).clamp(0.5, 1), (place - low).clamp(0, 0.49))


def gradient(
    logits: Tensor,
    offset: Tensor,
    scales: Tensor,
    columns: Tensor,
    rows: Tensor | None,
    factor: Tensor,
    pressure: float,
    exponent: float,
) -> Tensor:
    """Derivative of sum(factor H_row D H_col o D) / 2 + pressure sum(1 - |2 h - 1|^exponent) by the logits.

    Args:
        logits, offset, scales: [rows, columns]; D = scales h + offset.
        factor: [rows, 1] or [1, 1], one over half the unit.
    """
    sigmoid = torch.sigmoid(logits)
    h = (sigmoid * (_HIGHEST - _LOWEST)).add_(_LOWEST).clamp_(0, 1)
    result = torch.addcmul(offset, scales, h) @ columns
    if rows is not None:
        result = rows @ result
    result.mul_(scales).mul_(factor)
    inside = (h > 0) & (h < 1)
    if pressure:
        h.mul_(2).sub_(1)
        result.sub_(h.abs().pow_(exponent - 1).mul_(h.sign_()), alpha=2 * exponent * pressure)
    slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1).mul_(inside)
    return result.mul_(slope).mul_(_HIGHEST - _LOWEST)


def _learn(
    place: Tensor,
    offset: Tensor,
    scales: Tensor,
    columns: Tensor,
    rows: Tensor | None,
    iterations: int,
    learning_rate: float,
    strength: float,
) -> Tensor:
    """Which neighbour each weight of [rows, columns] goes to: 0 or 1."""
    share = (place - _LOWEST) / (_HIGHEST - _LOWEST)
    logits = torch.log(share / (1 - share))
    curvature = scales.square() * columns.diagonal()
    unit = (
        curvature.mean(-1, keepdim=True) if rows is None else (curvature * rows.diagonal()[:, None]).mean()[None, None]
    )
    factor = 2 / unit.clamp_min(torch.finfo(unit.dtype).tiny)
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    warm_up = int(_WARM_UP * iterations)
    for step in range(iterations):
        left = 1 - max(0, step - warm_up) / max(1, iterations - warm_up)
        exponent = _SOFTEST + (_STIFFEST - _SOFTEST) * left
        pressure = 0.0 if step < warm_up else strength
        slope = gradient(logits, offset, scales, columns, rows, factor, pressure, exponent)
        first.lerp_(slope, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
        spread = (second / (1 - _BETAS[1] ** (step + 1))).sqrt_().add_(1e-8)
        logits.addcdiv_(first, spread, value=-learning_rate / (1 - _BETAS[0] ** (step + 1)))
    return (logits >= 0).to(place.dtype)
