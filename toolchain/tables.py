"""Codes of the embedding table and the head.

Their rows do not share a product, so rounding is one-sided (GPTQ). What a row's error e costs depends on where it is
read. The head multiplies it with the output x of the last norm: e E[x x^T] e^T. An embedding adds it to the residual
stream as it is: |e|^2, no direction known to be worse than another. A tied table pays both, so its Hessian is

    H = E[x x^T] / m + SHARE * I,    m the mean of E[x x^T]'s diagonal.

What the running model multiplies the rows by that are looked up (`online_products`) is orthogonal: |e|^2 stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from boa_edge.progress import track
from toolchain.grids import GridFormat, ScaleSearch, find_grid
from toolchain.loading.source import SourceModel
from toolchain.quantized import QuantizedWeight, stack_rows
from toolchain.recipe import Recipe
from toolchain.solve import Settings, solve_matrix
from toolchain.solvers import rtn
from toolchain.statistics.attention import Stop
from toolchain.statistics.covariance import Covariance

SHARE = 0.3
"""What of the identity a tied table's Hessian holds; of 0.03, 0.3 and 3 the best on SmolLM2-135M (docs/log.md)."""
_ROWS = 8192  # at a time
_FINE = 8  # bits from which on neither scales nor codes are worth a search
_TOKENS_PER_CHANNEL = 8  # of calibration text, for the head's inputs
_TOKENS_WHERE_FINE = 2
_BATCH = 2


def quantize_tables(source: SourceModel, recipe: Recipe, sequences: Tensor | None) -> dict[str, QuantizedWeight]:
    """Codes of the embedding table and, where it is a matrix of its own, of the head; none where the recipe has none.

    Args:
        sequences: calibration tokens int64 [n, length]; None rounds to nearest.
    """
    fmt = recipe.embedding
    if fmt is None:
        return {}
    spec = source.spec
    tokens = (_TOKENS_WHERE_FINE if fmt.bits >= _FINE else _TOKENS_PER_CHANNEL) * spec.hidden_size
    inputs = None if sequences is None else head_inputs(source, sequences[: -(-tokens // sequences.shape[1])])
    names = [spec.embedding] + ([] if spec.tied_embeddings else [spec.head])
    grid_format = GridFormat(fmt.bits, fmt.group_size, True, recipe.round_scales)
    return {name: _quantize(source, name, grid_format, inputs, recipe) for name in track(names, "quantizing tables")}


def head_inputs(source: SourceModel, sequences: Tensor) -> Tensor:
    """2 E[x x^T] [d, d] of what the head takes in, in the original model; sequences int64 [n, length]."""
    covariance = Covariance(source.spec.hidden_size, torch.empty(0, dtype=torch.float32))
    head = source.model.get_submodule(source.spec.head)

    def take(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        covariance.add(arguments[0].to(torch.float32))
        raise Stop  # what the head makes of it is nobody's concern

    hook = head.register_forward_pre_hook(take)
    try:
        for rows in track(sequences.split(_BATCH), "looking at the head's inputs"):
            with torch.inference_mode(), suppress(Stop):
                source.model(rows, use_cache=False)
    finally:
        hook.remove()
    return covariance.hessian()


@contextmanager
def embedded_by(source: SourceModel, tables: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """Inside, tokens enter the model through the quantized table, where there is one."""
    weight = tables.get(source.spec.embedding)
    parameter: nn.Parameter = source.model.get_parameter(f"{source.spec.embedding}.weight")
    original = parameter.data
    if weight is not None:
        parameter.data = weight.dequantize().to(original.dtype)
    try:
        yield
    finally:
        parameter.data = original


def _quantize(
    source: SourceModel, name: str, fmt: GridFormat, inputs: Tensor | None, recipe: Recipe
) -> QuantizedWeight:
    spec = source.spec
    table = source.model.get_parameter(f"{name}.weight").data.to(torch.float32)
    options = recipe.options
    if inputs is None or options is None:
        return _round(table, fmt, "minmax")
    if name == spec.embedding and not spec.tied_embeddings:
        return _round(table, fmt, "squared_error")
    hessian = inputs / inputs.diagonal().mean()
    if name == spec.embedding:
        hessian = hessian + SHARE * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    # The rounding that is learned takes the loss of a whole projection down step by step: too much for so many rows.
    changed: dict[str, int] = {"rounding_iterations": 0}
    search: ScaleSearch = "hessian"
    if fmt.bits >= _FINE:  # the largest entry on the largest code is as good there, at a fifth of the time
        search, changed = "minmax", changed | {"refits": 0, "sweeps": 0}
    own = options.model_copy(update=changed)
    return solve_matrix(table, hessian, Settings(fmt, search, recipe.damping), own, _ROWS)


def _round(table: Tensor, fmt: GridFormat, search: ScaleSearch) -> QuantizedWeight:
    parts = []
    for rows in table.split(_ROWS):
        grid = find_grid(rows.unsqueeze(0), fmt, search)
        parts.append(grid.quantized(rtn.solve(rows.unsqueeze(0), grid)))
    return stack_rows(parts)
