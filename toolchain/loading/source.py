"""A language model, in memory or block by block, with what is known of where it came from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from toolchain.families import DecoderSpec
from toolchain.loading.streamed import streamed_blocks


@dataclass(frozen=True)
class SourceModel:
    """A loaded model.

    Attributes:
        identity: what the user named, as they named it.
        model: a causal language model of `transformers`, float32, in evaluation mode; its blocks may be on disk
            (`toolchain.loading.streamed`): it can be called all the same.
        tokenizer: its `transformers` tokenizer.
        config: config.json as a mapping.
        generation_config: generation_config.json as a mapping.
        files: SHA-256 of every file that was read, by name.
        papers: its licence files and model card, which go wherever its weights go.
    """

    identity: str
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    generation_config: dict[str, Any]
    spec: DecoderSpec
    files: dict[str, str]
    papers: tuple[Path, ...] = ()

    def at_hand(self, index: int) -> AbstractContextManager[None]:
        """Inside, the weights of block `index` are in memory."""
        blocks = streamed_blocks(self.model)
        return nullcontext() if blocks is None else blocks.held(index)

    def parameter(self, name: str) -> Tensor:
        """A parameter or buffer by its full name, float32, wherever it is."""
        blocks = streamed_blocks(self.model)
        if blocks is not None and name.rpartition(".")[0] in blocks.modules:
            return blocks.read(name)
        return self.model.state_dict()[name]
