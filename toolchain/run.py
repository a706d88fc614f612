"""Block by block through a model: statistics on what the quantized blocks before it produce, then its codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boa_edge.errors import UsageError
from boa_edge.files import read_json, write_json
from boa_edge.progress import say, track
from toolchain import distributed
from toolchain.activations.cache import CachePlan
from toolchain.activations.plan import ActivationPlan
from toolchain.allocation import Item, allocate, check_budget, module_bytes
from toolchain.block import BlockRunner, Stream
from toolchain.entry import decoder_layers, entry, own_attention
from toolchain.families import LayerNames
from toolchain.loading import SourceModel
from toolchain.loading.streamed import streamed_blocks
from toolchain.options import Options
from toolchain.quantized import SUPPORTED_BITS, QuantizedWeight, stack_rows
from toolchain.recipe import Recipe
from toolchain.resume import FinishedBlock, FinishedWeights, ResumeFile
from toolchain.sensitivity import Errors, predict_errors
from toolchain.solve import Settings, SolvedLayer, round_stage, solve_stage
from toolchain.spill import Spill
from toolchain.statistics.block import BlockStatistics, Wanted, collect
from toolchain.tables import embedded_by, quantize_tables
from toolchain.transforms import turns_of

_BATCH = 2
_HELD_OUT = 16  # one batch in so many is kept from the statistics that the safety net watches over
_FEWEST_FOR_NET = 4
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
    spill: Path | None = None,
    activations: ActivationPlan | None = None,
    cache: CachePlan | None = None,
) -> QuantizedModel:
    """Quantize a model by a recipe; the model itself is left as it was.

    Args:
        sequences: calibration tokens int64 [n, length]; not needed by methods without statistics.
        resume: where finished blocks are kept, and taken from.
        sequence_weights: [n], how much each sequence counts, mean 1; None for all alike.
        spill: directory for activations, in files that are mapped into memory; None keeps them in memory.
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
        planned = _plan(source, recipe, settings, sequences, sequence_weights, resume, Spill(spill))
        texts = None
        if options is not None and len(finished) < len(blocks):
            assert sequences is not None
            texts = _Texts(source, sequences, sequence_weights, options, Spill(spill), activations, tables, cache)
        for index, names in track(blocks, f"quantizing ({recipe.name})"):
            last = index + 1 == len(blocks)
            bits = {} if planned is None else {role: planned[part.module] for role, part in names.parts().items()}
            own = replace(settings, bits=bits)
            done = _load(resume, index) if index in finished else None
            is_read = done is None or (texts is not None and not last)
            with source.at_hand(index) if is_read else nullcontext():
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
    if kept is None:
        return QuantizedModel(weights | tables, layers)
    kept.add(tables)
    return QuantizedModel(kept, layers)


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
    count = max(_LOOKED_AT, _BATCH * distributed.world_size())
    own_weights = None if sequence_weights is None else sequence_weights[:count]
    texts = _Texts(source, sequences[:count], own_weights, Options(), keep)
    errors: dict[str, dict[int, float]] = {}
    for index, names in track(list(enumerate(source.spec.layer_names)), "choosing bits"):
        with source.at_hand(index):
            found = texts.errors(index, names, settings)
        for role, part in names.parts().items():
            together = errors.setdefault(part.module, dict.fromkeys(SUPPORTED_BITS, 0.0))
            for bits in SUPPORTED_BITS:
                together[bits] += found[role][bits]
    sizes = module_bytes(source, recipe.weights)
    chosen = distributed.from_main(lambda: allocate([Item(name, sizes[name], errors[name]) for name in sizes], spare))
    if path is not None:
        write_json(path, chosen)
    counts = {bits: list(chosen.values()).count(bits) for bits in SUPPORTED_BITS}
    say(f"{recipe.name}: " + ", ".join(f"{count} modules at {bits} bits" for bits, count in counts.items() if count))
    return chosen


