"""Scales moved between two linear maps with nothing but a diagonal between them (SmoothQuant, arXiv 2211.10438, eq. 3).

What the second takes in is divided by s and its columns are multiplied by s:

    attention_norm, mlp_norm   the norm's weight (and bias) / s, columns of q, k, v or gate, up * s      s [hidden]
    v_o      rows and bias of v / s, columns of o in every query head of the group * s      s [kv heads, head size]
    up_down  rows and bias of up / s, columns of down * s                                   s [intermediate]
    q_k      rows and bias of k / s, those of q in every query head of the group * s        s [kv heads, head size]

up_down goes through the gate's product, which is linear in `up`; without a gate it goes through the activation only
where that is positively homogeneous, as ReLU is. q_k commutes with RoPE only where both channels of a pair
(a, a + rotary / 2) have one factor. Where heads are normed it goes into the norms' weights, s [1, head size]: what is
before the norm would be normed away. The norms after a sublayer (Gemma) are never touched.

For s a power of two all of this is exact in every floating-point format, but for norms that store gain - 1 (Gemma).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from boa_edge.errors import BoaEdgeError
from toolchain.families import DecoderSpec, LayerNames, Part
from toolchain.transforms.base import Parameters, Transform, change_rows, scale_norm
from toolchain.transforms.fields import Fields

Pair = Literal["attention_norm", "mlp_norm", "v_o", "up_down", "q_k"]
PAIRS: tuple[Pair, ...] = get_args(Pair)


@dataclass(frozen=True, eq=False)
class Smooth(Transform):
    """Scales by layer and pair; a pair that is not named stays.

    Attributes:
        scales: positive, of the shapes that `scale_shape` tells.
    """

    kind: ClassVar[str] = "smooth"
    scales: Mapping[tuple[int, Pair], Tensor]

    def check(self, spec: DecoderSpec) -> None:
        for (layer, pair), scale in self.scales.items():
            where = f"{self.kind}: {layer}.{pair}"
            if not 0 <= layer < spec.layers or pair not in PAIRS:
                fix = f"Accepted: layers below {spec.layers} and {', '.join(PAIRS)}"
                raise BoaEdgeError("there is no such pair", where=where, fix=fix)
            shape = scale_shape(spec, layer, pair)
            if tuple(scale.shape) != shape:
                raise BoaEdgeError(f"scales of shape {list(scale.shape)}", where=where, fix=f"Expected: {list(shape)}")
            if not scale.is_floating_point() or not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise BoaEdgeError("scales must be positive and finite", where=where)
            half = len(spec.attention[layer].rope_inv_freq)
            if pair == "q_k" and not torch.equal(scale[:, :half], scale[:, half : 2 * half]):
                problem = f"RoPE turns channels a and a + {half} together, and their scales differ"
                raise BoaEdgeError(problem, where=where, fix="Give both the same")

    def notes(self, spec: DecoderSpec) -> list[str]:
        named = {pair for _, pair in self.scales}
        return [f"smooth {pair}: left out, {why}" for pair in PAIRS if pair in named and (why := refusal(spec, pair))]

    def block(self, spec: DecoderSpec, layer: int, parameters: Parameters) -> dict[str, Tensor]:
        names, held = spec.layer_names[layer], dict(parameters)
        for pair in PAIRS:
            if (layer, pair) in self.scales and refusal(spec, pair) is None:
                scale = self.scales[layer, pair].to(parameters[f"{names.o}.weight"])
                _fold(spec, names, held, pair, scale)
        return held

    def document(self) -> dict[str, object]:
        return {"scales": list(self.tensors())}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{layer}.{pair}": scale for (layer, pair), scale in self.scales.items()}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> Smooth:
        scales: dict[tuple[int, Pair], Tensor] = {}
        for name in fields.names("scales"):
            layer, _, pair = name.partition(".")
            if not layer.isdecimal() or pair not in PAIRS:
                fix = f"Expected: a layer, a point and one of {', '.join(PAIRS)}"
                raise BoaEdgeError(f"{name!r} is no pair", where=f"{fields.where}.scales", fix=fix)
            if name not in tensors:
                raise BoaEdgeError(f"the tensor of {name!r} is missing", where=f"{fields.where}.scales")
            scales[int(layer), pair] = tensors[name]
        return cls(scales)


def refusal(spec: DecoderSpec, pair: Pair) -> str | None:
    """Why a pair cannot be smoothed on this model; None where it can."""
    if pair == "up_down" and spec.layer_names[0].gate is None and spec.activation != "relu":
        return f"no scale goes through the activation {spec.activation!r}, which stands between up and down"
    return None


def scale_shape(spec: DecoderSpec, layer: int, pair: Pair) -> tuple[int, ...]:
    """The shape of the scales of a pair."""
    if pair in ("attention_norm", "mlp_norm"):
        return (spec.hidden_size,)
    if pair == "up_down":
        return (spec.intermediate_size,)
    normed = pair == "q_k" and spec.layer_names[layer].head_norms()
    return (1 if normed else spec.kv_heads, spec.head_dim)


def value_sharing(spec: DecoderSpec) -> Tensor:
    """Which of the scales [kv heads * head size] each column of `o` takes, int64 [heads * head size]."""
    own = torch.arange(spec.kv_heads * spec.head_dim).view(spec.kv_heads, 1, spec.head_dim)
    return own.expand(-1, spec.heads // spec.kv_heads, -1).flatten()


def _fold(spec: DecoderSpec, names: LayerNames, held: dict[str, Tensor], pair: Pair, scale: Tensor) -> None:
    parts = names.parts()
    group = spec.heads // spec.kv_heads
    if pair in ("attention_norm", "mlp_norm"):
        roles = ("q", "k", "v") if pair == "attention_norm" else ("gate", "up")
        scale_norm(spec, held, getattr(names, pair), 1 / scale)
        for module in dict.fromkeys(parts[role].module for role in roles if role in parts):
            _scale_columns(held, module, scale)
    elif pair == "up_down":
        change_rows(held, parts["up"], lambda rows: rows / scale[:, None])
        _scale_columns(held, parts["down"].module, scale)
    elif pair == "v_o":
        change_rows(held, parts["v"], lambda rows: rows / scale.reshape(-1, 1))
        _scale_columns(held, parts["o"].module, scale.repeat_interleave(group, 0).flatten())
    else:
        _scale_heads(spec, held, parts["k"], names.k_norm, 1 / scale)
        _scale_heads(
            spec, held, parts["q"], names.q_norm, scale if len(scale) == 1 else scale.repeat_interleave(group, 0)
        )


def _scale_columns(held: dict[str, Tensor], module: str, scale: Tensor) -> None:
    held[f"{module}.weight"] = held[f"{module}.weight"] * scale


def _scale_heads(spec: DecoderSpec, held: dict[str, Tensor], part: Part, norm: str | None, scale: Tensor) -> None:
    """Multiply the heads of q or k by scale [heads or 1, head size]."""
    if norm is not None:
        scale_norm(spec, held, norm, scale[0])
    else:
        change_rows(held, part, lambda rows: (rows.unflatten(0, (-1, spec.head_dim)) * scale[..., None]).flatten(0, 1))
