"""A tiny random model of every family, of its real class, and one block of it opened up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from tests.conftest import byte_tokenizer
from toolchain.block import BlockRunner, Stream, Taps
from toolchain.entry import decoder_layers, entry, own_attention
from toolchain.families import AttentionSpec, DecoderSpec, LayerNames
from toolchain.loading import SourceModel
from toolchain.statistics.attention import attention_weights, score_slopes

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GROUPED = _SHAPE | {"intermediate_size": 96, "num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Half of the heads' channels turn, by frequencies for short and for long texts, and cos and sin are scaled.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}
_TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
WINDOW = 8

# Layers with and without a window, with and without RoPE, stand side by side where the family has both.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_WIDE, attention_bias=True, mlp_bias=True, rope_parameters=dict(_LLAMA3)),
    "mistral": lambda: MistralConfig(**_WIDE, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**_WIDE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "smollm3": lambda: SmolLM3Config(**_GROUPED, no_rope_layer_interval=2, pad_token_id=None),
    "gemma2": lambda: Gemma2Config(
        **_WIDE,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=9.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_WIDE,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=24,
        rope_parameters={kind: dict(values) for kind, values in _TWO_BASES.items()},
    ),
    "phi3": lambda: Phi3Config(**_GROUPED, pad_token_id=None, sliding_window=WINDOW),
    "phi4": lambda: Phi3Config(
        **_GROUPED, pad_token_id=None, rope_parameters=dict(_LONGROPE), original_max_position_embeddings=64
    ),
    "opt": lambda: OPTConfig(**_SHAPE, ffn_dim=96),
}


def make(directory: Path, family: str) -> Path:
    """Write a random model whose norms, biases and logits are not all alike."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config)
    middle = 0.0 if family.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "norm" in name:
                parameter.normal_(middle, 0.2)
            else:
                parameter.mul_(4)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Seen:
    """What the block handed to its attention, and around it.

    Attributes:
        x: what q, k and v take in, [B, L, d].
        query, key, value: [B, H, L, hd], [B, G, L, hd] twice, as they arrived.
        weights, slopes: attention weights, and those of the cap on the scores, [B, H, L, L].
        output: of `o`, [B, L, d].
    """

    x: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    weights: Tensor
    slopes: Tensor
    scaling: float
    output: Tensor


