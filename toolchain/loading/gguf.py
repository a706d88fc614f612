"""A GGUF file: dequantized to float32 and handed on as a plain model."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from accelerate import init_empty_weights
from gguf import GGUFReader, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from boa_edge.errors import BoaEdgeError
from boa_edge.files import sha256_file
from toolchain.families import FAMILIES, DecoderSpec, describe
from toolchain.loading.sound import check_model
from toolchain.loading.source import SourceModel

_DAMAGED = (ValueError, IndexError, OverflowError, struct.error, UnicodeDecodeError, KeyError, OSError)
# Sizes of heads that are not read from the file (Qwen3), or on which a scale depends that is not in it (Gemma).
_ASSUMED_HEADS = {"qwen3": 128, "gemma2": 256, "gemma3": 256}


def load_gguf(path: Path, identity: str) -> SourceModel:
    """Load a GGUF file in float32.

    Raises:
        BoaEdgeError: the file is damaged, of a family that nobody serves, or says what `transformers` does not read.
    """
    reader, metadata = _read_checked(path)
    try:
        with _read_once(reader, path):
            loaded = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, NotImplementedError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BoaEdgeError(f"cannot be read ({reason})", where=path) from None
    # The loaded model remembers that it came from a GGUF and refuses to be saved or called a float model.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    config = type(loaded.config)(**settings)
    with init_empty_weights(include_buffers=False):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    check_model(model, path)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, metadata.get(f"tokenizer.ggml.{key.replace('pad_token', 'padding_token')}"))
    document = {**config.to_dict(), "architectures": [type(loaded).__name__], "dtype": "float32"}
    document.pop("_name_or_path", None)
    generation = {key: document[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return SourceModel(
        identity=identity,
        model=model.eval(),
        tokenizer=tokenizer,
        config=document,
        generation_config=generation,
        spec=describe(document, path),
        files={path.name: sha256_file(path)},
    )


def describe_gguf(path: Path) -> DecoderSpec:
    """What `load_gguf` would find, from the file's metadata alone.

    Raises:
        BoaEdgeError: as `load_gguf`.
    """
    reader, _ = _read_checked(path)
    try:
        with _read_once(reader, path):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, NotImplementedError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BoaEdgeError(f"cannot be read ({reason})", where=path) from None
    return describe({**config.to_dict(), "architectures": [name]}, path)


def _read_checked(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """The file and its metadata. BoaEdgeError where `transformers` would read it wrongly or not at all."""
    reader = _open(path)
    metadata = _metadata(reader, path)
    architecture = metadata.get("general.architecture")
    accepted = sorted(name for family in FAMILIES for name in family.gguf_architectures)
    if architecture not in accepted:
        problem = f"GGUF of architecture {architecture!r}"
        raise BoaEdgeError(problem, where=path, fix=f"Accepted: {', '.join(accepted)}")
    _check_understood(metadata, path)
    return reader, metadata


def _open(path: Path) -> GGUFReader:
    """Opening it also proves that every tensor lies inside the file."""
    try:
        return GGUFReader(path)
    except _DAMAGED as error:
        raise _damaged(path, error) from None


@contextmanager
def _read_once(reader: GGUFReader, path: Path) -> Iterator[None]:
    """Inside, `transformers` uses this reader of the file, and makes the table of tensor names once.

    It opens a reader for the configuration, one for the weights and one for the tokenizer, each of which takes seconds
    for a large vocabulary, and makes the table anew for every module.
    """

    def open_file(file: Any, *others: Any) -> GGUFReader:
        return reader if Path(file).resolve() == path.resolve() else GGUFReader(file, *others)

    gguf.GGUFReader, gguf.get_tensor_name_map = open_file, functools.cache(get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = GGUFReader, get_tensor_name_map


def _metadata(reader: GGUFReader, path: Path) -> dict[str, Any]:
    """Scalar metadata of the file, and under `rope_tensors` the names of tensors that hold RoPE factors."""
    try:
        fields = reader.fields.items()
        wanted = (
            "general.architecture",
            "token_id",
            "rope.scaling.type",
            "rope.scaling.factor",
            "attention.key_length",
        )
        metadata = {key: field.contents() for key, field in fields if key.endswith(wanted)}
        return metadata | {"rope_tensors": [t.name for t in reader.tensors if t.name.startswith("rope_f")]}
    except _DAMAGED as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> BoaEdgeError:
    reason = " ".join(str(error).split())[:200]
    return BoaEdgeError(f"is truncated or no GGUF file ({reason})", where=path, fix="Download it again")


def _check_understood(metadata: dict[str, Any], path: Path) -> None:
    """Refuse what would be loaded as another model: `transformers` passes over these without a word."""
    architecture = metadata["general.architecture"]
    ignored = [f"tensor {name}" for name in metadata["rope_tensors"]]
    if metadata.get(f"{architecture}.rope.scaling.type", "none") != "none":
        ignored.append(f"{architecture}.rope.scaling")
    elif float(metadata.get(f"{architecture}.rope.scaling.factor", 1.0)) != 1.0:
        ignored.append(f"{architecture}.rope.scaling.factor")
    assumed = _ASSUMED_HEADS.get(architecture)
    if assumed is not None and metadata.get(f"{architecture}.attention.key_length", assumed) != assumed:
        ignored.append(f"heads of another size than {assumed}")
    if ignored:
        problem = f"`transformers` does not read its {', '.join(ignored)} and would load another model"
        raise BoaEdgeError(problem, where=path, fix="Use the model's safetensors files")
