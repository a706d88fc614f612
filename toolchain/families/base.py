"""What a decoder family tells the rest of the pipeline: where its parts are and how they are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ROLES = ("q", "k", "v", "o", "gate", "up", "down")

# What a norm does to x: x / rms(x) * w; the same with 1 + w in place of w; layer norm with a bias.
NormKind = Literal["rms", "rms_offset", "layer"]


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
        attention_norm, mlp_norm: norms of what attention and MLP take in.
        attention_output_norm, mlp_output_norm: norms of what they put out, before it is added; None where it is plain.
        q_norm, k_norm: norms of each head of q and k, before RoPE; None where there are none.
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
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
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

    def norms(self) -> tuple[str, ...]:
        """All norms of the block."""
        found = (self.attention_norm, self.mlp_norm, self.attention_output_norm, self.mlp_output_norm)
        return tuple(name for name in (*found, self.q_norm, self.k_norm) if name)

    def head_norms(self) -> dict[str, str]:
        """The norms of q and k, by role."""
        return {role: name for role, name in (("q", self.q_norm), ("k", self.k_norm)) if name}


@dataclass(frozen=True)
class AttentionSpec:
    """How the attention of one layer sees positions.

    Attributes:
        rope_inv_freq: rotary_dim / 2 inverse frequencies in radians per position, for half-split pairs
            (a, a + rotary_dim / 2) of a head's first rotary_dim channels; the others are not turned, and none is where
            it is empty.
        rope_scaling: factor on cos and sin (1.0 but for YaRN-like scaling).
        window: how many tokens a query sees, itself included; None for all before it.
    """

    rope_inv_freq: tuple[float, ...] = ()
    rope_scaling: float = 1.0
    window: int | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """Architecture facts, free of any framework.

    Attributes:
        attention: per layer.
        attention_scale: factor on q k^T, 1 / sqrt(head_dim) but for Gemma.
        attention_softcap: attention scores s become cap * tanh(s / cap); None where they stay.
        logit_softcap: the same of the logits.
        norm: of every norm in the model.
        activation: of the MLP, by its name in `transformers`.
        biases: roles of the projections that have a bias.
        embedding_scale: factor on the embedding table's rows where tokens enter (not on a tied head).
        position_table: module of learned positions that are added to the embedded tokens; None without.
        max_positions: the longest text; the window, where every layer has one.
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
    attention: tuple[AttentionSpec, ...]
    attention_scale: float
    max_positions: int
    tied_embeddings: bool
    embedding: str
    final_norm: str
    head: str
    layer_names: tuple[LayerNames, ...]
    norm: NormKind = "rms"
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    position_table: str | None = None

    @property
    def residual_is_plain(self) -> bool:
        """Whether what `o` and `down` put out is added to the residual stream as it is."""
        return not any(names.attention_output_norm or names.mlp_output_norm for names in self.layer_names)

    @property
    def qk_norm(self) -> bool:
        """Whether q and k are normed head by head."""
        return any(names.head_norms() for names in self.layer_names)

    @property
    def rope_inv_freq(self) -> tuple[float, ...]:
        """The inverse frequencies that all layers share. Raises ValueError where they differ."""
        return self._rope().rope_inv_freq

    @property
    def rope_scaling(self) -> float:
        """The factor on cos and sin that all layers share. Raises ValueError where they differ."""
        return self._rope().rope_scaling

    def _rope(self) -> AttentionSpec:
        if len({(each.rope_inv_freq, each.rope_scaling) for each in self.attention}) != 1:
            raise ValueError("the layers turn by different angles")
        return self.attention[0]

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
