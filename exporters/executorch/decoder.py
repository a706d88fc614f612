"""The program around the delegates: embedding, positions, cache and attention, as a module for torch.export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # (registers torch.ops.quantized_decomposed)
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401 (its embeddings)
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (registers torch.ops.llama)
from torch import Tensor, nn
from torch.export import Dim

from exporters.executorch.cache import Kept, Sight
from exporters.executorch.lowerable import Lengths
from exporters.executorch.placeholder import placeholder
from exporters.executorch.segments import attends_in_delegates
from toolchain.checkpoint import Checkpoint
from toolchain.families import AttentionSpec, DecoderSpec
from toolchain.quantized import QuantizedWeight


class DecoderProgram(nn.Module):
    """forward(tokens int64 [1, S], input_pos int64 [1]) -> logits float32 [1, vocabulary] of the last position.

    Everything between two attentions is a placeholder, to be replaced by a delegate of `Segments`. It cannot be run.

    Args:
        hands_on: whether the first delegate changes the embedded tokens.
    """

    def __init__(self, checkpoint: Checkpoint, lengths: Lengths, hands_on: bool) -> None:
        super().__init__()
        spec = checkpoint.spec
        self.spec, self.lengths, self.hands_on = spec, lengths, hands_on
        self.embedding = embedding(checkpoint)
        self.turns = nn.ModuleList()
        self.turn_of: list[int | None] = []
        kinds: dict[tuple[tuple[float, ...], float], int] = {}
        for each in spec.attention:
            kind = (each.rope_inv_freq, each.rope_scaling)
            if each.rope_inv_freq and kind not in kinds:
                kinds[kind] = len(kinds)
                self.turns.append(_Turn(each, spec.head_dim))
            self.turn_of.append(kinds.get(kind))
        self.position_table = None
        if spec.position_table is not None:
            self.position_table = nn.Embedding.from_pretrained(position_rows(checkpoint, lengths))
        self.kept = [Kept.of(each, lengths) for each in spec.attention]
        # Of the caches that need a mask: all that hide something, and all where attention is a matter of the delegates.
        masked = [kept for kept in self.kept if kept.window is not None or attends_in_delegates(spec)]
        self.masked = list(dict.fromkeys(masked))
        self.sights = nn.ModuleList(Sight(kept) for kept in self.masked)
        for layer, kept in enumerate(self.kept):
            for part in ("keys", "values"):
                cache = torch.zeros(1, kept.slots, spec.kv_heads, spec.head_dim)
                self.register_buffer(f"{part}_{layer}", cache)

    @property
    def table_bytes(self) -> int:
        """Size of the embedding table, scales included."""
        held = [*self.embedding.parameters(), *self.embedding.buffers()]
        return sum(each.numel() * each.element_size() for each in held)

    def example(self) -> tuple[Tensor, Tensor]:
        """Inputs of the largest size."""
        return torch.zeros(1, self.lengths.prefill, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def sizes(self) -> dict[str, Any] | None:
        """Which of their sizes may be smaller, for torch.export."""
        if self.lengths.prefill == 1:
            return None
        return {"tokens": {1: Dim("tokens", min=1, max=self.lengths.prefill)}, "input_pos": None}

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        spec = self.spec
        start: Any = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start < self.lengths.context)
        x = self.embedding(tokens)
        positions = torch.arange(tokens.shape[1]) + input_pos
        turns = [turn(positions) for turn in self.turns]
        masks = {kept: sight(positions) for kept, sight in zip(self.masked, self.sights, strict=True)}
        added = [] if self.position_table is None else [self.position_table(positions)[None]]
        seen: _Seen | None = None
        for layer, kept in enumerate(self.kept):
            kind = self.turn_of[layer]
            inputs = [*(seen.inputs() if seen else []), x, *added, *([] if kind is None else turns[kind])]
            q, k, v, *changed = self._delegate(inputs, layer)
            x, added = changed[0] if changed else x, []
            seen = self._attention(q, k, v, layer, start, positions, masks.get(kept))
        # Of one position from here on: its logits are all that is asked for.
        assert seen is not None
        (logits,) = self._delegate([*seen.last().inputs(), x[:, -1:]], spec.layers)
        return logits.view(1, spec.vocab_size)

    def _delegate(self, inputs: list[Tensor], segment: int) -> list[Tensor]:
        heads, widths = outputs_of(self.spec, segment, self.hands_on)
        return placeholder(inputs, segment, heads, widths)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, start: Any, positions: Tensor, mask: Tensor | None
    ) -> _Seen:
        kept, llama, scale = self.kept[layer], torch.ops.llama, self.spec.attention_scale
        keys, values = getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")
        for new, cache in ((k, keys), (v, values)):
            if kept.slots < self.lengths.context:
                llama.update_cache_with_indices(new, cache, 0, torch.remainder(positions, kept.slots)[None])
            else:
                llama.update_cache(new, cache, start)
        if attends_in_delegates(self.spec):
            assert mask is not None
            return _Seen(q, [keys, values], mask)
        if mask is not None:
            return _Seen(llama.custom_sdpa(q, keys, values, 0, mask, 0.0, False, scale))
        return _Seen(llama.custom_sdpa(q, keys, values, start, None, 0.0, True, scale))


@dataclass
class _Seen:
    """What attention hands to the delegate behind it: its result, or, of attention inside of the delegate, queries,
    cache and mask.
    """

    first: Tensor
    cache: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None

    def inputs(self) -> list[Tensor]:
        return [self.first, *self.cache, *([] if self.mask is None else [self.mask])]

    def last(self) -> _Seen:
        """Of the last position only."""
        return _Seen(self.first[:, -1:], self.cache, None if self.mask is None else self.mask[-1:])


def position_rows(checkpoint: Checkpoint, lengths: Lengths) -> Tensor:
    """Learned positions, float32 [context, hidden]: OPT's table has two more rows in front."""
    table = checkpoint.tensor(f"{checkpoint.spec.position_table}.weight").float()
    skipped = table.shape[0] - checkpoint.spec.max_positions
    return table[skipped : skipped + lengths.context].contiguous()


