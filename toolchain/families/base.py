"""What a decoder family tells the rest of the pipeline: where its parts are and how they are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerNames:
    """Module names of one decoder block, as they stand in the safetensors file (without `.weight`)."""

    q: str
    k: str
    v: str
    o: str
    gate: str
    up: str
    down: str
    attention_norm: str
    mlp_norm: str

    def linears(self) -> tuple[str, ...]:
        """The quantized linears, in the order in which data flows through them."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


@dataclass(frozen=True)
class DecoderSpec:
    """Architecture facts, free of any framework.

    Attributes:
        rope_inv_freq: head_dim / 2 inverse frequencies in radians per position, for half-split pairs (a, a + hd/2).
        rope_scaling: factor on cos and sin (1.0 but for YaRN-like scaling).
        attention_scale: factor on q k^T, 1 / sqrt(head_dim).
    """

    family: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_inv_freq: tuple[float, ...]
    rope_scaling: float
    attention_scale: float
    max_positions: int
    tied_embeddings: bool
    embedding: str
    final_norm: str
    head: str
    layer_names: tuple[LayerNames, ...]

    def linear_inputs(self) -> dict[str, int]:
        """Input width of every block linear, by module name."""
        widths: dict[str, int] = {}
        for names in self.layer_names:
            for name in (names.q, names.k, names.v, names.gate, names.up):
                widths[name] = self.hidden_size
            widths[names.o] = self.heads * self.head_dim
            widths[names.down] = self.intermediate_size
        return widths


@dataclass(frozen=True)
class Family:
    """One line of the table in `toolchain.families`.

    Attributes:
        model_types: `model_type` values of config.json that it serves.
        architectures: class names of `transformers` that it serves.
        describe: config.json as a mapping -> DecoderSpec; raises BoaEdgeError for what it cannot serve.
        gguf_architectures: `general.architecture` values of a GGUF file that map onto it.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    describe: Callable[[Mapping[str, Any]], DecoderSpec]
