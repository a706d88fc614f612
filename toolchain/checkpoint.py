"""The quantized checkpoint: a Hugging Face-like directory that the rest of the pipeline reads (docs/contracts.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json, write_json
from toolchain.activations.cache import CachePlan
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint_files import (
    ACTIVATIONS,
    EMBEDDING,
    GENERATION,
    KV_CACHE,
    TRANSFORMS,
    check_files,
    check_tensors,
    check_token_ids,
    read_schemes,
)
from toolchain.families import DecoderSpec, describe
from toolchain.packing import pack, scheme, unpack
from toolchain.quantized import QuantizedWeight
from toolchain.transforms.base import Transform
from toolchain.transforms.record import from_record, to_record

__all__ = ["ACTIVATIONS", "KV_CACHE", "TRANSFORMS", "Checkpoint", "stored_dtype", "write_transforms", "write_weights"]

_TRANSFORM_TENSORS = "transforms.safetensors"
# A type that `transformers` refuses: it would compute with the weights alone and be silently wrong.
_ROTATED, _MODEL_TYPE = "boa_edge_rotated", "boa_edge_model_type"
# What unpacking raises of tensors and metadata that are missing, or of other shapes and types.
_BROKEN = (KeyError, ValueError, TypeError, RuntimeError, IndexError)
_PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def write_weights(
    directory: Path,
    config: Mapping[str, Any],
    spec: DecoderSpec,
    quantized: Mapping[str, QuantizedWeight],
    floats: Mapping[str, Tensor],
    scale_dtype: torch.dtype,
    *,
    owes_products: bool = False,
) -> None:
    """Write `config.json`, `model.safetensors` and `embedding.safetensors`.

    Args:
        quantized: by module name; may hold the embedding table.
        floats: every other parameter by its full name, in the dtype to store.
        owes_products: the model computes products that its class does not know of; other tools have to refuse it.
    """
    tensors = {name: tensor.contiguous() for name, tensor in floats.items()}
    groups: dict[str, tuple[QuantizedWeight, list[str]]] = {}
    for name, weight in quantized.items():
        packed = pack(weight, scale_dtype)
        if name == spec.embedding:
            save_file(packed, directory / EMBEDDING, metadata=_embedding_metadata(weight))
            tensors[f"{name}.weight"] = weight.dequantize().to(stored_dtype(config))
            continue
        tensors.update({f"{name}.{part}": tensor for part, tensor in packed.items()})
        key = json.dumps(scheme(weight, []), sort_keys=True)
        groups.setdefault(key, (weight, []))[1].append(name)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config_groups = {
        f"group_{index}": scheme(weight, [f"re:^{re.escape(name)}$" for name in names])
        for index, (weight, names) in enumerate(groups.values())
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": [] if spec.head in quantized else [spec.head],
    }
    if owes_products:
        config = {**config, "model_type": _ROTATED, _MODEL_TYPE: config["model_type"]}
    write_json(directory / "config.json", {**config, "quantization_config": quantization})


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type of a model's floating-point weights by its config.json, in which it was called `torch_dtype` once."""
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def float_dtype(config: Mapping[str, Any], value: Tensor, *, transformed: bool) -> torch.dtype:
    """In which a parameter that is not quantized is stored.

    Vectors (norms, biases) of a transformed model are no numbers of the source's type any more: float32.
    """
    return torch.float32 if transformed and value.ndim == 1 else stored_dtype(config)


def write_transforms(directory: Path, transforms: Sequence[Transform]) -> None:
    """Write `transforms.json` and `transforms.safetensors`: what the weights have gone through; nothing without any."""
    if not transforms:
        return
    document, tensors = to_record(transforms)
    write_json(directory / TRANSFORMS, document)
    if tensors:
        save_file(tensors, directory / _TRANSFORM_TENSORS)


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]


def _embedding_metadata(weight: QuantizedWeight) -> dict[str, str]:
    return {"format": "pt", "bits": str(weight.bits), "group_size": str(weight.group_size or 0)}


