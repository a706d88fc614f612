"""From the statistics of a stage to the codes of its projections."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from toolchain import distributed
from toolchain.families import DecoderSpec
from toolchain.grids import Grid, GridFormat, ScaleSearch, find_grid, scaled
from toolchain.options import Options
from toolchain.quantized import QuantizedWeight, stack_rows
from toolchain.solvers import boa, gptq, rtn
from toolchain.solvers.adaround import compensated, learn_rounding
from toolchain.solvers.linear_algebra import InverseFactor, inverse_factor
from toolchain.solvers.refine import descend, losses, refit_scales, weigh
from toolchain.statistics.block import BlockStatistics
from toolchain.statistics.rope import position_mean

# How many times further the two-sided solution may move a head's weights than the one-sided one does.
_FURTHEST = 2.0
_SCALE_STEP = 0.07  # between scales that are tried


@dataclass(frozen=True)
class Settings:
    """What the recipe says of every projection.

    Attributes:
        bits: by role, where projections have bits of their own.
    """

    format: GridFormat
    search: ScaleSearch
    damping: float
    bits: Mapping[str, int] = field(default_factory=dict)

    def of(self, role: str) -> Settings:
        """Those of one projection."""
        return replace(self, format=replace(self.format, bits=self.bits.get(role, self.format.bits)))


@dataclass(frozen=True)
class SolvedLayer:
    """One projection, solved.

    Attributes:
        loss: tr(H_row D H_col D^T) of the distance D from what the codes were to stand for, in the method's own metric,
            per token; None without statistics.
        relative_loss: the same, relative to that of the weight itself.
        output_error: |D X|^2 / |W X|^2 of the distance from the original weight: the same metric for every method.
        damping: the largest relative damping that was needed.
        fallback_heads: heads that the safety net has given GPTQ's codes; None where it had nothing to decide.
    """

    weight: QuantizedWeight
    loss: float | None
    relative_loss: float | None
    output_error: float | None
    damping: float | None
    seconds: float
    fallback_heads: list[int] | None = None


def round_stage(weights: Mapping[str, Tensor], settings: Settings) -> dict[str, SolvedLayer]:
    """Every projection rounded to nearest; weights [out, in] by role."""
    solved = {}
    for role, weight in weights.items():
        start = time.monotonic()
        stack = weight.unsqueeze(0)
        grid = find_grid(stack, settings.of(role).format, settings.search)
        quantized = grid.quantized(rtn.solve(stack, grid)).cpu()
        solved[role] = SolvedLayer(quantized, None, None, None, None, time.monotonic() - start)
    return solved


def solve_stage(
    spec: DecoderSpec,
    weights: Mapping[str, Tensor],
    statistics: BlockStatistics,
    settings: Settings,
    options: Options,
    held_out: BlockStatistics | None = None,
) -> dict[str, SolvedLayer]:
    """Codes of the projections of one stage.

    Args:
        weights: original weights [out, in] by role.
        held_out: the same statistics of text that `statistics` has not seen, for the safety net; None for no net.
    """
    factors = _Factors(settings.damping, options.activation_order)
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    if options.attention_rows != "none":
        rows, columns = _attention_hessians(spec, statistics)
    unseen = None if held_out is None else _attention_hessians(spec, held_out)
    if options.attention_rows == "aespa":
        rows.pop("v", None)
    solved = {}
    for turn, (role, weight) in enumerate(weights.items()):
        start = time.monotonic()
        inputs = statistics.inputs[role].unsqueeze(0)
        target = _target(weight, statistics, role, factors.of(inputs), options.deviation)
        row_hessian = rows.get(role)
        column_hessian = columns.get(role, inputs)
        units = column_hessian.shape[0] if row_hessian is None else row_hessian.shape[0]
        stack = target.view(units, -1, weight.shape[1])
        solution = _solve_together(stack, column_hessian, row_hessian, settings.of(role), options, factors, turn)
        fallback: list[int] | None = None
        if held_out is not None and unseen is not None and row_hessian is not None:
            plain = _solve_together(stack, inputs, None, settings.of(role), options, factors, turn)
            unseen_columns = unseen[1].get(role, held_out.inputs[role].unsqueeze(0))
            solution, fallback = _safer(stack, solution, plain, unseen_columns, unseen[0][role])
            if fallback:
                distance = losses(solution.grid.values(solution.codes) - stack, column_hessian, row_hessian)
                solution = replace(solution, loss=float(distance.sum(dtype=torch.float64)))
        quantized = solution.grid.quantized(solution.codes)
        change = (quantized.dequantize() - weight)[None]
        output_size = size = float(losses(weight[None], inputs, None).sum(dtype=torch.float64))
        if role in columns or row_hessian is not None:
            size = float(losses(weight.view_as(stack), column_hessian, row_hessian).sum(dtype=torch.float64))
        output_error = float(losses(change, inputs, None).sum(dtype=torch.float64))
        solved[role] = SolvedLayer(
            weight=quantized.cpu(),
            loss=solution.loss,
            relative_loss=solution.loss / size if size else None,
            output_error=output_error / output_size if output_size else None,
            damping=solution.damping,
            seconds=time.monotonic() - start,
            fallback_heads=fallback,
        )
    return solved


def solve_matrix(
    weight: Tensor, columns: Tensor, settings: Settings, options: Options, rows_at_a_time: int
) -> QuantizedWeight:
    """Codes of a matrix [out, in] of any height, whose rows have nothing in common but the column Hessian [in, in]."""
    hessian = columns.unsqueeze(0)
    factors = _Factors(settings.damping, options.activation_order)
    solutions = (
        _solve_together(rows.unsqueeze(0), hessian, None, settings, options, factors, turn)
        for turn, rows in enumerate(weight.split(rows_at_a_time))
    )
    return stack_rows([part.grid.quantized(part.codes) for part in solutions])


def _safer(
    target: Tensor, solution: _Solution, plain: _Solution, columns: Tensor, rows: Tensor
) -> tuple[_Solution, list[int]]:
    """`solution`, but for heads where `plain` does better on unseen statistics, or leaves the weights far less moved.

    Args:
        target: [n, rows, columns].
        columns, rows: Hessians [1 or n, columns, columns] and [n, rows, rows] of text that was not solved on.
    Returns: what is left, and the heads that fell back.
    """
    changes = [one.grid.values(one.codes) - target for one in (solution, plain)]
    unseen = [losses(change, columns, rows)[:, 0] for change in changes]
    moved = [change.square().sum((1, 2)) for change in changes]
    falls = (unseen[0] > unseen[1]) | (moved[0] > _FURTHEST**2 * moved[1]) | ~torch.isfinite(unseen[0])
    heads: list[int] = falls.nonzero()[:, 0].tolist()
    if not heads:
        return solution, heads
    pick = falls[:, None, None]
    grid = Grid(
        torch.where(pick, plain.grid.scales, solution.grid.scales),
        torch.where(pick, plain.grid.zeros, solution.grid.zeros),
        solution.grid.format,
    )
    return replace(solution, codes=torch.where(pick, plain.codes, solution.codes), grid=grid), heads


class _Factors:
    """Inverse factors of one stage, each computed once; projections that share an input share its factor."""

    def __init__(self, damping: float, ordered: bool) -> None:
        self._damping, self._ordered = damping, ordered
        self._known: dict[tuple[int, int], tuple[Tensor, InverseFactor]] = {}

    def of(self, hessian: Tensor) -> InverseFactor:
        """The factor of a Hessian [n, d, d]."""
        # Keyed by storage; the tensor is kept so that its address is not used again.
        key = (hessian.data_ptr(), hessian.shape[0])
        if key not in self._known:
            self._known[key] = (hessian, inverse_factor(hessian, self._damping, ordered=self._ordered))
        return self._known[key][1]


def _attention_hessians(spec: DecoderSpec, statistics: BlockStatistics) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Row Hessians [n, hd, hd], and the column Hessians that differ from E[x x^T], by role.

    BoA's Table 1 for what was not collected as a row Hessian.
    """
    group = spec.heads // spec.kv_heads
    hd = spec.head_dim
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    turn = spec.attention[statistics.layer]
    inv_freq = torch.tensor(turn.rope_inv_freq, dtype=torch.float64)
    if statistics.keys is not None:
        keys = position_mean(statistics.keys, inv_freq, statistics.positions, turn.rope_scaling)
        rows["q"] = keys.repeat_interleave(group, 0)
    if statistics.queries is not None:
        grouped = statistics.queries.view(spec.kv_heads, group, hd, hd).mean(1)
        rows["k"] = position_mean(grouped, inv_freq, statistics.positions, turn.rope_scaling)
    for role, norm in statistics.head_norms.items():
        rows[role] = norm.mean(rows[role])
    if statistics.values is not None:
        assert statistics.value_rows is not None
        rows["v"], columns["v"] = statistics.value_rows, statistics.values
    return rows | statistics.rows, columns


