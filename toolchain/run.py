"""Block by block through a model: statistics on what the quantized blocks before it produce, then its codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from boa_edge.files import read_json, write_json
from boa_edge.progress import say, track
from toolchain import distributed
from toolchain.accelerator import moved
from toolchain.activations.cache import CachePlan
from toolchain.activations.plan import ActivationPlan
from toolchain.allocation import Item, allocate, check_budget, module_bytes
from toolchain.entry import decoder_layers
from toolchain.families import LayerNames
from toolchain.loading import SourceModel
from toolchain.loading.streamed import streamed_blocks
from toolchain.memory import give_back
from toolchain.options import Options
from toolchain.quantized import SUPPORTED_BITS, QuantizedWeight, stack_rows
from toolchain.recipe import Recipe
from toolchain.resume import FinishedBlock, FinishedWeights, ResumeFile
from toolchain.solve import Settings, SolvedLayer, round_stage
from toolchain.spill import Spill
from toolchain.tables import quantize_tables
from toolchain.walk import BATCH, Texts, linear

_LOOKED_AT = 16  # calibration sequences from which bits are chosen


@dataclass(frozen=True)
class QuantizedModel:
    """Codes of every quantized module, by name, with what the solver reported of each projection.

    Attributes:
        layers: reports by module name; by `module:role` where several projections share a module.
    """

    weights: Mapping[str, QuantizedWeight]
    layers: dict[str, dict[str, Any]]


def quantize_model(
    source: SourceModel,
    recipe: Recipe,
    sequences: Tensor | None,
    resume: ResumeFile | None = None,
    sequence_weights: Tensor | None = None,
    keep: Spill = Spill(),  # noqa: B008 (frozen)
    activations: ActivationPlan | None = None,
    cache: CachePlan | None = None,
) -> QuantizedModel:
    """Quantize a model by a recipe; the model itself is left as it was.

    Args:
        sequences: calibration tokens int64 [n, length]; not needed by methods without statistics.
        resume: where finished blocks are kept, and taken from.
        sequence_weights: [n], how much each sequence counts, mean 1; None for all alike.
        keep: where activations are kept, and on which device blocks are worked on; the codes come back to the
            processor's memory.
        activations: how the linears' inputs are quantized; the statistics are of what comes in then.
        cache: how keys and values are kept; the statistics are of what attention sees then.

    Raises:
        ArithmeticError: a Hessian that no damping mends.
    """
    settings = Settings(recipe.grid_format, recipe.search, recipe.damping)
    options = recipe.options
    weights: dict[str, QuantizedWeight] = {}
    layers: dict[str, dict[str, Any]] = {}
    kept = FinishedWeights(resume) if resume and streamed_blocks(source.model) else None
    with torch.inference_mode():
        blocks = list(enumerate(source.spec.layer_names))
        finished = distributed.from_main(lambda: {index for index, _ in blocks if resume and resume.load(index)})
        tables = quantize_tables(source, recipe, None if options is None else sequences)
        planned = _plan(source, recipe, settings, sequences, sequence_weights, resume, keep)
        texts = None
        if options is not None and len(finished) < len(blocks):
            assert sequences is not None
            texts = Texts(source, sequences, sequence_weights, options, keep, activations, tables, cache)
        for index, names in track(blocks, f"quantizing ({recipe.name})"):
            last = index + 1 == len(blocks)
            bits = {} if planned is None else {role: planned[part.module] for role, part in names.parts().items()}
            own = replace(settings, bits=bits)
            done = _load(resume, index) if index in finished else None
            is_read = done is None or (texts is not None and not last)
            with _at_work(source, index, keep.place) if is_read else nullcontext():
                if done is None:
                    solved = (
                        round_stage(_weights(source.model, names), own)
                        if texts is None or options is None
                        else texts.solve(index, names, own, options)
                    )
                    _tell(index, solved, recipe)
                    done = _by_module(names, solved, recipe)
                    if resume:
                        resume.save(index, *done)
                    if texts is not None and not last:  # nobody reads what the last block puts out
                        texts.advance()
                elif texts is not None and not last:
                    texts.replay(index, names, done[0])
            if kept is None:
                weights |= done[0]
            else:
                kept.finish(index, done[0])
            layers |= done[1]
            give_back()
    if kept is None:
        return QuantizedModel(weights | tables, layers)
    kept.add(tables)
    return QuantizedModel(kept, layers)


@contextmanager
def _at_work(source: SourceModel, index: int, place: torch.device) -> Iterator[None]:
    """Inside, the weights of block `index` are in the memory of the device."""
    with source.at_hand(index), moved(decoder_layers(source.model)[index], place):
        yield


def _load(resume: ResumeFile | None, index: int) -> FinishedBlock | None:
    return distributed.from_main(lambda: resume.load(index) if resume else None)


def _plan(
    source: SourceModel,
    recipe: Recipe,
    settings: Settings,
    sequences: Tensor | None,
    sequence_weights: Tensor | None,
    resume: ResumeFile | None,
    keep: Spill,
) -> dict[str, int] | None:
    """Bits by module, where the recipe leaves them to a budget: from a sample of the text, at full precision."""
    spare = check_budget(source, recipe)
    if spare is None:
        return None
    path = resume.directory / "bits.json" if resume else None
    kept = distributed.from_main(lambda: read_json(path, "the chosen bits") if path and path.exists() else None)
    if kept is not None:
        return kept
    assert sequences is not None
    count = max(_LOOKED_AT, BATCH * distributed.world_size())
    own_weights = None if sequence_weights is None else sequence_weights[:count]
    texts = Texts(source, sequences[:count], own_weights, Options(), keep)
    errors: dict[str, dict[int, float]] = {}
    for index, names in track(list(enumerate(source.spec.layer_names)), "choosing bits"):
        with _at_work(source, index, keep.place):
            found = texts.errors(index, names, settings)
        for role, part in names.parts().items():
            together = errors.setdefault(part.module, dict.fromkeys(SUPPORTED_BITS, 0.0))
            for bits in SUPPORTED_BITS:
                together[bits] += found[role][bits]
    sizes = module_bytes(source, recipe)
    chosen = distributed.from_main(lambda: allocate([Item(name, sizes[name], errors[name]) for name in sizes], spare))
    if path is not None:
        write_json(path, chosen)
    counts = {bits: list(chosen.values()).count(bits) for bits in SUPPORTED_BITS}
    say(f"{recipe.name}: " + ", ".join(f"{count} modules at {bits} bits" for bits, count in counts.items() if count))
    return chosen


def _weights(model: nn.Module, names: LayerNames) -> dict[str, Tensor]:
    """Original weights [out, in] of a block's projections, by role."""
    return {role: linear(model, part.module).weight.data[part.rows] for role, part in names.parts().items()}


