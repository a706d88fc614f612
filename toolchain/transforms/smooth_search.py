"""How strongly to smooth one pair: SmoothQuant's scales with the strength that its own quantization errors ask for.

    s_j = max|X_j|^alpha / max_i|W_ij|^(1 - alpha)        (SmoothQuant, arXiv 2211.10438, eq. 4)

SmoothQuant takes one alpha for the whole model. Here every pair takes, from a grid of alphas and from no smoothing at
all, what gives the least error of the product y = W x per token. With W' = W diag(s), x' = x / s, the weights W' + dW
rounded to the nearest point of their grid, and the activations x' + dx,

    E|dW x'|^2 = tr(dW H' dW^T) / 2, H' = 2 E[x' x'^T] = diag(1/s) H diag(1/s)        and        E|W' dx|^2

are added: errors of rounding are taken to be independent of each other. From the best of these, descent channel by
channel (`smooth_descent`) goes on, and its scales are taken where they have less of the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from toolchain.grids import GridFormat, ScaleSearch, find_grid, round_to_grid
from toolchain.solvers.linear_algebra import remaining_costs
from toolchain.text import spread
from toolchain.transforms.smooth_descent import Objective, Steps, descend

STRENGTHS = tuple(step / 10 for step in range(11))
_SMALLEST_MAXIMUM = 1e-5  # as in SmoothQuant's code
_LARGEST_EXPONENT = 12
_LARGEST_SCALE = 2.0**_LARGEST_EXPONENT


@dataclass(frozen=True, eq=False)
class Smoothing:
    """A choice of scales for one pair.

    Attributes:
        scales: float64 [scales].
        strength: alpha; None for no smoothing. Where descent has gone on, what it began with.
        descended: whether it has.
        weight_error, activation_error: E|dW x'|^2 and E|W' dx|^2 per token.
    """

    scales: Tensor
    strength: float | None
    weight_error: float
    activation_error: float
    descended: bool = False

    @property
    def error(self) -> float:
        """What is compared."""
        return self.weight_error + self.activation_error


def search_smoothing(
    weight: Tensor,
    hessian: Tensor,
    maxima: Tensor,
    samples: Tensor,
    fmt: GridFormat,
    activation: Callable[[Tensor], Tensor],
    *,
    search: ScaleSearch = "minmax",
    shared: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    powers_of_two: bool = True,
    rows: int | None = None,
    dtype: torch.dtype = torch.float64,
    steps: Steps | Literal["unknown"] | None = "unknown",
) -> Smoothing:
    """The scales of one pair with the least error; never more than without smoothing.

    Args:
        weight: [out, in], all that reads the input, stacked.
        hessian: [in, in], 2 E[x x^T], for weights rounded to nearest; or [in], what an error of each column costs once
            the columns after it have made up for it (`solved_costs`), for weights that are solved.
        maxima: [in], the largest |x_j|.
        samples: [tokens, in], some of the inputs.
        fmt, search: the weights' grid.
        activation: what becomes of inputs [tokens, in] when they are quantized.
        shared: int64 [in], which scale each input takes (`value_sharing`); None: each its own.
        powers_of_two: round scales so that they can be folded without rounding.
        rows: how many of the weight's rows, evenly spaced, errors are taken of; None: of all.
        dtype: in which errors are computed.
        steps: of the activations, None where they are in floating point; "unknown" leaves descent out. It is left out
            too where scales are shared and where activations have blocks but the weights no groups.

    Raises:
        ValueError: shapes that do not go together.
    """
    largest, columns = weight.abs().amax(0), weight.shape[1]
    if rows is not None:
        weight = spread(weight, rows)
    weight, hessian, samples = (each.to(dtype) for each in (weight, hessian, samples))
    shared = torch.arange(columns) if shared is None else shared
    if hessian.shape not in ((columns, columns), (columns,)) or {maxima.shape[-1], samples.shape[-1], len(shared)} != {
        columns
    }:
        raise ValueError(f"weight [.., {columns}], Hessian, maxima and samples are not of one width")

    def measured(scales: Tensor, strength: float | None) -> Smoothing:
        own = scales[shared].to(dtype)
        scaled, inputs = weight * own, samples / own
        seen = None
        if search == "hessian":
            whole = hessian if hessian.ndim == 2 else torch.diag(hessian)
            seen = (whole / own / own[:, None])[None]
        grid = find_grid(scaled[None], fmt, search, seen)
        rounded = grid.values(round_to_grid(scaled[None], *grid.expand(columns), fmt.bits))[0]
        change = (rounded - scaled) / own
        moved = (activation(inputs) - inputs) @ scaled.mT
        weighted = change @ hessian if hessian.ndim == 2 else change * hessian
        weight_error = 0.5 * float((weighted * change).sum())
        return Smoothing(scales, strength, weight_error, float(moved.square().sum()) / len(samples))

    best = measured(torch.ones(int(shared.max()) + 1, dtype=torch.float64), None)
    for strength in strengths:
        tried = measured(smoothing_scales(maxima, largest, shared, strength, powers_of_two), strength)
        if tried.error < best.error:
            best = tried
    size = fmt.group_size or columns
    apart = fmt.group_size is None and isinstance(steps, Steps) and steps.blocks  # blocks that are no groups
    if steps == "unknown" or apart or columns % size or not torch.equal(shared, torch.arange(columns)):
        return best
    costs = hessian.diagonal() if hessian.ndim == 2 else hessian
    objective = Objective(weight, 0.5 * costs, samples, size, fmt.bits, steps)
    found = descend(objective, best.scales, _LARGEST_EXPONENT)
    tried = replace(measured(found, best.strength), descended=True)
    return tried if tried.error < best.error else best


def solved_costs(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """What a squared error of each column costs GPTQ, [in]: 1 / U_jj^2 with U the factor of H^-1 in activation order.

    GPTQ (arXiv 2210.17323) lets the columns that are still to come make up for each error, and this is what is left.

    Args:
        hessian: [in, in], 2 E[x x^T].

    Raises:
        ArithmeticError: not positive definite, whatever the damping.
    """
    return remaining_costs(hessian[None], damping)[0]


def smoothing_scales(
    inputs: Tensor, weights: Tensor, shared: Tensor, strength: float, powers_of_two: bool = True
) -> Tensor:
    """s of equation 4, float64 [scales], with a geometric mean of 1 before it is clamped and rounded.

    Args:
        inputs, weights: [in], the largest |x_j| and |W_ij|.
        shared: int64 [in], which scale each takes: of those that share one the largest counts.
    """
    count = int(shared.max()) + 1
    logs = [
        torch.zeros(count, dtype=torch.float64)
        .scatter_reduce(0, shared, each.to(torch.float64), "amax", include_self=True)
        .clamp_min(_SMALLEST_MAXIMUM)
        .log2()
        for each in (inputs, weights)
    ]
    scale = strength * logs[0] - (1 - strength) * logs[1]
    bound = torch.tensor(_LARGEST_SCALE, dtype=torch.float64).log2()
    scale = (scale - scale.mean()).clamp(-bound, bound)
    return torch.exp2(scale.round() if powers_of_two else scale)
