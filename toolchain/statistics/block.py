"""The statistics of one stage of a decoder block: what its solvers need, collected in one pass over the text.

All second moments are means over tokens times two, the Hessians of a squared error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolchain import distributed
from toolchain.block import BlockRunner, Stream
from toolchain.families import DecoderSpec
from toolchain.statistics.attention import AttentionRecorder, Handler
from toolchain.statistics.covariance import Covariance, CrossCovariance
from toolchain.statistics.gauss_newton import GaussNewtonRows
from toolchain.statistics.head_norm import HeadNorm

# Projections that read the same input: one covariance, taken at the first of them.
_SHARED = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
# Their outputs, not their inputs, are compared with the full-precision model's.
_COMPARED_BY_OUTPUT = ("o", "down")


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics of the projections of one stage.

    Attributes:
        inputs: column Hessians 2 E[x x^T] by role, [in, in]; roles that share an input share the tensor, and are there
            even where they belong to another stage.
        lacking: 2 E[(y - W x) x^T] by role, [out, in], y what the projection should put out for its input x: what it
            puts out in the full-precision model (and, where asked for, what the residual stream lacks); taken over the
            text that has a reference, empty without.
        keys: 2 E[k k^T] after RoPE, [kv_heads, hd, hd]; None where not collected.
        queries: 2 E[q q^T] after RoPE, [heads, hd, hd]; None where not collected.
        values: per key-value head, 2/g sum_hh' M_hh' E[(X A_h^T)(X A_h'^T)^T] over its g query heads, cross-head terms
            included, with the overlap M_hh' ~ tr(W_O,h^T W_O,h') of mean diagonal 1, [kv_heads, in, in]; None where
            not collected.
        value_rows: row Hessians of v, sum_hh' t_hh' W_O,h^T W_O,h' with t_hh' ~ E[(X A_h^T)^T (X A_h'^T)],
            [kv_heads, hd, hd]. Both factors are partial traces of the exact Hessian, a sum of Kronecker products, and
            their product is scaled to its trace.
        positions: sequence length, over which the RoPE mean is taken.
        rows: row Hessians by role that were collected as such, [units, rows, rows].
        layer: which block of the model it is.
        head_norms: by role, the norms on each head of q and k, with samples of what goes into them.
    """

    inputs: dict[str, Tensor]
    lacking: dict[str, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None
    queries: Tensor | None = None
    values: Tensor | None = None
    value_rows: Tensor | None = None
    positions: int = 0
    rows: dict[str, Tensor] = field(default_factory=dict)
    layer: int = 0
    head_norms: dict[str, HeadNorm] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What is to be collected.

    Attributes:
        attention: the statistics of two-sided Hessians of q, k and v.
        gauss_newton: for q and k those that see the softmax.
        plain_heads: query heads count alike and each for itself in the column Hessian of v, whatever W_O makes of them.
        residual: how much of the residual stream's deviation `o` and `down` are to make up for; nothing where a norm
            stands between them and the stream.
    """

    attention: bool
    gauss_newton: bool = False
    plain_heads: bool = False
    residual: float = 0.0


def collect(
    runner: BlockRunner,
    spec: DecoderSpec,
    stage: tuple[str, ...],
    text: Stream,
    reference: Stream | None,
    wanted: Wanted,
    token_weights: list[Tensor] | None = None,
    batches: range | None = None,
    recorded: int | None = None,
    known: BlockStatistics | None = None,
) -> tuple[BlockStatistics, dict[str, list[Tensor]]]:
    """Run the block on `text` as far as the projections of `stage` need, and on the full-precision `reference`.

    Args:
        stage: roles, in the order in which data flows; those before it are settled in `runner`.
        reference: the same text, or its first batches, as the full-precision model sees it; its outputs are kept in it
            as they become known.
        token_weights: [B, L] per batch, or None for all one.
        batches: which of the text's to look at, in the order in which their outputs become known; None for all.
        recorded: how many of the text's batches, the first, attention's statistics are taken of; None for all.
        known: of an earlier stage of the block: what its projections share with these is not taken again.
    Returns:
        the statistics, and the inputs of a stage's only projection per batch, to compute its output from.
    """
    batches = range(len(text.hidden)) if batches is None else batches
    looked_at = range(len(text.hidden) if recorded is None else recorded)
    present = [tuple(role for role in shared if role in runner.parts) for shared in _SHARED]
    groups = [group for group in present if set(group) & set(stage)]
    firsts = tuple(next(role for role in group if role in stage) for group in groups)
    fresh = tuple(first for first in firsts if known is None or first not in known.inputs)
    weight = runner.original(firsts[0])
    covariances = {first: Covariance(runner.original(first).shape[1], weight) for first in fresh}
    # Apart, so that what a projection lacks is held against the inputs of the same text.
    compared = {f: Covariance(covariances[f].total.shape[0], weight) for f in fresh if f in _COMPARED_BY_OUTPUT}
    crosses = {first: _cross(runner, first, weight) for first in fresh} if reference is not None else {}
    recorded_of = [batch for batch in batches if batch in looked_at]
    head_norms = _head_norms(runner, spec, stage, recorded_of, text) if wanted.attention else {}
    recorder = _recorder(runner, spec, stage, firsts, wanted, head_norms) if wanted.attention else None
    if recorder is not None and recorder.gauss_newton is not None:
        sizes = [text.hidden[batch].shape[0] for batch in recorded_of]
        recorder.gauss_newton.skip(sum(_before_own(sizes)), text.hidden[0].shape[1])
    residual = wanted.residual if spec.residual_is_plain else 0.0
    keeps = stage in (("o",), ("down",))
    kept: list[Tensor] = []
    for batch in batches:
        weights = None if token_weights is None else token_weights[batch]
        recording = recorder if batch in looked_at else None
        if recording is not None:
            recording.token_weights = weights
        elif not fresh:
            continue
        taps = runner.run(
            text,
            batch,
            final=True,
            inputs=firsts,
            attention=_handler_maker(recording, firsts[0]),
            stop_before=None if recording is not None and recording.stops else firsts[-1],
        )
        follows = reference is not None and batch < len(reference.hidden)
        for first in fresh:
            apart = compared if follows and first in compared else covariances
            apart[first].add(taps.inputs[first], weights)
        if recording is not None:
            for norm in head_norms.values():
                norm.add(taps.inputs[firsts[0]], weights)
        if keeps:
            kept.append(text.keep(taps.inputs[stage[0]]))
        if crosses and follows:
            assert reference is not None
            _compare(runner, text, reference, batch, fresh, taps.inputs, crosses, residual, weights)
    for accumulated in (*covariances.values(), *compared.values(), *crosses.values(), *head_norms.values(), recorder):
        if accumulated is not None:
            accumulated.reduce()
    inputs = {} if known is None else dict(known.inputs)
    lacking = {} if known is None else dict(known.lacking)
    for group in present:
        for first in set(group) & set(fresh):
            if crosses and crosses[first].weight:
                mean = crosses[first].mean()
                if first in compared:  # there E[y x^T], otherwise E[(y - x) x^T]
                    lacking[first] = mean - runner.original(first) @ compared[first].hessian()
                else:
                    lacking |= {role: runner.original(role) @ mean for role in group}
            if first in compared:
                covariances[first].include(compared[first])
            inputs |= dict.fromkeys(group, covariances[first].hessian())
    statistics = BlockStatistics(
        inputs, lacking, positions=text.hidden[0].shape[1], layer=runner.index, head_norms=head_norms
    )
    if recorder is not None:
        statistics = recorder_statistics(statistics, recorder, spec, runner.original("o"))
    return statistics, {stage[0]: kept} if keeps else {}


def _cross(runner: BlockRunner, first: str, like: Tensor) -> CrossCovariance:
    rows, columns = runner.original(first).shape
    return CrossCovariance(rows if first in _COMPARED_BY_OUTPUT else columns, columns, like)


def _head_norms(
    runner: BlockRunner, spec: DecoderSpec, stage: tuple[str, ...], batches: list[int], text: Stream
) -> dict[str, HeadNorm]:
    offset = 1.0 if spec.norm == "rms_offset" else 0.0
    sizes = [text.hidden[batch].shape[0] for batch in batches]
    count = sum(distributed.gather(len(sizes)))
    norms = {
        role: HeadNorm(
            runner.original(role), runner.bias(role), module.get_parameter("weight").data + offset, spec.norm_eps, count
        )
        for role, module in runner.head_norms.items()
        if role in stage
    }
    earlier = _before_own(sizes)
    for norm in norms.values():
        norm.skip([size * text.hidden[0].shape[1] for size in earlier])
    return norms


def _before_own(sizes: list[int]) -> list[int]:
    """The sizes of the batches of all ranks before this one: samples are drawn as one rank alone would draw them."""
    return [size for own in distributed.gather(sizes)[: distributed.rank()] for size in own]


def _recorder(
    runner: BlockRunner,
    spec: DecoderSpec,
    stage: tuple[str, ...],
    firsts: tuple[str, ...],
    wanted: Wanted,
    head_norms: dict[str, HeadNorm],
) -> AttentionRecorder | None:
    if firsts[0] not in ("q", "k", "v"):
        return None
    output = runner.original("o")
    logits = "q" in stage or "k" in stage
    gauss_newton = None
    if logits and wanted.gauss_newton:
        turn = spec.attention[runner.index]
        inv_freq = torch.tensor(turn.rope_inv_freq, dtype=torch.float64)
        gauss_newton = GaussNewtonRows(
            output, spec.heads, spec.kv_heads, spec.head_dim, inv_freq, scaling=turn.rope_scaling, head_norms=head_norms
        )
    return AttentionRecorder(
        spec.kv_heads,
        spec.head_dim,
        spec.hidden_size,
        spec.heads,
        output,
        None if wanted.plain_heads else output_overlap(spec, output),
        logits=logits,
        values="v" in stage,
        stops=len(firsts) == 1,
        gauss_newton=gauss_newton,
    )


def output_overlap(spec: DecoderSpec, output: Tensor) -> Tensor:
    """tr(W_O,h^T W_O,h') of the query heads of each group, mean 1 on the diagonal: [kv_heads, g, g]."""
    heads = output.view(output.shape[0], spec.kv_heads, -1, spec.head_dim).permute(1, 2, 0, 3).flatten(2)
    overlap = heads @ heads.mT
    return overlap / overlap.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]


def _value_rows(spec: DecoderSpec, output: Tensor, overlap: Tensor) -> Tensor:
    """Row Hessians of v [kv_heads, hd, hd] from what the query heads of a group read in common, [kv_heads, g, g]."""
    group = overlap.shape[1]
    whole = (overlap * output_overlap(spec, output)).sum((1, 2))
    overlap = overlap * (group / whole.clamp_min(1e-30))[:, None, None]
    heads = output.view(output.shape[0], spec.kv_heads, group, spec.head_dim)
    return torch.einsum("dghi,ghk,dgkj->gij", heads, overlap, heads)


def recorder_statistics(
    known: BlockStatistics, recorder: AttentionRecorder, spec: DecoderSpec, output: Tensor
) -> BlockStatistics:
    """`known`, with what the recorder has seen."""
    factor = 2.0 / recorder.weight
    values = recorder.value_hessians()
    group = spec.heads // spec.kv_heads
    return BlockStatistics(
        inputs=known.inputs,
        lacking=known.lacking,
        keys=recorder.keys * factor if recorder.logits else None,
        queries=recorder.queries * factor if recorder.logits else None,
        values=values * (factor / group) if values is not None else None,
        value_rows=None if recorder.overlap is None else _value_rows(spec, output, recorder.overlap),
        positions=known.positions,
        layer=known.layer,
        head_norms=known.head_norms,
        rows=known.rows
        | ({"q": recorder.gauss_newton.queries, "k": recorder.gauss_newton.keys} if recorder.gauss_newton else {}),
    )


def _handler_maker(recorder: AttentionRecorder | None, first: str):  # type: ignore[no-untyped-def]
    if recorder is None:
        return None

    def make(inputs: Mapping[str, Tensor]) -> Handler:
        def handler(*arguments: object) -> Tensor | None:
            recorder.x = inputs[first]
            return recorder(*arguments)  # type: ignore[arg-type]

        return handler

    return make


def _compare(
    runner: BlockRunner,
    text: Stream,
    reference: Stream,
    batch: int,
    firsts: tuple[str, ...],
    inputs: dict[str, Tensor],
    crosses: dict[str, CrossCovariance],
    residual: float,
    weights: Tensor | None,
) -> None:
    """Run the reference as far, and correlate it with the inputs of the text's projections: its outputs, or how far its
    inputs are from those.
    """
    by_output = tuple(first for first in firsts if first in _COMPARED_BY_OUTPUT)
    by_input = tuple(first for first in firsts if first not in _COMPARED_BY_OUTPUT)
    taps = runner.run(
        reference,
        batch,
        final=False,
        inputs=by_input,
        outputs=by_output,
        stop_before=by_input[-1] if not by_output else None,
        stop_after="o" if by_output == ("o",) and firsts[-1] == "o" else None,
    )
    for first in by_input:
        crosses[first].add(taps.inputs[first] - inputs[first], inputs[first], weights)
    for first in by_output:
        wanted, bias = taps.outputs[first], runner.bias(first)
        wanted = wanted if bias is None else wanted - bias
        if residual:
            wanted = wanted + residual * _lag(text, reference, batch, first).to(wanted.device).view_as(wanted)
        crosses[first].add(wanted, inputs[first], weights)
    if "o" in by_output and firsts[-1] == "o":
        reference.outputs.setdefault("o", []).append(reference.keep(taps.outputs["o"]))
    if "down" in by_output:
        assert taps.hidden is not None
        reference.following.append(reference.keep(taps.hidden))


def _lag(text: Stream, reference: Stream, batch: int, role: str) -> Tensor:
    """What the residual stream of the text lacks before the output of `o` or `down` is added to it."""
    lag = reference.hidden[batch] - text.hidden[batch]
    if role == "down":
        lag = lag + (reference.outputs["o"][batch] - text.outputs["o"][batch]).view_as(lag)
    return lag
