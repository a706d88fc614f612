"""ExecuTorch's bundled Llama exporter at 8da4w: `model.pte` of a Hugging Face directory of the Llama family.

    python -m benchmarks.runtimes.build_executorch --model DIR --out DIR

The exporter reads checkpoints in Meta's layout. Its own converter for this model needs torchtune, so the names and the
order of the rotary halves are changed here. Lowering takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from executorch.examples.models.llama.export_llama_lib import export_llama
from executorch.extension.llm.export.config.llm_config import LlmConfig
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.runtimes.lengths import CONTEXT, PREFILL

# As its documentation has it for this backend: int4 linears in groups of 32, the head among them, and an embedding of
# 8 bits per row, like ours.
GROUP, EMBEDDING = 32, "8,0"

_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_OUTSIDE = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}


def meta_name(name: str) -> str:
    """The name of a Hugging Face parameter in Meta's checkpoints. KeyError where it has none."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"layers.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys [heads * head_dim, in], rotary pairs half a head apart, brought to stand side by side."""
    heads = weight.shape[0] // head_dim
    return weight.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)


def meta_checkpoint(model: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights and parameters of a Hugging Face directory, as the exporter reads them."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    weights = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, value in load_file(file).items():
            turned = name.endswith(("q_proj.weight", "k_proj.weight"))
            weights[meta_name(name)] = interleaved(value, head_dim) if turned else value
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    rope = config.get("rope_parameters") or config
    return weights, {
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": heads,
        "n_kv_heads": config["num_key_value_heads"],
        "head_dim": head_dim,
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "use_scaled_rope": False,
        "vocab_size": config["vocab_size"],
        "use_hf_rope": False,
        "attention_qkv_bias": False,
    }


def build(model: Path, out: Path) -> None:
    """Write `model.pte` into `out`."""
    weights, parameters = meta_checkpoint(model)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        checkpoint, params = Path(scratch) / "checkpoint.pth", Path(scratch) / "params.json"
        torch.save(weights, checkpoint)
        params.write_text(json.dumps(parameters), encoding="utf-8")
        config = LlmConfig()
        config.base.checkpoint, config.base.params = str(checkpoint), str(params)
        config.base.metadata = json.dumps({"get_bos_id": 1, "get_eos_ids": [2]})
        config.model.use_kv_cache = config.model.use_sdpa_with_kv_cache = True
        config.model.enable_dynamic_shape = True
        config.export.max_seq_length, config.export.max_context_length = PREFILL, CONTEXT
        config.export.output_name = str(out / "model.pte")
        config.quantization.qmode, config.quantization.group_size = "8da4w", GROUP
        config.quantization.embedding_quantize = EMBEDDING
        config.backend.xnnpack.enabled = config.backend.xnnpack.extended_ops = True
        export_llama(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    build(given.model, given.out)