def _weights(model: nn.Module, names: LayerNames) -> dict[str, Tensor]:
    """Original weights [out, in] of a block's projections, by role."""
    return {role: _linear(model, part.module).weight.data[part.rows] for role, part in names.parts().items()}


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
        "fallback_heads": layer.fallback_heads,
        "seconds": round(layer.seconds, 3),
    }


class _Texts:
    """The calibration text on its way through the quantized model and, where wanted, through the original."""

    def __init__(
        self,
        source: SourceModel,
        sequences: Tensor,
        sequence_weights: Tensor | None,
        options: Options,
        keep: Spill,
        activations: ActivationPlan | None = None,
        tables: Mapping[str, QuantizedWeight] | None = None,
        cache: CachePlan | None = None,
    ) -> None:
        self._source, self._activations, self._cache = source, activations, cache
        self._turns = turns_of(source.model, source.spec)
        self._arguments, embed = entry(source.model, sequences.shape[1])
        batches = sequences.split(_BATCH)
        own = distributed.share(len(batches))
        if len(batches) < distributed.world_size():
            problem = f"{sequences.shape[0]} calibration sequences, in batches of {_BATCH}, do not occupy "
            fix = "Start fewer processes, or use more calibration sequences"
            raise UsageError(f"{problem}{distributed.world_size()} processes", where="torchrun", fix=fix)
        places = list(range(len(batches)))[own]
        compared = _spread(range(len(batches)), options.compared_sequences)
        recorded = _spread(compared, options.attention_sequences)
        # Those that most is taken of come first.
        places.sort(key=lambda place: (place not in recorded, place not in compared))
        self._recorded = len(set(recorded).intersection(places))
        with embedded_by(source, tables or {}):
            self._text = Stream([keep(embed(batches[place])) for place in places], keep)
        compares = options.deviation > 0 or options.residual > 0
        followed = places[: len(set(compared).intersection(places))]
        self._reference = Stream([keep(embed(batches[place])) for place in followed], keep) if compares else None
        self._token_weights = None
        if sequence_weights is not None:
            rows = sequence_weights.to(torch.float32)[:, None].expand(-1, sequences.shape[1]).split(_BATCH)
            self._token_weights = [rows[place] for place in places]
        self._runner: BlockRunner | None = None

    def _open(self, index: int, names: LayerNames) -> BlockRunner:
        model = self._source.model
        modules = {name: _linear(model, name) for name in names.linears()}
        self._runner = BlockRunner(
            decoder_layers(model)[index],
            names.parts(),
            modules,
            self._arguments[index],
            index=index,
            head_norms={role: model.get_submodule(name) for role, name in names.head_norms().items()},
            activations=self._activations,
            kept=None if self._cache is None else self._cache.seen_by(index, self._turns.get(index)),
        )
        return self._runner

    def solve(self, index: int, names: LayerNames, settings: Settings, options: Options) -> dict[str, SolvedLayer]:
        """Statistics and codes of block `index`, stage by stage."""
        runner = self._open(index, names)
        wanted = Wanted(
            attention=options.attention_rows != "none",
            gauss_newton=options.attention_rows == "gauss_newton",
            plain_heads=options.attention_rows == "aespa",
            residual=options.residual,
        )
        solved: dict[str, SolvedLayer] = {}
        statistics: BlockStatistics | None = None
        with own_attention(self._source.model):
            for stage in stages(runner, options):
                statistics, kept = collect(
                    runner,
                    self._source.spec,
                    stage,
                    self._text,
                    self._reference,
                    wanted,
                    self._token_weights,
                    self._seen(stage, options),
                    self._recorded,
                    statistics,
                )
                held_out = self._held_out(stage, options, wanted)
                weights = {role: runner.original(role) for role in stage}
                solved |= solve_stage(self._source.spec, weights, statistics, settings, options, held_out)
                for role in stage:
                    runner.settle(role, solved[role].weight.dequantize())
                for role, inputs in kept.items():
                    # In place of the inputs, which are large.
                    for batch, x in enumerate(inputs):
                        inputs[batch] = self._text.keep(runner.output(role, x))
                    self._text.outputs[role] = inputs
        return solved

    def _unseen(self, stage: tuple[str, ...], options: Options) -> range:
        """The batches that a stage's statistics are not taken of, for the safety net; they are the last."""
        count = len(self._text.hidden)
        if not options.safety_net or not {"q", "k", "v"} & set(stage):
            return range(count, count)
        if min(distributed.gather(count)) < _FEWEST_FOR_NET:
            return range(count, count)
        return range(count - max(1, self._recorded // _HELD_OUT), count)

    def _seen(self, stage: tuple[str, ...], options: Options) -> range:
        return range(self._unseen(stage, options).start)

    def _held_out(self, stage: tuple[str, ...], options: Options, wanted: Wanted) -> BlockStatistics | None:
        """Statistics of the batches that were kept from those of the stage, or None."""
        unseen = self._unseen(stage, options)
        if not unseen:
            return None
        assert self._runner is not None
        reference = self._reference if "down" in stage else None  # which has to follow where the whole block is run
        statistics, _ = collect(
            self._runner, self._source.spec, stage, self._text, reference, wanted, self._token_weights, unseen
        )
        return statistics

    def errors(self, index: int, names: LayerNames, settings: Settings) -> Errors:
        """Predicted errors of block `index` by role and bits; then on to the next block, all at full precision."""
        runner = self._open(index, names)
        model = self._source.model
        paths = {"o": names.attention_output_norm, "down": names.mlp_output_norm}
        norms = {role: model.get_submodule(path) for role, path in paths.items() if path}
        with own_attention(model):
            errors = predict_errors(
                runner, self._source.spec, self._text, self._token_weights, norms, settings.format, settings.damping
            )
        self._text.advance()
        return errors

    def advance(self) -> None:
        """On to the next block, through the settled weights of this one."""
        assert self._runner is not None
        with own_attention(self._source.model):
            for batch in range(len(self._text.hidden)):
                hidden = self._runner.run(self._text, batch, final=True).hidden
                assert hidden is not None
                self._text.following.append(self._text.keep(hidden))
        self._runner = None  # it holds a block's weights
        self._text.advance()
        if self._reference is not None:
            self._reference.advance()

    def replay(self, index: int, names: LayerNames, weights: Mapping[str, QuantizedWeight]) -> None:
        """On through a block that was finished in an earlier run."""
        runner = self._open(index, names)
        for role, part in names.parts().items():
            runner.settle(role, weights[part.module].dequantize()[part.rows])
        with own_attention(self._source.model):
            if self._reference is not None:
                for batch in range(len(self._reference.hidden)):
                    hidden = runner.run(self._reference, batch, final=False).hidden
                    assert hidden is not None
                    self._reference.following.append(self._reference.keep(hidden))
        self.advance()


def _spread(batches: Sequence[int], sequences: int | None) -> list[int]:
    """As many of the batches, evenly spaced, as hold that many sequences; all of them where None."""
    wanted = len(batches) if sequences is None else min(len(batches), -(-sequences // _BATCH))
    return [batches[round(place)] for place in torch.linspace(0, len(batches) - 1, wanted).tolist()]


def stages(runner: BlockRunner, options: Options) -> list[tuple[str, ...]]:
    """The projections of a block in groups that are solved together, in the order in which data flows."""
    if not options.recollect:
        return [tuple(runner.parts)]
    queries: list[tuple[str, ...]] = [("q", "k", "v")] if options.attention_rows == "none" else [("q", "k"), ("v",)]
    wanted = [*queries, ("o",), ("gate", "up"), ("down",)]
    return [tuple(role for role in stage if role in runner.parts) for stage in wanted]
