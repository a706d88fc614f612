"""What each sequence does to each linear's input, small enough to compare sequences: mean, diagonal and a sketch.

Per linear and sequence, over its tokens: the mean of x, the mean of x^2, and the upper triangle of the mean of
(P x)(P x)^T for a seeded random projection P to a few dimensions, which stands for the whole second moment that
the quantizer will see. The first position is left out: the attention sink there dwarfs all others, and every sequence
has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.families import DecoderSpec

_SKETCH = 24


class SketchCollector:
    """Adds up statistics per row of the batch while the caller runs the model.

    Linears that read the same tensor are counted once.
    """

    def __init__(self, model: nn.Module, spec: DecoderSpec, batch: int, seed: int = 0) -> None:
        self._linears = {name: model.get_submodule(name) for names in spec.layer_names for name in names.linears()}
        self._batch, self._seed = batch, seed
        self._latest: Tensor | None = None
        self._skipped: set[str] = set()
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._projections: dict[int, Tensor] = {}
        self._tokens = 0

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hooks are in place inside this context."""
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._latest = None

    def counted(self) -> None:
        """One more token per row went through the model."""
        self._tokens += 1

    def _hook(self, name: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if name in self._skipped:
                return
            if x is self._latest:
                self._skipped.add(name)
                return
            self._latest = x
            if self._tokens:
                self._add(name, x.reshape(self._batch, x.shape[-1]))

        return add

    def _add(self, name: str, x: Tensor) -> None:
        """x: float [batch, inputs], the input at one position."""
        projected = x @ self._projection(x.shape[1])
        if name not in self._sums:
            empty = x.new_zeros(self._batch, projected.shape[1], projected.shape[1])
            self._sums[name] = (torch.zeros_like(x), torch.zeros_like(x), empty)
        mean, square, sketch = self._sums[name]
        mean.add_(x)
        square.addcmul_(x, x)
        sketch.addcmul_(projected[:, :, None], projected[:, None, :])

    def _projection(self, width: int) -> Tensor:
        """float32 [width, sketch]: columns that keep lengths in expectation."""
        if width not in self._projections:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + width)
            size = min(_SKETCH, width)
            self._projections[width] = torch.randn(width, size, generator=generator) / size**0.5
        return self._projections[width]

    def statistics(self) -> dict[str, Tensor]:
        """float32 [batch, features] by `<linear>/mean`, `<linear>/square` and `<linear>/sketch`."""
        tokens = max(self._tokens - 1, 1)
        found = {}
        for name, (mean, square, sketch) in self._sums.items():
            row, column = torch.triu_indices(sketch.shape[1], sketch.shape[1]).unbind()
            twice = torch.where(row == column, 1.0, 2**0.5)  # each entry off the diagonal stands for two
            found[f"{name}/mean"] = mean / tokens
            found[f"{name}/square"] = square / tokens
            found[f"{name}/sketch"] = sketch[:, row, column] * twice / tokens
        return found


def similarity(statistics: dict[str, Tensor]) -> Tensor:
    """Inner products between sequences, float64 [n, n], in which every linear counts alike.

    With G the result, |sum_s w_s S_s - T|^2 summed over the linears and kinds of statistics, each over the
    square of its target T = mean_s S_s, is (w - 1/n)^T G (w - 1/n).

    Args:
        statistics: float [n, features] by name, as `SketchCollector.statistics` gives them.
    """
    gram: Tensor | None = None
    for name, values in sorted(statistics.items()):  # a sum in another order rounds otherwise
        rows = values.double()
        # A mean may be zero: its scale is that of x itself, the root of the mean square.
        linear, _, kind = name.rpartition("/")
        scale = statistics[f"{linear}/square"].double().mean(0).sum() if kind == "mean" else rows.mean(0).square().sum()
        part = rows @ rows.mT / scale.clamp_min(1e-30)
        gram = part if gram is None else gram + part
    assert gram is not None
    return gram
