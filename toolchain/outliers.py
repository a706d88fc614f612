"""A look at what the linears take in: a full-precision pass, block by block, and what it says of outliers.

A few channels that carry values hundreds of times larger than the rest are what int8 activations fail on. Two figures
tell: the largest magnitude, and the kurtosis E[(x - m)^4] / var^2 of all values, 3 for a normal distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from boa_edge.progress import track
from toolchain.block import BlockRunner, Stream
from toolchain.entry import decoder_layers, entry, own_attention
from toolchain.families import LayerNames
from toolchain.loading import SourceModel
from toolchain.statistics.attention import Handler
from toolchain.transforms import online_products, transforms_of

# What several projections take in is looked at once, under the name of the first.
PLACES = {"q": "attention", "o": "o", "up": "mlp", "down": "down"}
_BATCH = 2
_EVERY = 4

# Layer, names of its parts, its runner, and what comes in at each of PLACES, [tokens, in].
Visit = Callable[[int, LayerNames, BlockRunner, Mapping[str, Tensor]], None]


# Queries [B, H, L, hd], keys and values [B, G, L, hd]; after RoPE, before R3.
Heads = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Outliers:
    """Of the inputs at one place.

    Attributes:
        layer: -1 for the head, which comes after all.
        place: a value of PLACES, or `head`.
        typical: root of the mean square.
    """

    layer: int
    place: str
    maximum: float
    typical: float
    kurtosis: float


def measure_outliers(layer: int, place: str, x: Tensor) -> Outliers:
    """x [tokens, in], any float dtype."""
    wide = x[::_EVERY].to(torch.float64)  # the mean over many values needs no more; the maximum needs all
    square = (wide - wide.mean()).square()
    variance = square.mean().clamp_min(torch.finfo(torch.float64).tiny)
    kurtosis = float(square.square().mean() / variance.square())
    return Outliers(layer, place, float(x.abs().max()), float(wide.square().mean().sqrt()), kurtosis)


def observe(
    source: SourceModel, sequences: Tensor, visit: Visit, title: str, heads: Heads | None = None
) -> list[Outliers]:
    """Run a text through a model at full precision; every block's inputs go to `visit` before the next is run.

    Args:
        sequences: tokens int64 [n, length].
        heads: shown every batch's queries, keys and values, before `visit` is called for their block.
    """
    found: list[Outliers] = []
    model, spec = source.model, source.spec
    with torch.inference_mode():
        arguments, embed = entry(model, sequences.shape[1])
        text = Stream([embed(batch) for batch in sequences.split(_BATCH)])
        for index, names in track(list(enumerate(spec.layer_names)), title):
            with source.at_hand(index), own_attention(model):
                modules: Any = {name: model.get_submodule(name) for name in names.linears()}
                runner = BlockRunner(
                    decoder_layers(model)[index], names.parts(), modules, arguments[index], index=index
                )
                seen: dict[str, list[Tensor]] = {role: [] for role in PLACES}
                for batch in range(len(text.hidden)):
                    taps = runner.run(text, batch, final=False, inputs=tuple(PLACES), attention=_shown(heads))
                    assert taps.hidden is not None
                    text.following.append(taps.hidden)
                    for role, x in taps.inputs.items():
                        seen[role].append(x.reshape(-1, x.shape[-1]))
                inputs = {role: torch.cat(parts) for role, parts in seen.items()}
                found += [measure_outliers(index, PLACES[role], x) for role, x in inputs.items()]
                visit(index, names, runner, inputs)
            text.advance()
        norm: Any = model.get_submodule(spec.final_norm)
        entering = torch.cat([norm(x).flatten(0, 1) for x in text.hidden])
        for product in online_products(spec, transforms_of(model)):
            if (product.place, product.module) == ("input", spec.head):  # a hook of the head, which is not called here
                entering = product(entering)
        found.append(measure_outliers(-1, "head", entering))
    return found


def _shown(heads: Heads | None) -> Callable[[Mapping[str, Tensor]], Handler] | None:
    if heads is None:
        return None

    def handler(query: Tensor, key: Tensor, value: Tensor, *_: object) -> None:
        heads(query, key, value)

    return lambda _seen: handler


def as_documents(found: list[Outliers]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [asdict(each) for each in found]
