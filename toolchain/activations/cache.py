"""Keys and values as an int8 cache keeps them: symmetric codes and scales, for every key-value head by itself.

    per_token   one scale per token and head, from the token itself: max|x| / 127, codes in [-127, 127]
    per_head    one scale per head, fixed by calibration: codes in [-128, 127], saturated, as QuantizeLinear does

Keys are quantized after RoPE, and after R3 where the model has it: what a cache holds. A token's codes depend on
nothing but that token, so that a text read at once and one read token by token see the same keys and values. In the
simulation the cache of `transformers` keeps floating point, and what it hands out is quantized where attention takes
it in, which comes to the same.

Both forms of the ONNX export carry per_head, code for code (tests/exporters/test_int8_cache.py); no runtime of this
project has per_token, and ExecuTorch's programs have neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from boa_edge.errors import BoaEdgeError
from toolchain.activations import per_block
from toolchain.families import DecoderSpec
from toolchain.statistics.attention import ATTENTION, Kept
from toolchain.transforms.product import OnlineProduct
from toolchain.transforms.runtime import turned

SCHEMA_VERSION = 1
CacheScheme = Literal["per_token", "per_head"]
SCHEMES: tuple[CacheScheme, ...] = get_args(CacheScheme)

_CACHED_ATTENTION = "boa_edge_int8_cache"
_KEPT = "boa_edge_kept"
_LOW, _HIGH = -128, 127

Scales = tuple[tuple[float, ...], ...]  # by layer and key-value head


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """x float [..., hd], finite -> int8 codes like it and scales [..., 1]; a token that is 0 has scale 0."""
    held = per_block.quantize(x, x.shape[-1])
    return held.codes, held.scales


def quantize_per_head(x: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """x float [..., G, L, hd], finite; scales [G], positive -> int8 codes like x and scales [G, 1, 1]."""
    spread = scales.to(x)[:, None, None]
    return torch.round(x / spread).clamp(_LOW, _HIGH).to(torch.int8), spread


def through_cache(x: Tensor, scales: Tensor | None) -> Tensor:
    """What comes back of x [..., G, L, hd] after it was kept; without scales per token. In the dtype of x."""
    codes, spread = quantize_per_token(x) if scales is None else quantize_per_head(x, scales)
    return codes.to(x.dtype) * spread


@dataclass(frozen=True)
class CachePlan:
    """How the keys and values of every layer are kept.

    Attributes:
        key_scales, value_scales: for `per_head`, float32 numbers; otherwise empty.

    Raises:
        ValueError: there is no such scheme, the bits are not 8, or scales are missing, not wanted or not positive.
    """

    scheme: CacheScheme
    bits: int = 8
    key_scales: Scales = ()
    value_scales: Scales = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"there is no cache scheme {self.scheme!r}; known: {', '.join(SCHEMES)}")
        if self.bits != 8:
            raise ValueError(f"a cache has 8 bits, not {self.bits}")
        for name, scales in (("key_scales", self.key_scales), ("value_scales", self.value_scales)):
            if bool(scales) != (self.scheme == "per_head"):
                raise ValueError(f"{name}: {self.scheme} {'takes none' if scales else 'needs them'}")
            if not all(0 < scale < float("inf") for heads in scales for scale in heads):
                raise ValueError(f"{name} must be positive and finite")

    def kept(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, L, hd] of a layer as its attention gets to see them."""
        if self.scheme == "per_token":
            return through_cache(key, None), through_cache(value, None)
        scales = (torch.tensor(each[layer], dtype=torch.float32) for each in (self.key_scales, self.value_scales))
        return through_cache(key, next(scales)), through_cache(value, next(scales))

    def seen_by(self, layer: int, turn: OnlineProduct | None) -> Kept:
        """`kept` for passes that leave R3 (`turn`) out: its inverse is put behind it."""

        def kept(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            key, value = self.kept(layer, key if turn is None else turn(key), value)
            return key if turn is None else turn.back(key), value

        return kept

    @contextmanager
    def installed(self, model: nn.Module, spec: DecoderSpec) -> Iterator[None]:
        """Inside, `model` attends to quantized keys and values."""
        config: Any = model.config
        before = config._attn_implementation
        modules = [model.get_submodule(names.q.rpartition(".")[0]) for names in spec.layer_names]
        config._attn_implementation = _CACHED_ATTENTION
        try:
            for layer, module in enumerate(modules):
                setattr(module, _KEPT, partial(self.kept, layer))
            yield
        finally:
            config._attn_implementation = before
            for module in modules:
                module.__dict__.pop(_KEPT, None)

    def to_document(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema_version": SCHEMA_VERSION,
            "scheme": self.scheme,
            "bits": self.bits,
            "key_scales": [list(heads) for heads in self.key_scales],
            "value_scales": [list(heads) for heads in self.value_scales],
        }

    @classmethod
    def from_document(cls, document: Any, spec: DecoderSpec, where: object) -> CachePlan:
        """The inverse, checked against the model it is for. Raises BoaEdgeError naming the field that is wrong."""
        try:
            if document["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version is {document['schema_version']!r}, not {SCHEMA_VERSION}")
            scales = [
                tuple(tuple(float(scale) for scale in heads) for heads in document[name])
                for name in ("key_scales", "value_scales")
            ]
            plan = cls(document["scheme"], document["bits"], *scales)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"is not a plan for the cache ({type(error).__name__}: {error})"
            raise BoaEdgeError(problem, where=where, fix="Quantize the model again") from None
        for name, scale in (("key_scales", plan.key_scales), ("value_scales", plan.value_scales)):
            if scale and [len(heads) for heads in scale] != [spec.kv_heads] * spec.layers:
                fix = f"Expected: {spec.layers} layers of {spec.kv_heads} heads"
                raise BoaEdgeError(f"{name}: not one scale for each head of the model", where=where, fix=fix)
        return plan


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    query, key = turned(module, query, key)
    key, value = getattr(module, _KEPT)(key, value)
    return ALL_ATTENTION_FUNCTIONS[ATTENTION](module, query, key, value, *rest, **arguments)


AttentionInterface.register(_CACHED_ATTENTION, _attention)
AttentionMaskInterface.register(_CACHED_ATTENTION, eager_mask)