def outputs_of(spec: DecoderSpec, segment: int, hands_on: bool) -> tuple[list[int], list[int]]:
    """Heads and widths of the outputs of a delegate, as the placeholder takes them."""
    if segment == spec.layers:
        return [0], [spec.vocab_size]
    heads, widths = [spec.heads, spec.kv_heads, spec.kv_heads], [spec.head_dim] * 3
    return (heads, widths) if segment == 0 and not hands_on else ([*heads, 0], [*widths, spec.hidden_size])


class _Turn(nn.Module):
    """positions int64 [S] -> cos and sin float32 [1, S, 1, head_dim], 1 and 0 on channels that are not turned."""

    def __init__(self, turn: AttentionSpec, head_dim: int) -> None:
        super().__init__()
        still = head_dim - 2 * len(turn.rope_inv_freq)
        self.angles: Tensor
        self.scaling: Tensor | None
        self.register_buffer("angles", torch.tensor([*turn.rope_inv_freq, *turn.rope_inv_freq, *[0.0] * still]))
        scaling = torch.tensor([turn.rope_scaling] * (head_dim - still) + [1.0] * still)
        self.register_buffer("scaling", scaling if turn.rope_scaling != 1.0 else None)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.to(torch.float32)[None, :, None, None] * self.angles
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scaling is None else (cos * self.scaling, sin * self.scaling)


def pack_table(codes: Tensor) -> Tensor:
    """Codes of a table as `embedding_4bit` reads them: code + 8, even columns in the high half of a byte.

    int8 [rows, columns] within [-8, 7], columns even -> uint8 [rows, columns / 2].
    """
    unsigned = (codes + 8).to(torch.uint8)
    return (unsigned[:, 0::2] << 4) | unsigned[:, 1::2]


class _Table(nn.Module):
    """Token ids int64 [1, S] -> rows of a quantized table, float32 [1, S, hidden]; only these are dequantized."""

    def __init__(self, table: QuantizedWeight) -> None:
        super().__init__()
        self.bits = 8 if table.bits == 8 else 4
        self.register_buffer("codes", table.codes if self.bits == 8 else pack_table(table.codes))
        self.register_buffer("scales", table.scales[:, 0] if table.group_size is None else table.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        lookup, low, high = (ops.embedding_byte, -128, 127) if self.bits == 8 else (ops.embedding_4bit, -8, 7)
        return lookup.dtype(self.codes, self.scales, None, low, high, tokens, dtype=torch.float32)


def embedding(checkpoint: Checkpoint) -> nn.Module:
    """The embedding table, in ExecuTorch's own operators."""
    module = checkpoint.spec.embedding
    if checkpoint.is_quantized(module):
        return _Table(checkpoint.quantized(module))
    return nn.Embedding.from_pretrained(checkpoint.tensor(f"{module}.weight").float())
