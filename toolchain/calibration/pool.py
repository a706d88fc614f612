"""Zero-shot calibration: a pool of texts that the model writes, the unfit dropped, a weighted part selected.

In the spirit of GENIE (arXiv 2112.04780), which matches the statistics that a network stores of its training data. A
decoder stores none; here the pool's average stands for them, and the choice is made to be close to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boa_edge.progress import say, track
from toolchain.calibration.chat import chat_frame
from toolchain.calibration.filters import in_band, is_loop
from toolchain.calibration.kept import KeptBatches
from toolchain.calibration.prior import unigram_prior
from toolchain.calibration.script import SCHEDULES, Conventions, Schedule, Script, end_tokens, start_token
from toolchain.calibration.selection import select
from toolchain.calibration.sketches import similarity
from toolchain.calibration.stepping import steps_fast
from toolchain.calibration.writing import Written, write_batch
from toolchain.loading import SourceModel
from toolchain.recipe import CalibrationSize
from toolchain.text import spread

_CACHE_BYTES = 2 << 30  # what the keys and values of one batch may take
_LARGEST_BATCH = 96
_REWRITES = 3
_SPARE = 1.15  # written per sequence asked for: about one in ten is unfit
_FORMAT = 2  # of the text itself: raise it when the same seed no longer gives the same text


@dataclass(frozen=True)
class SelfText:
    """What the model wrote to be calibrated on.

    Attributes:
        sequences: int64 [n, length], best first.
        weights: float64 [n], mean 1; None where there was nothing to choose from.
        held_out: int64 [m, length], not among the former, drawn from the fit part of the pool before the choice.
        facts: what was written, dropped and chosen, JSON-ready.
    """

    sequences: Tensor
    weights: Tensor | None
    held_out: Tensor
    facts: dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Everything that was written, and which of it is fit.

    Attributes:
        fit: int64, indices of the fit sequences, ascending.
    """

    written: Written
    fit: Tensor
    facts: dict[str, Any]


