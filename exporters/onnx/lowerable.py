"""What this exporter refuses, said once: of a recipe before anything is quantized, of a checkpoint before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from exporters.base import Activations
from exporters.bundle import Form
from exporters.onnx.activation import ACTIVATIONS
from exporters.onnx.kernels import FUSED_GROUPS
from toolchain.families import DecoderSpec

Place = Literal["weights", "embedding", "head", "activations", "kv_cache", "model"]
"""What has to be changed: fields of a recipe, or the model itself."""

Grid = Literal["weights", "embedding", "head"]

_WORDS: dict[Grid, str] = {"weights": "the linears", "embedding": "the embedding table", "head": "the head"}
_HEAD_MULTIPLE = 8  # GroupQueryAttention's


def in_words(grid: Grid) -> str:
    """As a user calls it."""
    return _WORDS[grid]


@dataclass(frozen=True)
class Asked:
    """What an export would have to carry, as far as it is known.

    Attributes:
        groups: what is quantized and in which group size, None per output channel.
        scheme: of quantized activations.
        cache: scheme of a quantized cache.
    """

    form: Form
    activations: Activations
    groups: Sequence[tuple[Grid, int | None]]
    scheme: str | None
    cache: str | None
    spec: DecoderSpec | None


@dataclass(frozen=True)
class Refusal:
    """Why there is no graph, and what to do."""

    place: Place
    problem: str
    fix: str


def refusals(asked: Asked) -> Iterator[Refusal]:
    """What no graph of that form holds or ONNX Runtime does not run fast; nothing where all is well."""
    if asked.spec is not None:
        yield from _of_model(asked.spec, asked.form)
    if asked.cache is not None and asked.cache != "per_head":
        yield Refusal(
            "kv_cache",
            f"ONNX Runtime's attention keeps no scale for each token, as an int8 cache of scheme {asked.cache} needs",
            "Choose kv_cache of scheme per_head, or none: then keys and values are kept in float32",
        )
    static = asked.scheme is not None and asked.scheme.startswith("static") and asked.activations == "int8"
    if static and asked.form != "qdq":
        yield Refusal(
            "activations",
            f"the activations are {asked.scheme}, for which ONNX Runtime's own operators have no kernel",
            "Export with --form qdq (for NPUs), choose activations of scheme per_block, or export with --activations "
            "float32",
        )
    if asked.form == "fused-int8":
        yield from _of_integers(asked)
    for grid, size in asked.groups:
        if size is not None and size not in FUSED_GROUPS:
            sizes = ", ".join(map(str, FUSED_GROUPS))
            yield Refusal(
                grid,
                f"{in_words(grid)}: groups of {size}, for which ONNX Runtime has no fast kernel",
                f"Choose a group size of {sizes}, or one scale per output channel",
            )


def _of_integers(asked: Asked) -> Iterator[Refusal]:
    if asked.activations != "int8":
        yield Refusal(
            "activations",
            "the form fused-int8 multiplies int8 inputs, and float32 ones are asked for",
            "Export with --activations int8, or --form fused",
        )
    if any(grid == "weights" and size is not None for grid, size in asked.groups):
        yield Refusal(
            "weights",
            "the form fused-int8 is for one scale per output channel: with groups, one product for each of them takes "
            "more than twice as long as the 4-bit kernel",
            "Export with --form fused, or quantize without groups (such as w4a8-edge)",
        )


def _of_model(spec: DecoderSpec, form: Form) -> Iterator[Refusal]:
    family = f"ONNX export of the family {spec.family!r}"
    if spec.activation not in ACTIVATIONS:
        problem = f"{family} is not there yet, for want of: activation {spec.activation!r}"
        yield Refusal("model", problem, f"Accepted: {', '.join(ACTIVATIONS)}")
    if form != "qdq" and spec.head_dim % _HEAD_MULTIPLE:
        problem = f"{family}: attention of the fused form has no heads of {spec.head_dim} channels"
        yield Refusal("model", problem, f"Export with --form qdq; heads of a multiple of {_HEAD_MULTIPLE} go")
