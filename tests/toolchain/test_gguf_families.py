"""GGUF files of the families that `transformers` reads, against the models they were written from."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from boa_edge.errors import BoaEdgeError
from tests.conftest import byte_tokenizer
from toolchain.loading import describe_source, load_source

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 128}),
    "gemma2": (Gemma2Config, {"head_dim": 256, "sliding_window": 8}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 256, "sliding_window": 8}),
}


def write(path: Path, architecture: str, model: torch.nn.Module, **metadata: object) -> Path:
    """Write a model as llama.cpp's converter names things."""
    config, keys = model.config, gguf.Keys.Rope
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters.get("full_attention", parameters)["rope_theta"])
    if architecture != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if "scaling" in metadata:
        writer.add_float32(keys.SCALING_FACTOR.format(arch=architecture), metadata["scaling"])  # type: ignore[arg-type]
    writer.add_tokenizer_model("gpt2" if architecture.startswith("qwen") else "llama")
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += ["ab"] + [f"<unused{index}>" for index in range(config.vocab_size - len(tokens) - 1)]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"] if architecture.startswith("qwen") else [])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_of(architecture: str, **changes: object) -> torch.nn.Module:
    kind, settings = CONFIGS[architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(_SHAPE | settings | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_gguf_file_is_the_model_it_was_written_from(tmp_path: Path, architecture: str) -> None:
    model = model_of(architecture)
    path = str(write(tmp_path / "m.gguf", architecture, model))
    source = load_source(path)
    assert source.spec.family == architecture
    assert describe_source(path) == source.spec
    tokens = torch.randint(2, 260, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = (each(tokens, use_cache=False).logits for each in (model, source.model))
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_transformers_would_pass_over_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "scaled.gguf", "qwen2", model_of("qwen2"), scaling=4.0)
    with pytest.raises(BoaEdgeError, match=r"does not read its qwen2\.rope\.scaling\.factor"):
        load_source(str(path))
    path = write(tmp_path / "heads.gguf", "qwen3", model_of("qwen3", head_dim=64))
    with pytest.raises(BoaEdgeError, match="heads of another size than 128"):
        load_source(str(path))
