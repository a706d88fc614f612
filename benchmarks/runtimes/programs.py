"""The files that run, each made once and kept by what decides it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from benchmarks.peers.table import last_error, python_of
from benchmarks.runtimes.contenders import OPTIMUM
from benchmarks.runtimes.lengths import CONTEXT
from boa_edge.errors import BoaEdgeError
from boa_edge.files import output_directory, sha256_file, write_json
from boa_edge.progress import say
from exporters import export
from toolchain.loading.default import default_model_file

ROOT = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).resolve().parent
# What every script is started with: no network, no bars, no accelerator.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}

# As its README has it for this backend, with an embedding of 8 bits per row and a cache like ours.
_OPTIMUM_OPTIONS = [
    *("--task", "text-generation", "--recipe", "xnnpack", "--use_custom_sdpa", "--use_custom_kv_cache"),
    *("--qlinear", "8da4w", "--qlinear_group_size", "32", "--qembedding", "8w", "--max_seq_len", str(CONTEXT)),
]


class NotAvailableError(Exception):
    """Why a contender is not in the table."""


@dataclass(frozen=True)
class Inputs:
    """What programs are made of.

    Attributes:
        name: what the source model was asked for by.
        model: the source model as a Hugging Face directory, float32; `model_key` is its identity.
        checkpoint: the quantized one.
        work: where programs are kept.
        environments: where other tools are installed.
    """

    name: str
    model: Path
    model_key: str
    checkpoint: Path
    work: Path
    environments: Path


@dataclass(frozen=True)
class Program:
    """A made program: what a driver opens, the files that hold it, and its identity."""

    path: Path
    files: tuple[Path, ...]
    key: str

    @property
    def size(self) -> int:
        """Bytes of the program and its weights, without tokenizer and settings."""
        return sum(file.stat().st_size for file in self.files)


def run_script(command: list[str], log: Path, threads: int | None = None) -> None:
    """Run one to its end, its output in `log`. NotAvailableError with its last line where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            env={**os.environ, **QUIET, **limits},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    if done.returncode:
        told = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        raise NotAvailableError(f"failed: {last_error(told)} (exit {done.returncode})")


def digest(document: Any) -> str:
    """A short identity of a JSON-ready document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def _made(inputs: Inputs, decides: dict[str, Any], make: Callable[[Path], None], pattern: str) -> Program:
    key = digest(decides)
    place = inputs.work / "programs" / key
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        say(f"making {decides['program']}")
        with output_directory(place) as partial:
            make(partial)
            write_json(partial / "request.json", decides)
    return Program(place, tuple(sorted(place.glob(pattern))), key)


def _sources(package: str) -> str:
    found = hashlib.sha256()
    for file in sorted((ROOT / package).rglob("*.py")):
        found.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:12]


def _bundle(runtime: str, form: str | None) -> Callable[[Inputs], Program]:
    def make(inputs: Inputs) -> Program:
        files = {file.name: sha256_file(file) for file in sorted(inputs.checkpoint.glob("*.safetensors"))}
        decides = {"program": f"{runtime} {form or ''}".strip(), "checkpoint": files, "source": _sources("exporters")}

        def lower(partial: Path) -> None:
            export(inputs.checkpoint, runtime, partial, form=form, overwrite=True)

        return _made(inputs, decides, lower, "model.*")

    return make


def _builder(precision: str) -> Callable[[Inputs], Program]:
    def make(inputs: Inputs) -> Program:
        version = metadata.version("onnxruntime-genai")
        decides = {"program": f"genai builder {precision}", "model": inputs.model_key, "version": version}

        def build(partial: Path) -> None:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(inputs.model)]
            command += ["-o", str(partial), "-p", precision, "-e", "cpu", "-c", str(inputs.work / "builder-cache")]
            run_script(command, inputs.work / "logs" / f"builder-{precision}.log")

        return _made(inputs, decides, build, "model.onnx*")

    return make


def _executorch_llama(inputs: Inputs) -> Program:
    script = _HERE / "build_executorch.py"
    decides = {
        "program": "ExecuTorch's Llama exporter (about ten minutes)",
        "model": inputs.model_key,
        "version": metadata.version("executorch"),
        "script": sha256_file(script),
    }

    def build(partial: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.runtimes.build_executorch"]
        command += ["--model", str(inputs.model), "--out", str(partial)]
        run_script(command, inputs.work / "logs" / "executorch-llama.log")

    return _made(inputs, decides, build, "model.pte")


def _executorch_optimum(inputs: Inputs) -> Program:
    decides = {
        "program": "optimum-executorch 8da4w (about ten minutes)",
        "model": inputs.model_key,
        "requirements": OPTIMUM.requirements,
        "options": _OPTIMUM_OPTIONS,
    }
    python = python_of(OPTIMUM, inputs.environments)

    def build(partial: Path) -> None:
        command = [str(python.with_name("optimum-cli")), "export", "executorch", "--model", str(inputs.model)]
        run_script(
            [*command, *_OPTIMUM_OPTIONS, "--output_dir", str(partial)], inputs.work / "logs" / "executorch-optimum.log"
        )

    return _made(inputs, decides, build, "model.pte")


def _gguf_source(inputs: Inputs) -> Path:
    path = default_model_file() if inputs.name == "default" else Path(inputs.name)
    if path.suffix != ".gguf":
        raise NotAvailableError("the source model is no GGUF file, and nothing here writes one of it")
    return path


def _gguf_as_it_is(inputs: Inputs) -> Program:
    path = _gguf_source(inputs)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} - {"F32", "F16", "BF16"}
    if "Q4_1" not in types:
        raise NotAvailableError(f"the source file holds {', '.join(sorted(types)) or 'float weights'}, not Q4_1")
    return Program(path, (path,), sha256_file(path)[:16])


def _gguf_q4_0(inputs: Inputs) -> Program:
    source = _gguf_source(inputs)
    decides = {"program": "gguf Q4_0", "source": sha256_file(source), "version": metadata.version("gguf")}
    made = _made(inputs, decides, lambda partial: requantize(source, partial / "model.gguf"), "model.gguf")
    return Program(made.files[0], made.files, made.key)


def requantize(source: Path, target: Path) -> None:
    """A GGUF file anew: matrices of the blocks as Q4_0, embedding and head as Q8_0, all else as it is.

    Raises:
        BoaEdgeError: no GGUF file.
    """
    try:
        reader = gguf.GGUFReader(source)
    except ValueError as error:
        raise BoaEdgeError(f"is no GGUF file ({error})", where=source) from None
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        kinds = field.types
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        element = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kinds[0], element)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for tensor in reader.tensors:
        if tensor.tensor_type.name in ("F32", "F16"):
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
            continue
        inside = tensor.name.startswith("blk.")
        kind = gguf.GGMLQuantizationType.Q4_0 if inside else gguf.GGMLQuantizationType.Q8_0
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# A new program is one line here.
PROGRAMS: dict[str, Callable[[Inputs], Program]] = {
    "onnx-qdq": _bundle("onnx", "qdq"),
    "onnx-fused": _bundle("onnx", "fused"),
    "executorch": _bundle("executorch", None),
    "genai-int4": _builder("int4"),
    "genai-fp32": _builder("fp32"),
    "executorch-llama": _executorch_llama,
    "executorch-optimum": _executorch_optimum,
    "gguf-q4_1": _gguf_as_it_is,
    "gguf-q4_0": _gguf_q4_0,
}
