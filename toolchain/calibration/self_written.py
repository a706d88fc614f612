"""Calibration text that the model writes itself: no data needed, seeded and repeatable.

Each sequence starts from the beginning-of-sequence token and is sampled, the first tokens at a temperature that falls
from 2 to 1 so that the openings differ (self-calibration, arXiv 2410.17170), the rest at 1. Where the model ends a
text, the next one starts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StaticCache

from boa_edge.progress import track
from toolchain.loading import SourceModel

_CACHE_BYTES = 2 << 30  # what the keys and values of one batch may take
_WARM_TOKENS = 16
_HOTTEST = 2.0


def write_text(source: SourceModel, count: int, length: int, seed: int) -> Tensor:
    """`count` sequences of `length` tokens that the model wrote, int64 [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    spec = source.spec
    per_sequence = length * spec.layers * spec.kv_heads * spec.head_dim * 2 * 4
    size = max(1, min(count, _CACHE_BYTES // per_sequence))
    batches = [min(size, count - start) for start in range(0, count, size)]
    steps = track(range(len(batches) * (length - 1)), "writing calibration text")
    rows = []
    for batch in batches:
        rows.append(_write_batch(source, batch, length, generator, steps))
    for _ in steps:  # lets the progress line say that it is done
        pass
    return torch.cat(rows)


@torch.inference_mode()
def _write_batch(source: SourceModel, batch: int, length: int, generator: torch.Generator, steps: object) -> Tensor:
    model = source.model
    start = _start_token(source)
    ends = torch.tensor(_end_tokens(source), dtype=torch.int64)
    tokens = torch.full((batch, length), start, dtype=torch.int64)
    age = torch.zeros(batch, dtype=torch.int64)  # tokens since the text began
    cache = StaticCache(config=model.config, max_cache_len=length)
    for position in range(length - 1):
        next(steps)  # type: ignore[call-overload]
        logits = model(
            tokens[:, position : position + 1],
            past_key_values=cache,
            cache_position=torch.tensor([position]),
            use_cache=True,
        ).logits[:, -1]
        heat = (1 - age / _WARM_TOKENS).clamp_min(0)
        temperature = 1 + (_HOTTEST - 1) * heat
        probabilities = torch.softmax(logits / temperature[:, None], -1)
        chosen = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        ended = torch.isin(chosen, ends)
        chosen = torch.where(ended, torch.full_like(chosen, start), chosen)
        age = torch.where(ended, torch.zeros_like(age), age + 1)
        tokens[:, position + 1] = chosen
    return tokens


def _start_token(source: SourceModel) -> int:
    tokenizer = source.tokenizer
    for token in (tokenizer.bos_token_id, source.config.get("bos_token_id"), tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _end_tokens(source: SourceModel) -> list[int]:
    ends = source.generation_config.get("eos_token_id", source.tokenizer.eos_token_id)
    return [int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