class Checkpoint:
    """A quantized checkpoint on disk, read lazily.

    Raises:
        BoaEdgeError: the directory is not a quantized checkpoint, or a file of it is missing or broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise BoaEdgeError("no such quantized checkpoint", where=path, fix="Make one with `boa-edge quantize`")
        config = read_json(path / "config.json", "the model configuration")
        self.config: dict[str, Any] = config if isinstance(config, dict) else {}
        rotated = self.config.get("model_type") == _ROTATED
        if rotated:
            self.config["model_type"] = self.config.pop(_MODEL_TYPE, None)
        quantization = self.config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("format") != "pack-quantized":
            raise BoaEdgeError(
                "is not a quantized checkpoint (no pack-quantized quantization_config)",
                where=path / "config.json",
                fix="Make one with `boa-edge quantize`",
            )
        check_token_ids(self.config, path / "config.json")
        self.spec: DecoderSpec = describe(self.config, path / "config.json")
        self._schemes = read_schemes(quantization, path / "config.json")
        if (path / GENERATION).exists():
            check_token_ids(read_json(path / GENERATION, "the generation settings"), path / GENERATION)
        self._tensors = self._open("model.safetensors")
        self._names = set(self._tensors.keys())
        check_files(path, self.recipe, rotated=rotated)
        check_tensors(self._shapes(), self.spec, self._schemes, path)
        self._table_format = self._read_table_format()

    def _open(self, name: str) -> Any:
        path = self.path / name
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise BoaEdgeError("is missing", where=path, fix="Quantize the model again") from None
        except (SafetensorError, OSError) as error:
            raise BoaEdgeError(f"is truncated or damaged ({error})", where=path, fix="Quantize again") from None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, and of every weight that stands as codes."""
        shapes = {name: tuple(self._tensors.get_slice(name).get_shape()) for name in self._names}
        codes = [name.removesuffix("_packed") for name in self._names if name.endswith(".weight_packed")]
        for name in codes:
            shape = self.tensor(f"{name}_shape")
            shapes[name] = tuple(int(size) for size in shape.flatten())
        return shapes

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The effective recipe."""
        path = self.path / "recipe.yaml"
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BoaEdgeError("is missing", where=path, fix="Quantize the model again") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problem = f"is not valid YAML ({' '.join(str(error).split())})"
            raise BoaEdgeError(problem, where=path, fix="Quantize the model again") from None
        except OSError as error:
            raise BoaEdgeError(f"cannot be read ({error.strerror})", where=path) from None
        if not isinstance(document, dict):
            problem = "is not a recipe: a mapping of fields is expected"
            raise BoaEdgeError(problem, where=path, fix="Quantize the model again")
        return document

    @cached_property
    def activations(self) -> ActivationPlan | None:
        """How the linears' inputs are quantized; None: they stay in floating point."""
        path = self.path / ACTIVATIONS
        if not path.exists():
            return None
        return ActivationPlan.from_document(read_json(path, "the activation plan"), path)

    @cached_property
    def kv_cache(self) -> CachePlan | None:
        """How keys and values are kept; None: in floating point."""
        path = self.path / KV_CACHE
        if not path.exists():
            return None
        return CachePlan.from_document(read_json(path, "the plan for the cache"), self.spec, path)

    @cached_property
    def transforms(self) -> list[Transform]:
        """What the weights have gone through, in order; the running model may owe them products."""
        path = self.path / TRANSFORMS
        if not path.exists():
            return []
        tensors = self._open(_TRANSFORM_TENSORS) if (self.path / _TRANSFORM_TENSORS).exists() else None
        held = {} if tensors is None else {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        return from_record(read_json(path, "the transforms"), held, self.spec, str(path))

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Where the checkpoint came from."""
        document = read_json(self.path / "provenance.json", "the provenance")
        assert isinstance(document, dict)
        return document

    def _read_table_format(self) -> tuple[int, int | None] | None:
        """Bits and group size of the embedding table; None where it is no codes."""
        path = self.path / EMBEDDING
        if not path.exists():
            return None
        metadata = self._open(EMBEDDING).metadata() or {}
        try:
            return int(metadata["bits"]), int(metadata["group_size"]) or None
        except (KeyError, ValueError) as error:
            problem = f"its metadata do not tell bits and group size ({_reason(error)})"
            raise BoaEdgeError(problem, where=path, fix="Quantize again") from None

    @cached_property
    def _embedding(self) -> QuantizedWeight | None:
        if self._table_format is None:
            return None
        path, tensors = self.path / EMBEDDING, self._open(EMBEDDING)
        parts = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
        try:
            table = unpack(parts, *self._table_format)
        except _BROKEN as error:
            raise BoaEdgeError(f"broken codes ({_reason(error)})", where=path, fix="Quantize again") from None
        expected = (self.spec.vocab_size, self.spec.hidden_size)
        if table.shape != expected:
            problem = f"has codes of shape {list(table.shape)}, and config.json gives it {list(expected)}"
            raise BoaEdgeError(problem, where=path, fix="Quantize again")
        return table

    def is_quantized(self, module: str) -> bool:
        """Whether `module` holds integer codes. A tied head answers for the embedding table."""
        if module == self.spec.embedding or (module == self.spec.head and self.spec.tied_embeddings):
            return self._embedding is not None
        return f"{module}.weight_packed" in self._names

    def quantized(self, module: str) -> QuantizedWeight:
        """The integer codes of a module, e.g. `model.layers.0.self_attn.q_proj`; of the table for a tied head."""
        if module == self.spec.embedding or (module == self.spec.head and self.spec.tied_embeddings):
            if self._embedding is None:
                raise KeyError(module)
            return self._embedding
        for patterns, weights in self._schemes:
            if any(pattern.match(module) for pattern in patterns):
                names = [part for part in _PACKED if f"{module}.{part}" in self._names]
                parts = {part: self.tensor(f"{module}.{part}") for part in names}
                try:
                    return unpack(parts, weights["num_bits"], weights["group_size"])
                except _BROKEN as error:
                    where = f"{self.path / 'model.safetensors'}: {module}"
                    raise BoaEdgeError(f"broken codes ({_reason(error)})", where=where, fix="Quantize again") from None
        raise KeyError(module)

    def has(self, name: str) -> bool:
        """Whether a float parameter such as `model.layers.0.self_attn.q_proj.bias` exists."""
        return name in self._names

    def tensor(self, name: str) -> Tensor:
        """A stored tensor by its full name, in its stored dtype."""
        try:
            return self._tensors.get_tensor(name)
        except SafetensorError:
            fix = "Quantize the model again"
            raise BoaEdgeError(f"has no tensor {name!r}", where=self.path / "model.safetensors", fix=fix) from None

    def dequantized_state(self) -> dict[str, Tensor]:
        """Every parameter of the model in float32, quantized ones as the values that their codes stand for."""
        state: dict[str, Tensor] = {}
        for name in self._names:
            module, _, part = name.rpartition(".")
            if part == "weight_packed":
                state[f"{module}.weight"] = self.quantized(module).dequantize()
            elif part not in _PACKED:
                state[name] = self.tensor(name).to(torch.float32)
        if self._embedding is not None:
            state[f"{self.spec.embedding}.weight"] = self._embedding.dequantize()
        return state
