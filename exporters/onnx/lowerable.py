"""What this exporter can write of a decoder; anything else is refused before it could become a wrong graph."""

from __future__ import annotations

from toolchain.families import DecoderSpec

ACCEPTED = (
    "Llama-type decoders: RMS norms before the sublayers, one RoPE over whole heads, gated SiLU MLP, projections in "
    "modules of their own, biases or none"
)


def obstacles(spec: DecoderSpec) -> list[str]:
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
        "sliding windows": any(each.window and each.window < spec.max_positions for each in spec.attention),
        "capped attention scores": spec.attention_softcap is not None,
        "capped logits": spec.logit_softcap is not None,
        "scaled embeddings": spec.embedding_scale != 1.0,
        "learned positions": spec.position_table is not None,
        "an MLP without a gate": any(names.gate is None for names in spec.layer_names),
        f"activation {spec.activation!r}": spec.activation != "silu",
    }
    return [feature for feature, present in found.items() if present]
