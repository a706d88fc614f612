"""The quantization methods by name. A new method is one function here, or one file and one line in METHODS."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.families import DecoderSpec, LayerNames
from toolchain.grids import GridFormat, ScaleSearch, find_grid
from toolchain.quantized import QuantizedWeight
from toolchain.solvers import boa, gptq, rtn
from toolchain.solvers.linear_algebra import InverseFactor, inverse_factor
from toolchain.statistics.block import BlockStatistics
from toolchain.statistics.rope import position_mean


@dataclass(frozen=True)
class Settings:
    """What a method is told by the recipe."""

    format: GridFormat
    search: ScaleSearch
    damping: float


@dataclass(frozen=True)
class SolvedLayer:
    """One linear, solved.

    Attributes:
        loss: tr(H_row D H_col D^T) of the change D, in the method's own metric, per token; None without statistics.
        relative_loss: the same, relative to that of the weight itself.
        output_error: |D X|^2 / |W X|^2 on the calibration text, the same metric for every method.
        damping: the largest relative damping that was needed.
    """

    weight: QuantizedWeight
    loss: float | None
    relative_loss: float | None
    output_error: float | None
    damping: float | None
    seconds: float


@dataclass(frozen=True)
class BlockProblem:
    """The linears of one block and what is known of them.

    Attributes:
        weights: float [out, in] by name.
        statistics: None for methods that need none.
    """

    spec: DecoderSpec
    names: LayerNames
    weights: Mapping[str, Tensor]
    statistics: BlockStatistics | None


BlockSolver = Callable[[BlockProblem, Settings], dict[str, SolvedLayer]]


@dataclass(frozen=True)
class Method:
    """One line of the table."""

    title: str
    solve_block: BlockSolver
    needs_statistics: bool
    needs_attention: bool
    default_search: ScaleSearch


def _solve_rtn(problem: BlockProblem, settings: Settings) -> dict[str, SolvedLayer]:
    solved = {}
    for name, weight in problem.weights.items():
        start = time.monotonic()
        stack = weight.unsqueeze(0)
        grid = find_grid(stack, settings.format, settings.search)
        quantized = grid.quantized(rtn.solve(stack, grid))
        solved[name] = SolvedLayer(quantized, None, None, None, None, time.monotonic() - start)
    return solved


def _solve_gptq(problem: BlockProblem, settings: Settings) -> dict[str, SolvedLayer]:
    factors = _Factors(settings.damping)
    return {name: _one_sided(problem, name, settings, factors) for name in problem.weights}


def _solve_boa(problem: BlockProblem, settings: Settings) -> dict[str, SolvedLayer]:
    """BoA's table of Hessians (arXiv 2406.13474, Table 1): two-sided for q, k and v, per head; GPTQ for the rest."""
    names, spec, statistics = problem.names, problem.spec, problem.statistics
    assert statistics is not None
    assert statistics.keys is not None
    assert statistics.queries is not None
    assert statistics.values is not None
    factors = _Factors(settings.damping)
    group = spec.heads // spec.kv_heads
    hd = spec.head_dim
    inv_freq = torch.tensor(spec.rope_inv_freq, dtype=torch.float64)
    keys = position_mean(statistics.keys, inv_freq, statistics.positions)
    grouped_queries = statistics.queries.view(spec.kv_heads, group, hd, hd).mean(1)
    queries = position_mean(grouped_queries, inv_freq, statistics.positions)
    output = problem.weights[names.o].view(-1, spec.kv_heads, group, hd)
    rows = {
        names.q: keys.repeat_interleave(group, 0),
        names.k: queries,
        names.v: torch.einsum("dghi,dghj->gij", output, output),
    }
    columns = {name: statistics.inputs[name].unsqueeze(0) for name in (names.q, names.k)}
    columns[names.v] = statistics.values
    solved = {}
    for name in problem.weights:
        if name in rows:
            solved[name] = _two_sided(problem, name, columns[name], rows[name], settings, factors)
        else:
            solved[name] = _one_sided(problem, name, settings, factors)
    return solved


class _Factors:
    """Inverse factors of one block, each computed once; linears that share an input share its factor."""

    def __init__(self, damping: float) -> None:
        self._damping = damping
        self._known: dict[int, tuple[Tensor, InverseFactor]] = {}

    def of(self, hessian: Tensor) -> InverseFactor:
        """The factor of a Hessian [n, d, d]."""
        # Keyed by storage; the tensor is kept so that its address is not used again.
        if hessian.data_ptr() not in self._known:
            self._known[hessian.data_ptr()] = hessian, inverse_factor(hessian, self._damping)
        return self._known[hessian.data_ptr()][1]


def _one_sided(problem: BlockProblem, name: str, settings: Settings, factors: _Factors) -> SolvedLayer:
    start = time.monotonic()
    assert problem.statistics is not None
    weight = problem.weights[name].unsqueeze(0)
    hessian = problem.statistics.inputs[name].unsqueeze(0)
    factor = factors.of(hessian)
    grid = find_grid(weight, settings.format, settings.search, hessian)
    quantized = grid.quantized(gptq.solve(weight, factor.upper, grid))
    change = quantized.dequantize() - weight[0]
    loss, size = quadratic_loss(change[None], hessian, None), quadratic_loss(weight, hessian, None)
    relative = loss / size if size else None
    return SolvedLayer(quantized, loss, relative, relative, factor.damping, time.monotonic() - start)


def _two_sided(
    problem: BlockProblem, name: str, columns: Tensor, rows: Tensor, settings: Settings, factors: _Factors
) -> SolvedLayer:
    start = time.monotonic()
    assert problem.statistics is not None
    weight = problem.weights[name].view(rows.shape[0], rows.shape[1], -1)
    column_factor, row_factor = factors.of(columns), factors.of(rows)
    grid = find_grid(weight, settings.format, settings.search, columns)
    quantized = grid.quantized(boa.solve(weight, column_factor.upper, row_factor.upper, grid))
    change = quantized.dequantize().view_as(weight) - weight
    loss, size = quadratic_loss(change, columns, rows), quadratic_loss(weight, columns, rows)
    inputs = problem.statistics.inputs[name].unsqueeze(0)
    output_size = quadratic_loss(weight, inputs, None)
    return SolvedLayer(
        weight=quantized,
        loss=loss,
        relative_loss=loss / size if size else None,
        output_error=quadratic_loss(change, inputs, None) / output_size if output_size else None,
        damping=max(column_factor.damping, row_factor.damping),
        seconds=time.monotonic() - start,
    )


def quadratic_loss(change: Tensor, columns: Tensor, rows: Tensor | None) -> float:
    """sum over the stack of tr(H_row D H_col D^T), H_row the identity where None."""
    weighted = change @ columns
    if rows is not None:
        weighted = rows @ weighted
    return float((weighted * change).sum(dtype=torch.float64))


METHODS: dict[str, Method] = {
    "rtn": Method("round to nearest", _solve_rtn, False, False, "minmax"),
    "gptq": Method("GPTQ", _solve_gptq, True, False, "hessian"),
    "boa": Method("BoA", _solve_boa, True, True, "hessian"),
}