def _target(weight: Tensor, statistics: BlockStatistics, role: str, factor: InverseFactor, strength: float) -> Tensor:
    """What the codes are to stand for: W + strength E[(y - W x) x^T] E[x x^T]^-1, the least-squares answer to inputs
    that have deviated (GPTAQ, arXiv 2504.02692; written here as a change of the target, so that any solver can follow).
    """
    if not strength or role not in statistics.lacking:
        return weight
    return weight + strength * factor.solve(statistics.lacking[role][None])[0]


@dataclass(frozen=True)
class _Solution:
    codes: Tensor
    grid: Grid
    loss: float
    damping: float


def _solve_together(
    target: Tensor,
    columns: Tensor,
    rows: Tensor | None,
    settings: Settings,
    options: Options,
    factors: _Factors,
    turn: int,
) -> _Solution:
    """As `_solve`; each rank does its share of the units, or of the rows where nothing joins them."""
    if distributed.world_size() == 1:
        return _solve(target, columns, rows, settings, options, factors)
    axis = 1 if rows is None else 0
    part = distributed.share(target.shape[axis], turn)
    own = (slice(None), part) if rows is None else (part,)
    codes = torch.zeros_like(target)
    group = settings.format.group_size or target.shape[2]
    scales, zeros = (target.new_zeros(*target.shape[:2], target.shape[2] // group) for _ in range(2))
    loss = damping = 0.0
    if part.stop > part.start:
        own_columns = columns[part] if rows is not None and columns.shape[0] > 1 else columns
        own_rows = None if rows is None else rows[part]
        solution = _solve(target[own], own_columns, own_rows, settings, options, factors)
        codes[own], scales[own], zeros[own] = solution.codes, solution.grid.scales, solution.grid.zeros
        loss, damping = solution.loss, solution.damping
    distributed.add_up(codes, scales, zeros)
    grid = Grid(scales, zeros, settings.format)
    return _Solution(codes, grid, distributed.total(loss), max(distributed.gather(damping)))


def _solve(
    target: Tensor, columns: Tensor, rows: Tensor | None, settings: Settings, options: Options, factors: _Factors
) -> _Solution:
    """Grid, codes and refinement of a stack [n, rows, columns]."""
    column_factor = factors.of(columns)
    one_sided = rows is None or options.attention_rows == "aespa"  # the solver; the loss is what `rows` makes it
    row_factor = None if rows is None or one_sided else factors.of(rows)

    def in_order(tensor: Tensor) -> Tensor:
        tensor = column_factor.take(tensor, 2)
        return tensor if row_factor is None else row_factor.take(tensor, 1)

    ordered_target = in_order(target)

    def solve(grid: Grid) -> Tensor:
        if options.activation_order:
            scales, zeros = grid.expand(target.shape[-1])
            grid = Grid(in_order(scales), in_order(zeros), grid.format)
        if row_factor is None:
            codes = gptq.solve(ordered_target, column_factor.upper, grid)
        else:
            codes = row_factor.put_back(boa.solve(ordered_target, column_factor.upper, row_factor.upper, grid), 1)
        return column_factor.put_back(codes, 2)

    def weighed(codes: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        return weigh(grid.values(codes) - target, columns, rows)

    costs = column_factor.costs() if settings.search == "compensated" else None

    def regrid(part: Tensor) -> Grid:
        return find_grid(part, settings.format, settings.search, columns, costs)

    if options.adaptive_rows and row_factor is not None:
        codes, grid = boa.solve_adaptive(target, column_factor.upper, row_factor.upper, regrid, options.adaptive_rows)
    else:
        grid = regrid(target)
        codes = solve(grid)
    # Refined on the Hessian that the solver has inverted: without its damping the text's own noise would be fitted.
    with _damped(columns, column_factor.damping):
        best, gradient = weighed(codes, grid)
        first = grid
        for factor in (*_scale_factors(options.scale_steps), *[None] * options.refits):
            other = scaled(first, factor) if factor else refit_scales(target, codes, grid, columns, rows)
            other_codes = solve(other)
            other_loss, other_gradient = weighed(other_codes, other)
            better = (other_loss < best)[..., None]
            best = torch.minimum(best, other_loss)
            codes = torch.where(better, other_codes, codes)
            gradient = torch.where(better, other_gradient, gradient)
            grid = Grid(
                torch.where(better, other.scales, grid.scales),
                torch.where(better, other.zeros, grid.zeros),
                grid.format,
            )
        if options.rounding_iterations:
            start = compensated(target, codes, grid, column_factor, row_factor)
            codes = learn_rounding(target, codes, start, grid, columns, rows, options.rounding_iterations)
            _, gradient = weighed(codes, grid)
        if options.sweeps:
            codes, _ = descend(gradient, codes, grid, columns, rows, options.sweeps)
    loss = float(losses(grid.values(codes) - target, columns, rows).sum(dtype=torch.float64))
    damping = column_factor.damping if row_factor is None else max(column_factor.damping, row_factor.damping)
    return _Solution(codes, grid, loss, damping)


def _scale_factors(steps: int) -> list[float]:
    """What scales are multiplied by to be tried, the nearest first."""
    return [1 + sign * _SCALE_STEP * step for step in range(1, steps + 1) for sign in (-1, 1)]


@contextmanager
def _damped(hessian: Tensor, damping: float) -> Iterator[None]:
    """Inside, a share of the mean of each diagonal is added to it: in place, since a copy can be half a gigabyte."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    before = diagonal.clone()
    diagonal += damping * before.mean(-1, keepdim=True)
    try:
        yield
    finally:
        diagonal.copy_(before)
