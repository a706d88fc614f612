"""How much memory and time quantizing takes, on a model of random weights in the shape of a large one.

    python -m benchmarks.quantize_memory --shape llama-1b --calibration valid.txt [--blocks 2] [--sequences 64]

Runs `boa-edge quantize --stream` on it, from the command to the checkpoint, and prints one JSON object as its last
line: seconds, and the peak of what the process itself held (anonymous pages) and of all that it touched (pages of
mapped files among it). Every block has the same shapes, so a model of few blocks has the peak of one of many, and the
time of the rest can be told from it. Random weights say nothing about accuracy, and nothing here does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.export_memory import SHAPE as LLAMA_3_8B
from benchmarks.export_memory import measured
from boa_edge.files import write_json, write_text
from toolchain.families import DecoderSpec, LayerNames, describe
from toolchain.loading import load_source
from toolchain.recipe import DEFAULT_RECIPE, load_recipe

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": LLAMA_3_8B
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "head_dim": 64,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "llama-8b": LLAMA_3_8B | {"num_hidden_layers": 32},
}
_INDEX = "model.safetensors.index.json"


def write_model(directory: Path, config: dict[str, Any]) -> DecoderSpec:
    """A Hugging Face directory of random weights, a block at a time: linears of a variance that keeps that of x."""
    directory.mkdir(parents=True)
    spec = describe(config, "config.json")
    generator = torch.Generator().manual_seed(0)

    def noise(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float32).mul_(columns**-0.5).bfloat16()

    ends = {
        f"{spec.embedding}.weight": noise(spec.vocab_size, spec.hidden_size),
        f"{spec.final_norm}.weight": torch.ones(spec.hidden_size, dtype=torch.bfloat16),
    }
    if not spec.tied_embeddings:
        ends[f"{spec.head}.weight"] = noise(spec.vocab_size, spec.hidden_size)
    places: dict[str, str] = {}

    def write(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, directory / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    write("ends.safetensors", ends)
    del ends
    for index, names in enumerate(spec.layer_names):
        block = {f"{norm}.weight": torch.ones(spec.hidden_size, dtype=torch.bfloat16) for norm in names.norms()}
        shapes = _shapes(spec, names).items()
        write(f"block-{index}.safetensors", block | {f"{name}.weight": noise(*shape) for name, shape in shapes})
    write_json(directory / _INDEX, {"metadata": {}, "weight_map": places})
    write_json(directory / "config.json", config)
    load_source("default").tokenizer.save_pretrained(directory)
    return spec


def _shapes(spec: DecoderSpec, names: LayerNames) -> dict[str, tuple[int, int]]:
    """[out, in] of a block's linears, by module."""
    keys = spec.kv_heads * spec.head_dim
    rows = {"q": spec.heads * spec.head_dim, "k": keys, "v": keys, "o": spec.hidden_size, "down": spec.hidden_size}
    inputs = spec.linear_inputs()
    return {
        part.module: (rows.get(role, spec.intermediate_size), inputs[part.module])
        for role, part in names.parts().items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-1b")
    parser.add_argument("--blocks", type=int, help="all of the shape's, unless given")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--sequences", type=int, help="of calibration text; the recipe's, unless given")
    parser.add_argument("--spill", action="store_true", help="activations wait on disk")
    parser.add_argument(
        "--scratch", type=Path, help="where to put the model and the checkpoint, which are deleted again"
    )
    arguments = parser.parse_args()
    config = dict(SHAPES[arguments.shape])
    if arguments.blocks:
        config["num_hidden_layers"] = arguments.blocks
    recipe = load_recipe(arguments.recipe)
    if arguments.sequences:
        calibration = recipe.calibration.model_copy(update={"sequences": arguments.sequences})
        recipe = recipe.model_copy(update={"calibration": calibration})
    with tempfile.TemporaryDirectory(prefix="boa-edge-memory-", dir=arguments.scratch) as name:
        scratch = Path(name)
        spec = write_model(scratch / "model", config)
        write_text(scratch / "recipe.yaml", recipe.to_yaml())
        command = [str(Path(sys.executable).parent / "boa-edge"), "quantize", str(scratch / "model"), "--stream"]
        command += ["--recipe", str(scratch / "recipe.yaml"), "--calibration", str(arguments.calibration.absolute())]
        command += ["--spill", str(scratch / "spilled")] if arguments.spill else []
        found = measured([*command, "-o", str(scratch / "checkpoint")], say=True)
    size = {
        "shape": arguments.shape,
        "blocks": spec.layers,
        "sequences": recipe.calibration.sequences,
        "spill": arguments.spill,
    }
    print(json.dumps({**size, "recipe": recipe.name, **found}))


if __name__ == "__main__":
    main()
