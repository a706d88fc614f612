"""What several families read from a configuration in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from boa_edge.errors import BoaEdgeError
from toolchain.families.base import AttentionSpec, DecoderSpec, LayerNames

# What arithmetic on a wrong value raises, before anybody has looked at it.
WRONG_VALUES = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError)
_NOT_PASSED_ON = ("model_type", "quantization_config")


def parse(config: Mapping[str, Any]) -> Any:
    """The configuration object of `transformers` for a config.json, with that library's defaults filled in."""
    values = {key: value for key, value in config.items() if key not in _NOT_PASSED_ON}
    try:
        return AutoConfig.for_model(config["model_type"], **values)
    except (*WRONG_VALUES, StrictDataclassError) as error:
        raise refusal(error) from None


def refusal(error: Exception) -> BoaEdgeError:
    """What an error of `transformers`, or of reading its configuration, says of config.json."""
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    return BoaEdgeError(f"is no configuration that `transformers` accepts ({reason})", where="config.json")


def head_dim(hf: Any) -> int:
    """Size of one attention head."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def activation(hf: Any, accepted: tuple[str, ...], field: str = "hidden_act") -> str:
    """The MLP's activation. Raises BoaEdgeError for one that is not accepted."""
    name = str(getattr(hf, field))
    if name not in accepted:
        fix = f"Accepted: {', '.join(accepted)}"
        raise BoaEdgeError(f"activation {name!r}", where=f"config.json: {field}", fix=fix)
    return "silu" if name == "swish" else name


def biases(hf: Any) -> tuple[str, ...]:
    """Roles with a bias, by the fields `attention_bias` and `mlp_bias`."""
    attention = ("q", "k", "v", "o") if getattr(hf, "attention_bias", False) else ()
    return (*attention, *(("gate", "up", "down") if getattr(hf, "mlp_bias", False) else ()))


def rope(hf: Any, *, layer_type: str | None = None, partial: bool = False) -> AttentionSpec:
    """The RoPE of a configuration, without a window.

    Args:
        layer_type: where parameters are kept per kind of layer, its kind.
        partial: whether the family's code knows heads of which only a part is turned.
    """
    parameters = hf.rope_parameters or {}
    if layer_type is not None:
        parameters = parameters[layer_type]
    where = "config.json: rope_scaling"
    kind = parameters.get("rope_type", "default")
    if kind == "dynamic":
        problem = "RoPE type 'dynamic' changes with the sequence length and cannot be folded into a table"
        raise BoaEdgeError(problem, where=where, fix="Accepted: default, linear, llama3, yarn, longrope")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        fix = "Accepted: default, linear, llama3, yarn, longrope"
        raise BoaEdgeError(f"unknown RoPE type {kind!r}", where=where, fix=fix)
    part = float(parameters.get("partial_rotary_factor") or 1.0)
    if part != 1.0 and not partial:
        problem = f"partial_rotary_factor {part:g}, which `transformers` does not apply to this architecture"
        raise BoaEdgeError(problem, where=where, fix="Remove it, or correct `model_type`")
    if kind == "default":
        theta = float(parameters.get("rope_theta", 10000.0))
        dim = int(head_dim(hf) * part)
        inverse, scaling = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0
    else:
        arguments = {} if layer_type is None else {"layer_type": layer_type}
        # longrope: the frequencies of texts within the length of the first training; `max_positions` keeps to it.
        inverse, scaling = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"), **arguments)
    return AttentionSpec(tuple(inverse.to(torch.float32).tolist()), float(scaling))


def longest(hf: Any, attention: tuple[AttentionSpec, ...]) -> int:
    """The longest text that the model reads as it was trained to, under one set of frequencies."""
    length = hf.max_position_embeddings
    parameters = getattr(hf, "rope_parameters", None) or {}
    if parameters.get("rope_type") == "longrope":
        length = min(length, int(parameters["original_max_position_embeddings"]))
    windows = [each.window for each in attention]
    if None in windows:
        return length
    # Within its window such a model attends to everything: stay inside it.
    return min(length, *(window for window in windows if window is not None))


def window(hf: Any, layer: int) -> int | None:
    """The window of a layer, for families that say so in `layer_types`."""
    return hf.sliding_window if hf.layer_types[layer] == "sliding_attention" else None


def layer_names(prefix: str, **changes: Any) -> LayerNames:
    """Names of a block as most families have them; `changes` are its other fields."""
    names = {role: f"{prefix}.self_attn.{role}_proj" for role in ("q", "k", "v", "o")}
    names |= {role: f"{prefix}.mlp.{role}_proj" for role in ("gate", "up", "down")}
    norms = {
        "attention_norm": f"{prefix}.input_layernorm",
        "mlp_norm": f"{prefix}.post_attention_layernorm",
    }
    return LayerNames(**{**names, **norms, **changes})


def decoder(
    hf: Any, attention: tuple[AttentionSpec, ...], names: Callable[[str], LayerNames], **changes: Any
) -> DecoderSpec:
    """The spec of a family with the module names and configuration fields of Llama.

    Args:
        names: prefix of a block -> its names.
        changes: fields of DecoderSpec that differ.
    """
    facts: dict[str, Any] = {
        "family": hf.model_type,
        "layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_key_value_heads,
        "head_dim": head_dim(hf),
        "vocab_size": hf.vocab_size,
        "norm_eps": hf.rms_norm_eps,
        "attention": attention,
        "attention_scale": head_dim(hf) ** -0.5,
        "biases": biases(hf),
        "max_positions": longest(hf, attention),
        "tied_embeddings": bool(hf.tie_word_embeddings),
        "embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "layer_names": tuple(names(f"model.layers.{layer}") for layer in range(hf.num_hidden_layers)),
    }
    return DecoderSpec(**(facts | changes))
