"""`genai_config.json`: what onnxruntime-genai, the official client, asks of a directory beside graph and tokenizer."""

from __future__ import annotations

from pathlib import Path

from boa_edge.files import write_json
from exporters.bundle import RuntimeConfig
from toolchain.checkpoint import Checkpoint

GENAI_CONFIG = "genai_config.json"

# To the client a name for "a decoder with one token stream"; what differs between families is inside the graph.
_MODEL_TYPE = "decoder"


def write_genai_config(checkpoint: Checkpoint, directory: Path, runtime: RuntimeConfig) -> None:
    """Write the client's settings: greedy by default, the cache in buffers that attention writes in place."""
    spec = checkpoint.spec
    ends = list(runtime.eos_token_ids)
    model = {
        "type": _MODEL_TYPE,
        "context_length": runtime.context_length,
        "vocab_size": runtime.vocab_size,
        "bos_token_id": runtime.bos_token_id if runtime.bos_token_id is not None else -1,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if ends else 0,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **runtime.session_config},
            "filename": runtime.model,
            "head_size": spec.head_dim,
            "hidden_size": spec.hidden_size,
            "num_attention_heads": spec.heads,
            "num_hidden_layers": spec.layers,
            "num_key_value_heads": spec.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "do_sample": False,
        "min_length": 0,
        "max_length": runtime.context_length,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    write_json(directory / GENAI_CONFIG, {"model": model, "search": search})
