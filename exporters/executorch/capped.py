"""Attention whose scores are capped (Gemma 2), as operators of a delegate: ExecuTorch's own attention has no cap.

It looks at the whole cache in every call, whatever of it is filled.
"""

from __future__ import annotations

from exporters.executorch.delegate import Delegate, Value
from toolchain.families import DecoderSpec


def attend(d: Delegate, spec: DecoderSpec, q: Value, keys: Value, values: Value, mask: Value) -> Value:
    """softmax(cap tanh(q k^T scale / cap) + mask) v.

    Args:
        q: [1, S, heads, head_dim].
        keys, values: [1, slots, kv_heads, head_dim].
        mask: [S, slots].

    Returns:
        [1, S, heads * head_dim].
    """
    if spec.attention_softcap is None:
        raise ValueError("the scores are not capped")
    tokens, slots, width = q.dims[1], keys.dims[1], spec.head_dim
    kv_heads, group = spec.kv_heads, spec.heads // spec.kv_heads

    def cached(part: Value) -> Value:
        return d.transpose(d.reshape(part, (slots, kv_heads, width), tokens=0), (1, 0, 2))

    # The scale and the cap's divisor are one factor, on the queries, of which there are fewer than scores.
    q = d.multiply(q, d.scalar(spec.attention_scale / spec.attention_softcap))
    q = d.transpose(d.reshape(q, (tokens, kv_heads, group, width), tokens=0), (1, 2, 0, 3))
    scores = d.batched(d.reshape(q, (kv_heads, group * tokens, width), tokens=1), cached(keys), transposed=True)
    scores = d.multiply(d.tanh(scores), d.scalar(spec.attention_softcap))
    scores = d.add(d.reshape(scores, (kv_heads, group, tokens, slots), tokens=2), mask)
    weights = d.reshape(d.softmax(scores), (kv_heads, group * tokens, slots), tokens=1)
    context = d.reshape(d.batched(weights, cached(values)), (kv_heads, group, tokens, width), tokens=2)
    return d.reshape(d.transpose(context, (2, 0, 1, 3)), (1, tokens, spec.heads * width), tokens=1)
