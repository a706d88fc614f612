"""The calibration text on its way through a model, block by block: statistics are taken of it, and it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from boa_edge.errors import UsageError
from toolchain import distributed
from toolchain.activations.cache import CachePlan
from toolchain.activations.plan import ActivationPlan
from toolchain.block import BlockRunner, Stream
from toolchain.entry import decoder_layers, entry, own_attention
from toolchain.families import LayerNames
from toolchain.loading import SourceModel
from toolchain.options import Options
from toolchain.quantized import QuantizedWeight
from toolchain.sensitivity import Errors, predict_errors
from toolchain.solve import Settings, SolvedLayer, solve_stage
from toolchain.spill import Spill
from toolchain.statistics.block import BlockStatistics, Wanted, collect
from toolchain.tables import embedded_by
from toolchain.transforms import turns_of

BATCH = 2
_HELD_OUT = 16  # one batch in so many is kept from the statistics that the safety net watches over
_FEWEST_FOR_NET = 4


class Texts:
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
        batches = sequences.split(BATCH)
        own = distributed.share(len(batches))
        if len(batches) < distributed.world_size():
            problem = f"{sequences.shape[0]} calibration sequences, in batches of {BATCH}, do not occupy "
            fix = "Start fewer processes, or use more calibration sequences"
            raise UsageError(f"{problem}{distributed.world_size()} processes", where="torchrun", fix=fix)
        order, recorded, compared = _in_order(len(batches), options)
        places = [place for place in order if own.start <= place < own.stop]
        self._recorded = len(set(recorded).intersection(places))
        unseen = order[len(order) - _kept_apart(len(batches), len(recorded), options) :]
        self._kept_apart = len(set(unseen).intersection(places))
        with embedded_by(source, tables or {}):
            self._text = Stream([keep(embed(batches[place])) for place in places], keep)
        followed = places[: len(set(compared).intersection(places))]
        self._reference = Stream([keep(embed(batches[place])) for place in followed], keep) if compared else None
        self._token_weights = None
        if sequence_weights is not None:
            rows = sequence_weights.to(keep.place, torch.float32)[:, None].expand(-1, sequences.shape[1]).split(BATCH)
            self._token_weights = [rows[place] for place in places]
        self._runner: BlockRunner | None = None

    def _open(self, index: int, names: LayerNames) -> BlockRunner:
        model = self._source.model
        modules = {name: linear(model, name) for name in names.linears()}
        self._runner = BlockRunner(
            decoder_layers(model)[index],
            names.parts(),
            modules,
            self._arguments[index],
            index=index,
            norms={"o": model.get_submodule(names.attention_norm), "down": model.get_submodule(names.mlp_norm)},
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
                    range(self._unseen(stage).start),
                    self._recorded,
                    statistics,
                )
                held_out = self._held_out(stage, wanted)
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

    def _unseen(self, stage: tuple[str, ...]) -> range:
        """The batches that a stage's statistics are not taken of, for the safety net; they are the last."""
        count = len(self._text.hidden)
        return range(count - self._kept_apart if {"q", "k", "v"} & set(stage) else count, count)

    def _held_out(self, stage: tuple[str, ...], wanted: Wanted) -> BlockStatistics | None:
        """Statistics of the batches that were kept from those of the stage, or None."""
        unseen = self._unseen(stage)
        if not distributed.total(len(unseen)):
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


def _in_order(count: int, options: Options) -> tuple[list[int], list[int], list[int]]:
    """All batches, those that most is taken of first; those that attention's statistics are taken of; and those that
    run through the full-precision model too. The smaller part of the two lies in the larger.
    """
    every = range(count)
    if not options.deviation:
        recorded, compared = _spread(every, options.attention_sequences), []
    elif len(_spread(every, options.attention_sequences)) <= len(_spread(every, options.compared_sequences)):
        compared = _spread(every, options.compared_sequences)
        recorded = _spread(compared, options.attention_sequences)
    else:
        recorded = _spread(every, options.attention_sequences)
        compared = _spread(recorded, options.compared_sequences)
    order = sorted(every, key=lambda place: (place not in recorded) + (place not in compared))
    return order, recorded, compared


def _kept_apart(count: int, recorded: int, options: Options) -> int:
    """How many batches the statistics of q, k and v are not taken of, whatever the number of ranks."""
    if not options.safety_net or count < _FEWEST_FOR_NET:
        return 0
    return max(1, recorded // _HELD_OUT)


def _spread(batches: Sequence[int], sequences: int | None) -> list[int]:
    """As many of the batches, evenly spaced, as hold that many sequences; all of them where None."""
    wanted = len(batches) if sequences is None else min(len(batches), -(-sequences // BATCH))
    return [batches[round(place)] for place in torch.linspace(0, len(batches) - 1, wanted).tolist()]


def stages(runner: BlockRunner, options: Options) -> list[tuple[str, ...]]:
    """The projections of a block in groups that are solved together, in the order in which data flows."""
    if not options.recollect:
        return [tuple(runner.parts)]
    queries: list[tuple[str, ...]] = [("q", "k", "v")] if options.attention_rows == "none" else [("q", "k"), ("v",)]
    wanted = [*queries, ("o",), ("gate", "up"), ("down",)]
    return [tuple(role for role in stage if role in runner.parts) for stage in wanted]


def linear(model: nn.Module, name: str) -> nn.Linear:
    """A model's linear by name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
