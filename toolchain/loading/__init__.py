"""Model in: the embedded default, a Hugging Face directory, a GGUF file or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import read_json
from boa_edge.progress import say
from toolchain.families import DecoderSpec, describe
from toolchain.loading.default import default_model_file
from toolchain.loading.gguf import describe_gguf, load_gguf
from toolchain.loading.hub import download
from toolchain.loading.huggingface import load_directory, load_tokenizer
from toolchain.loading.source import SourceModel

__all__ = ["SourceModel", "describe_source", "load_source", "load_tokenizer"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def describe_source(model: str) -> DecoderSpec | None:
    """What decoder it is, from its configuration alone; None where that would have to be downloaded, or is none.

    Raises:
        BoaEdgeError: the configuration is broken, or of a model that nobody serves.
    """
    path = default_model_file() if model == "default" else Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return describe_gguf(path)
    config = path / "config.json"
    return describe(read_json(config, "the model's config"), config) if config.is_file() else None


def load_source(model: str, stream: bool | None = False) -> SourceModel:
    """Load a model by what the user wrote.

    Args:
        stream: leave the blocks of a safetensors model on disk until they are worked on; None: of a large one.

    Raises:
        BoaEdgeError, UsageError: it is none of the accepted, or it cannot be loaded.
    """
    if model == "default":
        return _whole(default_model_file(), "default (SmolLM2-135M-Instruct)", stream)
    path = Path(model).expanduser()
    if path.is_dir():
        return load_directory(path, model, stream)
    if path.is_file():
        if path.suffix == ".gguf":
            return _whole(path, model, stream)
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            fix = "Pickles can run code and are never read: save the model with safetensors first"
            raise BoaEdgeError("is a pickle checkpoint", where=path, fix=fix)
        raise UsageError("is no model", where=path, fix="Accepted: a model directory, a .gguf file, a hub id, default")
    if _HUB_ID.fullmatch(model) and not path.parent.is_dir():
        return load_directory(download(model), model, stream)
    fix = "Accepted: `default`, a model directory, a .gguf file or a hub id such as owner/name"
    raise UsageError("no such model", where=model, fix=fix)


def _whole(path: Path, identity: str, stream: bool | None) -> SourceModel:
    if stream:
        say("a GGUF file is read as a whole, streaming or not")
    return load_gguf(path, identity)
