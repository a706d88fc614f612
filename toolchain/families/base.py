"""What a decoder family tells the rest of the pipeline: where its parts are and how they are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Part:
    """Where one projection is stored: a module, and its rows [start, stop) where several projections share it."""

    module: str
    start: int = 0
    stop: int | None = None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class LayerNames:
    """Module names of one decoder block, as they stand in the safetensors file (without `.weight`).

    Attributes:
        gate: None where the MLP has no gate.
        shared_rows: rows [start, stop) of a projection inside its module, for those that share one.
    """

    q: str
    k: str
    v: str
    o: str
    gate: str | None
    up: str
    down: str
    attention_norm: str
    mlp_norm: str
    shared_rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def parts(self) -> dict[str, Part]:
        """Where each projection is stored, by role, in the order in which data flows through them."""
        modules = {role: getattr(self, role) for role in ROLES}
        return {
            role: Part(module, *self.shared_rows.get(role, (0, None))) for role, module in modules.items() if module
        }

    def linears(self) -> tuple[str, ...]:
        """The modules that hold them, each once."""
        return tuple(dict.fromkeys(part.module for part in self.parts().values()))


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
            for role, part in names.parts().items():
                widths[part.module] = {"o": self.heads * self.head_dim, "down": self.intermediate_size}.get(
                    role, self.hidden_size
                )
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