def _by_module(
    names: LayerNames, solved: Mapping[str, SolvedLayer], recipe: Recipe
) -> tuple[dict[str, QuantizedWeight], dict[str, dict[str, Any]]]:
    """Codes by module, those of projections that share one stacked along its rows; and a report per projection."""
    weights: dict[str, QuantizedWeight] = {}
    layers: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    for role, part in names.parts().items():
        members.setdefault(part.module, []).append(role)
    for module, roles in members.items():
        weights[module] = stack_rows([solved[role].weight for role in roles])
        for role in roles:
            layers[module if len(roles) == 1 else f"{module}:{role}"] = _layer_report(recipe, solved[role])
    return weights, layers


def _tell(index: int, solved: Mapping[str, SolvedLayer], recipe: Recipe) -> None:
    """What was not as asked for, in plain lines."""
    if not distributed.is_main():
        return
    for role, layer in solved.items():
        if layer.damping is not None and layer.damping > recipe.damping:
            say(f"block {index} {role}: a Hessian was not positive definite; damping raised to {layer.damping:g}")
        if layer.fallback_heads:
            heads = ", ".join(map(str, layer.fallback_heads))
            say(f"block {index} {role}: GPTQ's codes for head {heads}, which does better on held-out text")


def _layer_report(recipe: Recipe, layer: SolvedLayer) -> dict[str, Any]:
    return {
        "method": recipe.method,
        "bits": layer.weight.bits,
        "group_size": layer.weight.group_size,
        "loss": layer.loss,
        "relative_loss": layer.relative_loss,
        "output_error": layer.output_error,
        "damping": layer.damping,
        "fallback_heads": layer.fallback_heads,
        "seconds": round(layer.seconds, 3),
    }
