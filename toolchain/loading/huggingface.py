"""A Hugging Face model directory: safetensors only, no code of the directory's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json, sha256_file
from boa_edge.progress import say
from toolchain.families import describe
from toolchain.loading.papers import find_papers
from toolchain.loading.shards import Stored, find_shards, stored_tensors
from toolchain.loading.sound import check_head, check_model
from toolchain.loading.source import SourceModel
from toolchain.loading.streamed import is_large, load_streamed

# By which text is cut into tokens and written, beside the weights.
_READ = (
    "tokenizer*",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# What building a model of a wrong configuration raises.
_UNFIT = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,
)


def load_directory(directory: Path, identity: str, stream: bool | None = False) -> SourceModel:
    """Load a model directory in float32.

    Args:
        stream: leave the blocks on disk until they are worked on; None: where the model is large for this machine.

    Raises:
        BoaEdgeError: a file is missing, damaged or a pickle; the architecture is unknown; the directory wants its own
            code run; the weights do not fit the configuration.
    """
    if not (directory / "config.json").exists() and (directory / "adapter_config.json").exists():
        fix = "Merge it into its base model and save that (peft: `merge_and_unload()`, then `save_pretrained`)"
        raise BoaEdgeError("holds an adapter, not a model", where=directory, fix=fix)
    config = _mapping(directory / "config.json", "the model configuration")
    if config.get("auto_map"):
        raise BoaEdgeError(
            "the model wants code of its own directory run (auto_map), which is refused",
            where=directory / "config.json",
            fix="Remove `auto_map` if the weights fit a class that `transformers` ships",
        )
    spec = describe(config, directory / "config.json")
    if config.get("quantization_config"):
        fix = "Start from the floating-point model"
        raise BoaEdgeError("the model is quantized already", where=directory / "config.json", fix=fix)
    settings = directory / "generation_config.json"
    generation = _mapping(settings, "the generation settings") if settings.exists() else {}
    shards = find_shards(directory)
    stored = stored_tensors(shards)
    check_head(directory, stored, spec)
    model = _open_model(directory, stored) if stream or (stream is None and is_large(stored)) else None
    model = _load_model(directory) if model is None else model
    check_model(model, directory)
    tokenizer = load_tokenizer(directory)
    read = [directory / "config.json", *shards, *(path for names in _READ for path in sorted(directory.glob(names)))]
    return SourceModel(
        identity=identity,
        model=model,
        tokenizer=tokenizer,
        config=config,
        generation_config=generation,
        spec=spec,
        files={path.name: sha256_file(path) for path in read if path.is_file()},
        papers=find_papers(directory),
    )


def _mapping(path: Path, what: str) -> dict[str, Any]:
    document = read_json(path, what)
    if not isinstance(document, dict):
        problem = f"{what} must be a JSON object, and here is {json.dumps(document)[:40]}"
        raise BoaEdgeError(problem, where=path, fix="Download the file again")
    return document


def load_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer, without running code of its own."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        fix = "Copy tokenizer.json and tokenizer_config.json of the model here"
        raise BoaEdgeError(f"no usable tokenizer ({reason})", where=directory, fix=fix) from None


def _open_model(directory: Path, stored: Mapping[str, Stored]) -> torch.nn.Module | None:
    try:
        model = load_streamed(directory, stored)
    except (*_UNFIT, SafetensorError):
        return None  # loading it as a whole says what is wrong
    if model is None:
        say("its weights are named otherwise in the files than in the model: it is loaded as a whole")
    else:
        say("its blocks stay on disk until they are worked on")
    return model


def _load_model(directory: Path) -> torch.nn.Module:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except _UNFIT as error:
        reason = " ".join(str(error).split())[:300]
        raise BoaEdgeError(f"cannot be loaded by `transformers` ({reason})", where=directory) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(str(key) for key in info.get(kind) or ()):
            listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            problem = f"weights do not fit the configuration: {kind.replace('_', ' ')} {listed}"
            raise BoaEdgeError(problem, where=directory, fix="Check config.json against the weights")
    return model.eval()
