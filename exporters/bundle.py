"""The bundle: what `export` hands to `measure` and `evaluate` (docs/contracts.md)."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json, sha256_file, write_json
from exporters.signature import SIGNATURE, check_signature
from toolchain.checkpoint import Checkpoint
from toolchain.loading.papers import CARD_COPY, LICENCES

MANIFEST = "manifest.json"
RUNTIME = "runtime.json"
LOWERING = "lowering.json"  # of ExecuTorch
KERNELS = "kernels.json"  # of ONNX
REFERENCE = "reference"
SCHEMA_VERSION: Literal[1] = 1

Form = Literal["qdq", "fused", "fused-int8", "llm"]

_EXPORT_AGAIN = "Export the bundle again"
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "generation_config.json",
    *LICENCES,
    CARD_COPY,
)
_REFERENCE_FILES = ("reference.safetensors", "recipe.yaml", "provenance.json")
_VERSIONS = ("boa-edge", "executorch", "onnx", "onnx-ir", "onnxruntime", "torch")

M = TypeVar("M", bound=BaseModel)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]


class RuntimeConfig(_Document):
    """`runtime.json`: how to load the bundle.

    Attributes:
        model: the program's file name inside the bundle.
        form: which inputs the program takes (docs/contracts.md); bundles from before there were two have none.
        activations: precision of the inputs of the quantized linears, chosen on purpose.
        session_config: options of the runtime's session, to be passed on as they are.
        context_length: the longest text in tokens; of the form `llm`, how many the program's own cache holds.
        prefill_length: the most tokens that one call takes; only of the form `llm`, None otherwise.
    """

    runtime: str
    model: str
    form: Form = "qdq"
    activations: Literal["int8", "float32"]
    session_config: dict[str, str]
    context_length: int = Field(gt=0)
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    vocab_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    prefill_length: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _prefill_fits(self) -> Self:
        if (self.form == "llm") != (self.prefill_length is not None):
            raise ValueError("the form llm has a prefill_length, and no other form has")
        if self.prefill_length is not None and self.prefill_length > self.context_length:
            raise ValueError(f"prefill_length {self.prefill_length} exceeds context_length {self.context_length}")
        return self

    @model_validator(mode="after")
    def _options_have_names(self) -> Self:
        if "" in self.session_config:
            raise ValueError("session_config: an option has no name")
        return self


class FileEntry(BaseModel):
    """Size in bytes, hex SHA-256 and role of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    role: Literal["runtime", "reference"]


class Manifest(_Document):
    """`manifest.json`: every other file of the bundle, the recipe, and what made it."""

    created_by: dict[str, str]
    recipe: dict[str, Any]
    files: dict[str, FileEntry]


