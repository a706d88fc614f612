"""Transforms to try, alone and together, and what it means that a model's function is left as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.toolchain.families import CONFIGS
from toolchain.families import DecoderSpec
from toolchain.transforms import (
    PAIRS,
    Pair,
    RotateDown,
    RotateQueryKey,
    RotateResidual,
    RotateTable,
    RotateValues,
    Smooth,
    Transform,
    scale_shape,
)

FAMILIES = sorted(CONFIGS)
NORMED_SUBLAYERS = ("gemma2", "gemma3")
TOKENS = torch.randint(2, 264, (2, 17), generator=torch.Generator().manual_seed(1))


@contextmanager
def wide() -> Iterator[None]:
    """The classes of `transformers` norm and turn in float32; inside, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def smooth(spec: DecoderSpec, *pairs: Pair, powers_of_two: bool = False) -> Smooth:
    """Random scales within 1/8 and 8 for these pairs of every layer, or for all."""
    generator, scales = torch.Generator().manual_seed(7), {}
    for layer, pair in itertools.product(range(spec.layers), pairs or PAIRS):
        logs = 6 * torch.rand(scale_shape(spec, layer, pair), generator=generator, dtype=torch.float64) - 3
        half = len(spec.attention[layer].rope_inv_freq)
        if pair == "q_k":
            logs[:, half : 2 * half] = logs[:, :half]
        scales[layer, pair] = torch.exp2(logs.round() if powers_of_two else logs)
    return Smooth(scales)


SINGLE: dict[str, Callable[[DecoderSpec], list[Transform]]] = {
    **{pair: lambda spec, pair=pair: [smooth(spec, pair)] for pair in PAIRS},  # type: ignore[misc]
    "r1_tied": lambda spec: [RotateResidual(seed=5)],
    "r1_untied": lambda spec: [RotateResidual(seed=5, head="untied")],
    "r2": lambda spec: [RotateValues(seed=6)],
    "r3": lambda spec: [RotateQueryKey(seed=8)],
    "r4": lambda spec: [RotateDown()],
    "r4_blocks": lambda spec: [RotateDown(block_size=16)],
    "rotate_table": lambda spec: [RotateTable(seed=9)],
}
EVERYTHING: dict[str, Callable[[DecoderSpec], list[Transform]]] = {
    "smooth_first": lambda spec: [
        smooth(spec),
        RotateResidual(1),
        RotateValues(2),
        RotateQueryKey(3),
        RotateDown(),
        RotateTable(9),
    ],
    "rotate_first": lambda spec: [
        RotateQueryKey(3),
        RotateValues(2),
        RotateResidual(1, "untied"),
        smooth(spec),
        RotateDown(16),
        smooth(spec, "attention_norm", "v_o", "q_k"),
        RotateValues(4),
        RotateTable(9),
    ],
}


def logits(model: nn.Module) -> Tensor:
    return model(TOKENS, use_cache=False).logits


def cached(model: nn.Module) -> Tensor:
    """Logits of a text of which all but the last two tokens are read at once, and those one after the other."""
    output = model(TOKENS[:, :-2], use_cache=True)
    seen = [output.logits]
    for tokens in TOKENS[:, -2:].split(1, 1):
        output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
        seen.append(output.logits)
    return torch.cat(seen, 1)


def assert_same_function(one: nn.Module, other: nn.Module) -> None:
    """Of float64 models, with and without a cache."""
    with wide():
        expected = logits(one)
        for found in (logits(other), cached(other)):
            assert float((found - expected).abs().amax()) < 1e-9
    assert float(expected.std()) > 0.1


def left_out(family: str, transforms: list[Transform]) -> list[str]:
    """The kinds that this family's structure forbids."""
    return [each.kind for each in transforms if each.kind == "r1" and family in NORMED_SUBLAYERS]
