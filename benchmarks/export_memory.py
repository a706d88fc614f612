"""How much memory an export takes, on a checkpoint of random codes in the shape of a large model.

    python -m benchmarks.export_memory [--layers 32] [--form fused] [--scratch DIR]

Prints one JSON object: sizes on disk, seconds, and the peak of what the exporting process itself held (anonymous pages)
and of all that it touched (the pages of mapped files among it, which the system takes back when it needs them).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from boa_edge.files import write_json, write_text
from toolchain.families import DecoderSpec, describe

# Llama 3 8B's.
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BITS, GROUP = 4, 32
_SIZES = {"I32": 4, "I64": 8, "BF16": 2}
_BF16_ONE = 0x3F80
_CHUNK = 1 << 24

Tensor = tuple[str, str, tuple[int, ...]]  # name, type, shape


def quantized(name: str, rows: int, columns: int, bits: int, group: int | None, prefix: bool = True) -> list[Tensor]:
    """The tensors of a packed weight [rows, columns]."""
    head = f"{name}." if prefix else ""
    return [
        (f"{head}weight_packed", "I32", (rows, columns * bits // 32)),
        (f"{head}weight_scale", "BF16", (rows, columns // group if group else 1)),
        (f"{head}weight_shape", "I64", (rows, columns)),
    ]


def tensors(spec: DecoderSpec) -> list[Tensor]:
    """What `model.safetensors` of the checkpoint holds."""
    heads, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    out = {"q": heads, "k": kv, "v": kv, "o": spec.hidden_size, "down": spec.hidden_size}
    found: list[Tensor] = [
        (f"{spec.embedding}.weight", "BF16", (spec.vocab_size, spec.hidden_size)),
        (f"{spec.final_norm}.weight", "BF16", (spec.hidden_size,)),
        *quantized(spec.head, spec.vocab_size, spec.hidden_size, 8, None),
    ]
    inputs = spec.linear_inputs()
    for names in spec.layer_names:
        found += [(f"{norm}.weight", "BF16", (spec.hidden_size,)) for norm in names.norms()]
        for role, part in names.parts().items():
            rows = out.get(role, spec.intermediate_size)
            found += quantized(part.module, rows, inputs[part.module], BITS, GROUP)
    return found


def write_safetensors(path: Path, held: list[Tensor], metadata: dict[str, str]) -> None:
    """Random codes, scales and norms of 1, a piece at a time."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, kind, shape in held:
        count = 2 if kind == "I64" else int(np.prod(shape))
        start, end = end, end + count * _SIZES[kind]
        header[name] = {"dtype": kind, "shape": [2] if kind == "I64" else list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, kind, shape in held:
            for piece in _pieces(kind, shape):
                stream.write(piece.data)


def _pieces(kind: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    if kind == "I64":
        yield np.asarray(shape, "<i8")
        return
    left = int(np.prod(shape))
    random = np.random.default_rng(left)
    noise = random.integers(0, 1 << 32, _CHUNK // 4, dtype=np.uint32)
    while left:
        count = min(left, len(noise))
        yield noise[:count] if kind == "I32" else np.full(count, _BF16_ONE, "<u2")
        left -= count


def write_checkpoint(directory: Path, layers: int) -> DecoderSpec:
    """A checkpoint as `quantize` writes one: linears of 4 bits in groups of 32, table and head of 8 bits per token."""
    directory.mkdir(parents=True)
    config = {**SHAPE, "num_hidden_layers": layers}
    spec = describe(config, "config.json")

    def group(targets: list[str], bits: int, size: int | None) -> dict[str, Any]:
        strategy = "group" if size else "channel"
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": size}
        return {"targets": targets, "weights": weights}

    groups = {
        "group_0": group([r"re:^model\.layers\..*$"], BITS, GROUP),
        "group_1": group([r"re:^lm_head$"], 8, None),
    }
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    write_json(directory / "config.json", {**config, "quantization_config": quantization})
    write_safetensors(directory / "model.safetensors", tensors(spec), {"format": "pt"})
    table = quantized("", spec.vocab_size, spec.hidden_size, 8, None, prefix=False)
    write_safetensors(directory / "embedding.safetensors", table, {"format": "pt", "bits": "8", "group_size": "0"})
    write_text(directory / "recipe.yaml", "method: random\n")
    write_json(directory / "provenance.json", {"source": "random codes"})
    write_json(directory / "generation_config.json", {"eos_token_id": [2], "bos_token_id": 1})
    write_text(directory / "tokenizer.json", "{}")
    return spec


def measured(command: list[str], *, say: bool = False) -> dict[str, float]:
    """Run a program; seconds and peaks in MB: `own` (anonymous pages) and `touched` (resident in all).

    Args:
        say: let what it says on stderr through; otherwise it is shown only where the program fails.
    """
    start = time.monotonic()
    peaks = {"own": 0, "touched": 0}
    with tempfile.TemporaryFile("w+") as said:
        stderr = None if say else said
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr)
        while process.poll() is None:
            for key, value in _resident(process.pid).items():
                peaks[key] = max(peaks[key], value)
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{_last(said)}")
    return {"seconds": round(time.monotonic() - start, 1), **{key: round(value / 1000) for key, value in peaks.items()}}


def _resident(pid: int) -> dict[str, int]:
    """In kilobytes; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    names = {"RssAnon": "own", "VmRSS": "touched"}
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key: int(values[name].split()[0]) for name, key in names.items() if name in values}


def _last(said: IO[str]) -> str:
    said.seek(0)
    return said.read()[-2000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--form", default="fused")
    parser.add_argument("--scratch", type=Path, help="where to put up to 12 GB that are deleted again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="boa-edge-memory-", dir=arguments.scratch) as name:
        scratch = Path(name)
        spec = write_checkpoint(scratch / "checkpoint", arguments.layers)
        command = [
            str(Path(sys.executable).parent / "boa-edge"),
            "export",
            str(scratch / "checkpoint"),
            "--runtime",
            "onnx",
        ]
        found = measured([*command, "--form", arguments.form, "-o", str(scratch / "bundle")])
        size = (scratch / "bundle" / "model.onnx.data").stat().st_size
        shutil.rmtree(scratch / "bundle")
    largest = max(spec.hidden_size * spec.intermediate_size, spec.vocab_size * spec.hidden_size)
    layer = 4 * spec.hidden_size * spec.hidden_size + 3 * spec.hidden_size * spec.intermediate_size
    told = {"form": arguments.form, "layers": spec.layers, "file_mb": round(size / 1e6), **found}
    print(json.dumps({**told, "codes_of_a_layer_mb": round(layer / 1e6), "largest_matrix_mb": round(largest / 1e6)}))


if __name__ == "__main__":
    main()
