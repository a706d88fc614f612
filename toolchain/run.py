"""Block by block through a model: statistics on what the quantized blocks before it produce, then its codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from boa_edge.progress import track
from toolchain.families import LayerNames
from toolchain.grids import Grid, GridFormat, find_grid
from toolchain.loading import SourceModel
from toolchain.methods import METHODS, BlockProblem, Settings, SolvedLayer
from toolchain.quantized import QuantizedWeight
from toolchain.recipe import EmbeddingFormat, Recipe
from toolchain.resume import ResumeFile
from toolchain.solvers import rtn
from toolchain.statistics.block import BlockCollector, BlockStatistics, causal_mask

_BATCH = 2


@dataclass(frozen=True)
class QuantizedModel:
    """Codes of every quantized module, by name, with what the solver reported of each block linear."""

    weights: dict[str, QuantizedWeight]
    layers: dict[str, dict[str, Any]]


def quantize_model(
    source: SourceModel, recipe: Recipe, sequences: Tensor | None, resume: ResumeFile | None = None
) -> QuantizedModel:
    """Quantize a model by a recipe; the model itself is left as it was.

    Args:
        sequences: calibration tokens int64 [n, length]; not needed by methods without statistics.
        resume: where finished blocks are kept, and taken from.

    Raises:
        ArithmeticError: a Hessian that no damping mends.
    """
    method = METHODS[recipe.method]
    settings = Settings(recipe.grid_format, recipe.search, recipe.damping)
    weights: dict[str, QuantizedWeight] = {}
    layers: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        blocks = list(enumerate(source.spec.layer_names))
        finished = {index: block for index, _ in blocks if resume and (block := resume.load(index))}
        stream = None
        if method.needs_statistics and len(finished) < len(blocks):
            assert sequences is not None
            stream = _BlockStream(source, sequences)
        for index, names in track(blocks, f"quantizing ({recipe.name})"):
            linears = {name: _linear(source.model, name) for name in names.linears()}
            done = finished.get(index)
            if done is None:
                statistics = stream.collect(index, names, linears, method.needs_attention) if stream else None
                problem = BlockProblem(
                    source.spec, names, {name: linear.weight for name, linear in linears.items()}, statistics
                )
                solved = method.solve_block(problem, settings)
                done = (
                    {name: layer.weight for name, layer in solved.items()},
                    {name: _layer_report(recipe, layer) for name, layer in solved.items()},
                )
                if resume:
                    resume.save(index, *done)
            weights |= done[0]
            layers |= done[1]
            if stream and index + 1 < len(blocks):  # nobody reads what the last block puts out
                stream.advance(index, linears, done[0])
        weights |= _quantize_tables(source, recipe.embedding, recipe.round_scales)
    return QuantizedModel(weights, layers)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _layer_report(recipe: Recipe, layer: SolvedLayer) -> dict[str, Any]:
    return {
        "method": recipe.method,
        "bits": layer.weight.bits,
        "group_size": layer.weight.group_size,
        "loss": layer.loss,
        "relative_loss": layer.relative_loss,
        "output_error": layer.output_error,
        "damping": layer.damping,
        "seconds": round(layer.seconds, 3),
    }


def _quantize_tables(
    source: SourceModel, fmt: EmbeddingFormat | None, round_scales: bool
) -> dict[str, QuantizedWeight]:
    """The embedding table and, where it is a matrix of its own, the head: rounded to nearest on the best grid."""
    if fmt is None:
        return {}
    names = [source.spec.embedding] + ([] if source.spec.tied_embeddings else [source.spec.head])
    grid_format = GridFormat(fmt.bits, fmt.group_size, True, round_scales)
    tables = {}
    for name in track(names, "quantizing tables"):
        table = source.model.get_parameter(f"{name}.weight")
        parts = [_round_table(part.unsqueeze(0), grid_format) for part in table.split(8192)]
        grid = Grid(torch.cat([g.scales for g, _ in parts], 1), torch.cat([g.zeros for g, _ in parts], 1), grid_format)
        tables[name] = grid.quantized(torch.cat([codes for _, codes in parts], 1))
    return tables


def _round_table(rows: Tensor, fmt: GridFormat) -> tuple[Grid, Tensor]:
    grid = find_grid(rows, fmt, "minmax")
    return grid, rtn.solve(rows, grid)


class _BlockStream:
    """The calibration text on its way through the model, as the inputs of the block at hand."""

    def __init__(self, source: SourceModel, sequences: Tensor) -> None:
        self._source = source
        model = source.model
        decoder = model.get_submodule("model")
        assert isinstance(decoder.layers, nn.ModuleList)
        self._blocks = decoder.layers
        self._mask = causal_mask(sequences.shape[1], torch.float32)
        embedding = model.get_submodule(source.spec.embedding)
        self._hidden = [embedding(batch) for batch in sequences.split(_BATCH)]
        positions = torch.arange(sequences.shape[1])[None]
        rotary: Callable[..., tuple[Tensor, Tensor]] = decoder.get_submodule("rotary_emb")
        self._position_ids = positions
        self._position_embeddings = rotary(self._hidden[0], positions)

    def _run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        output = block(
            hidden,
            attention_mask=self._mask,
            position_ids=self._position_ids,
            position_embeddings=self._position_embeddings,
            use_cache=False,
        )
        return output[0] if isinstance(output, tuple) else output

    def collect(self, index: int, names: LayerNames, linears: dict[str, nn.Linear], attention: bool) -> BlockStatistics:
        """Statistics of block `index` at full precision, on the outputs of the quantized blocks before it."""
        collector = BlockCollector(self._source.spec, names, linears, self._source.model.config, attention=attention)
        with collector.collecting():
            for hidden in self._hidden:
                self._run(self._blocks[index], hidden)
        return collector.statistics()

    def advance(self, index: int, linears: dict[str, nn.Linear], quantized: dict[str, QuantizedWeight]) -> None:
        """Run block `index` with its quantized weights; its outputs are the next block's inputs."""
        originals = {name: linear.weight.data for name, linear in linears.items()}
        try:
            for name, linear in linears.items():
                linear.weight.data = quantized[name].dequantize()
            self._hidden = [self._run(self._blocks[index], hidden) for hidden in self._hidden]
        finally:
            for name, linear in linears.items():
                linear.weight.data = originals[name]