def copy_companions(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy tokenizer, generation settings, `config.json` (without `quantization_config`) and `reference/`."""
    names = {path.name for pattern in _COMPANIONS for path in checkpoint.path.glob(pattern) if path.is_file()}
    for name in sorted(names):
        shutil.copyfile(checkpoint.path / name, directory / name)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    write_json(directory / "config.json", config)
    present = [name for name in _REFERENCE_FILES if (checkpoint.path / name).is_file()]
    if present:
        (directory / REFERENCE).mkdir()
    for name in present:
        shutil.copyfile(checkpoint.path / name, directory / REFERENCE / name)


def token_ids(checkpoint: Checkpoint) -> tuple[tuple[int, ...], int | None]:
    """End-of-sequence ids and the beginning-of-sequence id, from generation_config.json or else config.json."""
    path = checkpoint.path / "generation_config.json"
    generation = read_json(path, "the generation settings") if path.exists() else {}
    settings = {**checkpoint.config, **{key: value for key, value in generation.items() if value is not None}}
    ends = settings.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return tuple(int(token) for token in ends), settings.get("bos_token_id")


def write_manifest(directory: Path, recipe: dict[str, Any]) -> Manifest:
    """Write `manifest.json` over every file below `directory`; those below `reference/` are not needed to run."""
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (MANIFEST, SIGNATURE):
            role: Literal["runtime", "reference"] = "reference" if name.startswith(f"{REFERENCE}/") else "runtime"
            files[name] = FileEntry(size=path.stat().st_size, sha256=sha256_file(path), role=role)
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    manifest = Manifest(schema_version=SCHEMA_VERSION, created_by=versions, recipe=recipe, files=files)
    write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file has been compared with its manifest, which lists all of them.

    Attributes:
        signer: the public key by which the manifest is signed; None where there is no signature, or none was asked for.
    """

    path: Path
    manifest: Manifest
    runtime: RuntimeConfig
    signer: bytes | None = None

    @property
    def model(self) -> Path:
        """The graph's file."""
        return self.path / self.runtime.model

    @classmethod
    def open(cls, path: Path, *, signature: bool = True) -> Bundle:
        """Read and check a bundle.

        Args:
            signature: check the signature where there is one; False is for who signs anew.

        Raises:
            BoaEdgeError: not a bundle, a file that is missing, differs from the manifest or is not in it, a signature
                that does not hold, or a foreign schema.
        """
        if not path.is_dir():
            raise BoaEdgeError("no such bundle", where=path, fix="Make one with `boa-edge export`")
        if not (path / MANIFEST).is_file():
            fix = "Make a bundle with `boa-edge export`"
            raise BoaEdgeError(f"is not a bundle (no {MANIFEST})", where=path, fix=fix)
        manifest = _parse(Manifest, path / MANIFEST, "the manifest")
        signer = check_signature(path / SIGNATURE, path / MANIFEST) if signature else None
        for name, entry in manifest.files.items():
            _verify(path, name, entry)
        if RUNTIME not in manifest.files:
            raise BoaEdgeError(f"does not list {RUNTIME}", where=path / MANIFEST, fix=_EXPORT_AGAIN)
        runtime = _parse(RuntimeConfig, path / RUNTIME, "the runtime settings")
        if runtime.model not in manifest.files:
            raise BoaEdgeError(
                f"names the model {runtime.model!r}, which {MANIFEST} does not list", where=path / RUNTIME
            )
        _refuse_strangers(path, {*manifest.files, MANIFEST, SIGNATURE})
        return cls(path, manifest, runtime, signer)


def _parse(model: type[M], path: Path, what: str) -> M:
    document = read_json(path, what)
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        found = f"has schema version {version!r}, this program reads {SCHEMA_VERSION}"
        raise BoaEdgeError(found, where=path, fix=f"{_EXPORT_AGAIN}, or use the version that wrote it")
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        found = f"{field}: {first['msg']}" if field else first["msg"].removeprefix("Value error, ")
        raise BoaEdgeError(found, where=path, fix=_EXPORT_AGAIN) from None


def _refuse_strangers(root: Path, known: set[str]) -> None:
    """A file that the manifest does not list is vouched for by nobody, yet a runtime might read it."""
    for path in sorted(root.rglob("*")):
        directory = path.is_dir() and not path.is_symlink()
        if not directory and path.relative_to(root).as_posix() not in known:
            raise BoaEdgeError(f"is not in {MANIFEST}", where=path, fix="Remove it, or export the bundle again")


def _verify(root: Path, name: str, entry: FileEntry) -> None:
    pure = PurePosixPath(name)
    path = root / pure
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass  # (said below)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        problem = f"lists {name[:80]!r}, which is no file's name ({reason})"
        raise BoaEdgeError(problem, where=root / MANIFEST, fix=_EXPORT_AGAIN) from None
    inside = os.path.realpath(path).startswith(os.path.realpath(root) + os.sep)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not inside:
        raise BoaEdgeError(f"lists {name!r}, which is outside the bundle", where=root / MANIFEST, fix=_EXPORT_AGAIN)
    if not path.is_file():
        raise BoaEdgeError(f"is missing, but {MANIFEST} lists it", where=path, fix=_EXPORT_AGAIN)
    size = path.stat().st_size
    if size != entry.size:
        found = f"has {size} bytes, {MANIFEST} says {entry.size}"
        raise BoaEdgeError(found, where=path, fix=f"Copy it again or {_EXPORT_AGAIN.lower()}")
    digest = sha256_file(path)
    if digest != entry.sha256:
        found = f"has SHA-256 {digest}, {MANIFEST} says {entry.sha256}"
        raise BoaEdgeError(found, where=path, fix=f"Copy it again or {_EXPORT_AGAIN.lower()}")
