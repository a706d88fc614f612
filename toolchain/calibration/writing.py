"""A batch of sequences that the model writes, token by token, with what is known of them for free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.calibration.script import Script
from toolchain.calibration.sketches import SketchCollector
from toolchain.calibration.stepping import stepping
from toolchain.loading import SourceModel


@dataclass(frozen=True)
class Written:
    """Sequences and what was seen while they were written.

    Attributes:
        tokens: int64 [n, length].
        nll: float32 [n], mean negative log-likelihood at temperature 1 of the tokens that the model chose.
        statistics: float32 [n, features] by name, see `sketches`.
    """

    tokens: Tensor
    nll: Tensor
    statistics: dict[str, Tensor]

    @staticmethod
    def joined(parts: Sequence[Written]) -> Written:
        """All sequences of `parts`, in order."""
        statistics = {name: torch.cat([part.statistics[name] for part in parts]) for name in parts[0].statistics}
        return Written(torch.cat([part.tokens for part in parts]), torch.cat([part.nll for part in parts]), statistics)


@torch.inference_mode()
def write_batch(
    source: SourceModel,
    scripts: Sequence[Script],
    length: int,
    ticks: Iterator[object],
    *,
    fast: bool,
    sketches: bool = True,
) -> Written:
    """One sequence of `length` tokens per script; `ticks` is advanced once per position after the first.

    Args:
        sketches: whether statistics are taken on the way, to select by.
    """
    batch = len(scripts)
    tokens = torch.empty(batch, length, dtype=torch.int64)
    tokens[:, 0] = torch.tensor([script.first() for script in scripts])
    nll = torch.zeros(batch, dtype=torch.float64)
    chosen = torch.zeros(batch, dtype=torch.float64)
    collector = SketchCollector(source.model, source.spec, batch)
    with stepping(source.model, length, fast=fast) as step, collector.collecting() if sketches else nullcontext():
        for position in range(length - 1):
            next(ticks, None)
            logits = step(tokens[:, position : position + 1])
            collector.counted()
            temperatures = torch.tensor([script.temperature() for script in scripts])
            uniforms = torch.tensor([script.uniform() for script in scripts])
            drawn, cost = draw(logits, temperatures, uniforms)
            taken = [script.take(token) for script, token in zip(scripts, drawn.tolist(), strict=True)]
            tokens[:, position + 1] = torch.tensor([token for token, _ in taken])
            own = torch.tensor([own for _, own in taken], dtype=torch.float64)
            nll += cost * own
            chosen += own
    return Written(tokens, (nll / chosen.clamp_min(1)).float(), collector.statistics())


def draw(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row, by inverting the cumulative distribution: far cheaper than `torch.multinomial`.

    Args:
        logits: float [batch, vocabulary].
        temperatures: float [batch]; 0 takes the most likely token.
        uniforms: float [batch] in [0, 1).

    Returns:
        int64 [batch], and its negative log-likelihood at temperature 1, [batch].
    """
    scores = torch.log_softmax(logits.float(), -1)
    sharpness = 1 / temperatures.clamp_min(1e-6)
    tempered = (
        scores if bool((temperatures == 1).all()) else scores * torch.where(temperatures > 0, sharpness, 1)[:, None]
    )
    cumulative = tempered.exp().cumsum(-1)
    # At most the total times a number below 1 in float32, or rounding could step past the last token.
    threshold = (uniforms.clamp_max(1 - 2**-24) * cumulative[:, -1])[:, None]
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(logits.shape[1] - 1)
    if bool((temperatures == 0).any()):
        drawn = torch.where(temperatures == 0, scores.argmax(-1), drawn)
    return drawn, -scores.gather(1, drawn[:, None])[:, 0]
