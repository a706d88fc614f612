"""A language model in memory, with what is known of where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from toolchain.families import DecoderSpec


@dataclass(frozen=True)
class SourceModel:
    """A loaded model.

    Attributes:
        identity: what the user named, as they named it.
        model: a causal language model of `transformers`, float32, in evaluation mode.
        tokenizer: its `transformers` tokenizer.
        config: config.json as a mapping.
        generation_config: generation_config.json as a mapping.
        files: SHA-256 of every file that was read, by name.
    """

    identity: str
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    generation_config: dict[str, Any]
    spec: DecoderSpec
    files: dict[str, str]
