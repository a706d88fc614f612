"""What this exporter can write of a decoder; anything else is refused before it could become a wrong graph."""

from __future__ import annotations

from exporters.bundle import Form
from toolchain.families import DecoderSpec

ACCEPTED: dict[Form, str] = {
    "qdq": "Llama-type decoders: RMS norms before the sublayers, one RoPE over whole heads, gated SiLU MLP, "
    "projections in modules of their own, biases or none. The fused form takes more families",
    "fused": "decoders with RMS norms, rotary or no positions and a gated MLP with SiLU or tanh-approximated GELU",
}

# What the operators of one form take, and those of another do not.
_QDQ = frozenset({"RoPE on a number of channels that 16 does not divide"})
# What GroupQueryAttention and the nodes around it have.
_FUSED = frozenset(
    {
        "norms with 1 + weight",
        "norms after the sublayers",
        "norms on the heads of q and k",
        "projections that share a module",
        "layers with different RoPE",
        "no RoPE",
        "RoPE on a part of each head",
        "sliding windows",
        "capped attention scores",
        "capped logits",
        "scaled embeddings",
        "activation 'gelu_pytorch_tanh'",
    }
)


def obstacles(spec: DecoderSpec, form: Form = "qdq") -> list[str]:
    """Features of a decoder that the graph would lack, in words."""
    turns = {(each.rope_inv_freq, each.rope_scaling) for each in spec.attention}
    found = {
        "layer norms": spec.norm == "layer",
        "norms with 1 + weight": spec.norm == "rms_offset",
        "norms after the sublayers": not spec.residual_is_plain,
        "norms on the heads of q and k": spec.qk_norm,
        "projections that share a module": any(names.shared_rows for names in spec.layer_names),
        "layers with different RoPE": len(turns) > 1,
        "no RoPE": turns == {((), 1.0)},
        "RoPE on a part of each head": any(0 < 2 * len(angles) < spec.head_dim for angles, _ in turns),
        "RoPE on a number of channels that 16 does not divide": any(len(angles) % 8 for angles, _ in turns),
        "sliding windows": any(each.window and each.window < spec.max_positions for each in spec.attention),
        "capped attention scores": spec.attention_softcap is not None,
        "capped logits": spec.logit_softcap is not None,
        "scaled embeddings": spec.embedding_scale != 1.0,
        "learned positions": spec.position_table is not None,
        "an MLP without a gate": any(names.gate is None for names in spec.layer_names),
        f"activation {spec.activation!r}": spec.activation != "silu",
    }
    lacks = [feature for feature, present in found.items() if present]
    return [feature for feature in lacks if feature not in (_FUSED if form == "fused" else _QDQ)]
