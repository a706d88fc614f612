"""Tiny random models with real classes: no download, a second to make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus a token that starts and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {symbol: index + 2 for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_config(**changes: object) -> LlamaConfig:
    """Two blocks, four query heads on two key-value heads, a head size that is not hidden / heads."""
    settings: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 264,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return LlamaConfig(**(settings | changes))


def make_model(directory: Path, config: LlamaConfig | MistralConfig, seed: int = 0) -> Path:
    """Write a random model whose logits are not all alike."""
    torch.manual_seed(seed)
    model = (MistralForCausalLM if isinstance(config, MistralConfig) else LlamaForCausalLM)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama directory with tied embeddings."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model", tiny_config())


@pytest.fixture
def model_factory(tmp_path: Path) -> Callable[..., Path]:
    """Makes a Llama directory with changes to its configuration."""

    def make(**changes: object) -> Path:
        return make_model(tmp_path / "model", tiny_config(**changes))

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About ten thousand bytes of text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    words = ["river", "stone", "the", "of", "and", "light", "seven", "runs", "under", "a", "bridge", "slowly"]
    picks = torch.randint(len(words), (1800,), generator=generator).tolist()
    path.write_text(" ".join(words[pick] for pick in picks))
    return path