class Writer:
    """Writes numbered sequences of one model; the same number and seed give the same text.

    Args:
        keep: directory for finished batches; None keeps nothing.
        identity: what, besides model, seed and length, decides which sequences are asked for.
        sketches: whether statistics are taken on the way, to select by.
    """

    def __init__(
        self,
        source: SourceModel,
        length: int,
        seed: int,
        *,
        conventions: Conventions | None = None,
        schedules: Sequence[Schedule] = SCHEDULES,
        keep: Path | None = None,
        identity: dict[str, Any] | None = None,
        sketches: bool = True,
    ) -> None:
        self._sketches = sketches
        self._source, self._length, self._seed, self._schedules = source, length, seed, schedules
        self.conventions = conventions or find_conventions(source, seed)
        self._fast = steps_fast(source.model)
        spec = source.spec
        per_sequence = length * spec.layers * spec.kv_heads * spec.head_dim * 2 * 4
        self._batch = max(1, min(_LARGEST_BATCH, _CACHE_BYTES // per_sequence))
        self._kept: KeptBatches | None = None
        if keep is not None:
            versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
            own = {
                "model": source.files,
                "conventions": self.conventions.identity(),
                "seed": seed,
                "length": length,
                "versions": versions,
                "format": _FORMAT,
            }
            self._kept = KeptBatches(keep, own | {"batch": self._batch, "sketches": sketches} | (identity or {}))
        self._sequences, self._batches = 0, 0

    def write(self, count: int) -> Written:
        """The next `count` sequences."""
        number = math.ceil(count / self._batch)
        sizes = [count // number + (index < count % number) for index in range(number)]
        ticks = iter(track(range(len(sizes) * (self._length - 1)), "writing calibration text"))
        parts = [self._one(size, ticks) for size in sizes]
        for _ in ticks:  # lets the progress line say that it is done
            pass
        return Written.joined(parts)

    def _one(self, size: int, ticks: Any) -> Written:
        first, self._sequences = self._sequences, self._sequences + size
        index, self._batches = self._batches, self._batches + 1
        batch = self._kept.load(index) if self._kept else None
        if batch is not None and tuple(batch.tokens.shape) == (size, self._length):
            for _ in itertools.islice(ticks, self._length - 1):
                pass
            return batch
        scripts = [
            Script(self.conventions, self._seed, number, self._length, self._schedules)
            for number in range(first, first + size)
        ]
        batch = write_batch(self._source, scripts, self._length, ticks, fast=self._fast, sketches=self._sketches)
        if self._kept:
            self._kept.save(index, batch)
        return batch


def find_conventions(source: SourceModel, seed: int) -> Conventions:
    """How this model's texts begin and end, with its unigram prior."""
    tokenizer = source.tokenizer
    frame = chat_frame(tokenizer)
    start = start_token(tokenizer, frame)
    ends = end_tokens(source) | ({start} if start is not None else set())
    forbidden = sorted({*tokenizer.all_special_ids, *ends})
    vocabulary = min(len(tokenizer), source.spec.vocab_size)
    prior = unigram_prior(source.model, vocabulary, forbidden, seed)
    return Conventions(start, ends, prior, frame)


def write_pool(writer: Writer, tokenizer: Any, count: int, needed: int) -> Pool:
    """Write `count` sequences, and more in a few rounds while fewer than `needed` are fit.

    Where that is not enough, the pool is filled up with unfit ones, loops last: never an endless loop.
    """
    written = writer.write(count)
    loops = _loops(written, tokenizer)
    rounds = 1
    while (missing := needed - int(in_band(written.nll, ~loops).sum())) > 0 and rounds <= _REWRITES:
        say(f"{missing} sequences of calibration text too few are fit, writing more")
        more = writer.write(2 * missing)
        written = Written.joined([written, more])
        loops = torch.cat([loops, _loops(more, tokenizer)])
        rounds += 1
    fit = in_band(written.nll, ~loops)
    facts = {
        "written": loops.numel(),
        "dropped_loops": int(loops.sum()),
        "dropped_outliers": int((~loops & ~fit).sum()),
        "rounds": rounds,
    }
    if missing > 0:
        say(f"the model writes too little that is fit to calibrate on: {missing} unfit sequences are used")
        spare = [*(~loops & ~fit).nonzero()[:, 0].tolist(), *loops.nonzero()[:, 0].tolist()][:missing]
        fit[spare] = True
        facts["unfit_used"] = len(spare)
    return Pool(written, fit.nonzero()[:, 0], facts)


def _loops(written: Written, tokenizer: Any) -> Tensor:
    rows = written.tokens.tolist()
    return torch.tensor([is_loop(tokenizer.decode(row, skip_special_tokens=True), row) for row in rows])


def asked(size: CalibrationSize) -> tuple[int, int]:
    """How many sequences are written at first, and how many fit ones are needed."""
    needed = size.sequences + size.held_out_sequences
    if size.pool == 1:
        return math.ceil(_SPARE * needed), needed
    return math.ceil(size.pool * size.sequences) + size.held_out_sequences, needed


def self_text(source: SourceModel, size: CalibrationSize, length: int, seed: int, keep: Path | None) -> SelfText:
    """Calibration text of `size` that the model writes itself; the arguments are `load_calibration`'s."""
    count, needed = asked(size)
    selects = size.pool > 1
    identity = {"count": count, "needed": needed}
    writer = Writer(source, length, seed, keep=keep, identity=identity, sketches=selects)
    pool = write_pool(writer, source.tokenizer, count, needed)
    tokens = pool.written.tokens
    places = torch.linspace(0, pool.fit.numel() - 1, size.held_out_sequences + 2)[1:-1].round().to(torch.int64)
    aside = torch.zeros(pool.fit.numel(), dtype=torch.bool)
    aside[places] = True
    held_out, candidates = pool.fit[aside], pool.fit[~aside]
    weights, chosen = None, candidates
    facts = pool.facts | {"candidates": candidates.numel(), "texts": _kinds(writer)}
    if candidates.numel() > size.sequences and not selects:
        # Every candidate has the same chance, so that conversations and other texts stay half and half.
        chosen = spread(candidates, size.sequences)
    elif candidates.numel() > size.sequences:
        selection = select(
            similarity({name: values[candidates] for name, values in pool.written.statistics.items()}), size.sequences
        )
        chosen, weights = candidates[selection.chosen], selection.weights
        facts |= {"mismatch": round(selection.mismatch, 5), "mismatch_unselected": round(selection.unselected, 5)}
    return SelfText(tokens[chosen].contiguous(), weights, tokens[held_out].contiguous(), facts)


def _kinds(writer: Writer) -> str:
    return "half conversations" if writer.conventions.frame is not None else "plain"