class Block:
    """One block of a loaded model, in float64, on random tokens; its projections are open to change.

    Args:
        layer: which one; those before it make its input.
    """

    def __init__(self, source: SourceModel, layer: int, batch: int, length: int) -> None:
        self.source, self.spec, self.length = source, source.spec, length
        self.names: LayerNames = source.spec.layer_names[layer]
        self.turn: AttentionSpec = source.spec.attention[layer]
        self.layer = layer
        model = source.model
        self.arguments, embed = entry(model, length)
        tokens = torch.randint(2, 264, (batch, length), generator=torch.Generator().manual_seed(1))
        self.hidden = embed(tokens)
        with own_attention(model):
            for index in range(layer):
                self.hidden = decoder_layers(model)[index](self.hidden, **self.arguments[index])

    def runner(self) -> BlockRunner:
        model, names = self.source.model, self.names
        return BlockRunner(
            decoder_layers(model)[self.layer],
            names.parts(),
            {name: model.get_submodule(name) for name in names.linears()},  # type: ignore[misc]
            self.arguments[self.layer],
            index=self.layer,
            head_norms={role: model.get_submodule(name) for role, name in names.head_norms().items()},
        )

    def see(self, role: str | None = None, change: Tensor | None = None) -> Seen:
        """Run the attention, with `change` [out, in] added to one projection."""
        runner, handed = self.runner(), {}
        if role is not None:
            assert change is not None
            runner.settle(role, runner.original(role) + change)

        def note(_: object) -> Callable[..., None]:
            def handler(*arguments: Any) -> None:
                handed["all"] = arguments

            return handler

        with own_attention(self.source.model):
            taps: Taps = runner.run(
                Stream([self.hidden]), 0, final=True, inputs=("q",), outputs=("o",), attention=note, stop_after="o"
            )
        query, key, value, mask, scaling, softcap = handed["all"]
        weights = attention_weights(query, key, mask, scaling, softcap)
        slopes = torch.ones_like(weights) if softcap is None else score_slopes(query, key, scaling, softcap)
        return Seen(taps.inputs["q"], query, key, value, weights, slopes, scaling, taps.outputs["o"])

    def error(self, role: str, change: Tensor) -> float:
        """|o(W + change) - o(W)|^2."""
        return float((self.see(role, change).output - self.see().output).square().sum())

    def turned(self, heads: Tensor) -> Tensor:
        """RoPE as the spec tells it, on [B, H, L, hd]."""
        half = len(self.turn.rope_inv_freq)
        angles = torch.arange(self.length)[:, None] * torch.tensor(self.turn.rope_inv_freq, dtype=torch.float64)
        cos, sin = angles.cos() * self.turn.rope_scaling, angles.sin() * self.turn.rope_scaling
        first, second, still = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, still], -1)

    def jacobians(self, role: str, x: Tensor) -> Tensor:
        """What a head's norm does to a change of what it takes in, written out, [B, H, L, hd, hd]."""
        runner, hd = self.runner(), self.spec.head_dim
        y = torch.nn.functional.linear(x, runner.original(role), runner.bias(role))
        y = y.unflatten(-1, (-1, hd)).transpose(1, 2)
        identity = torch.eye(hd, dtype=y.dtype).expand(*y.shape, hd)
        if role not in runner.head_norms:
            return identity
        gain = runner.head_norms[role].weight + (1.0 if self.spec.norm == "rms_offset" else 0.0)
        square = (y.square().mean(-1) + self.spec.norm_eps)[..., None, None]
        return gain[:, None] * (identity - y[..., :, None] * y[..., None, :] / (hd * square)) / square.sqrt()

    def logit_change(self, seen: Seen, role: str, answer: Tensor) -> Tensor:
        """First-order change of every score, masked or not, [B, H, L, L], by `answer` [B, H or G, L, hd] of q or k
        before the head norm.
        """
        group = self.spec.heads // self.spec.kv_heads
        moved = torch.einsum("bhlij,bhlj->bhli", self.jacobians(role, seen.x), answer)
        moved = self.turned(moved)
        if role == "q":
            return self.spec.attention_scale * moved @ seen.key.repeat_interleave(group, 1).mT
        return seen.scaling * seen.query @ moved.repeat_interleave(group, 1).mT

    def output_change(self, seen: Seen, logits: Tensor) -> Tensor:
        """First-order change of each head's share of the output, [B, H, L, d], by that of the scores."""
        group, hd = self.spec.heads // self.spec.kv_heads, self.spec.head_dim
        value = seen.value.repeat_interleave(group, 1)
        pushed = seen.weights * seen.slopes * logits
        mixed = pushed @ value - pushed.sum(-1, keepdim=True) * (seen.weights @ value)
        output = self.runner().original("o").view(-1, self.spec.heads, hd)
        return torch.einsum("bhli,dhi->bhld", mixed, output)

    def answer(self, seen: Seen, change: Tensor) -> Tensor:
        """What a change [heads * hd, d] of a projection puts out, [B, heads, L, hd]."""
        return (seen.x @ change.mT).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)


def rotation(spec: DecoderSpec, turn: AttentionSpec, position: int) -> Tensor:
    """R_l [hd, hd]."""
    matrix = torch.eye(spec.head_dim, dtype=torch.float64)
    half = len(turn.rope_inv_freq)
    for pair, frequency in enumerate(turn.rope_inv_freq):
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        cos, sin = angle.cos() * turn.rope_scaling, angle.sin() * turn.rope_scaling
        one, other = pair, pair + half
        matrix[one, one], matrix[one, other], matrix[other, one], matrix[other, other] = cos, -sin, sin, cos
    return matrix
