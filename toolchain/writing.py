"""The checkpoint directory: codes, what stays in floating point, how they came about, what to hold a device against."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from boa_edge import __version__
from boa_edge.files import write_json, write_text
from toolchain.calibration import Calibration
from toolchain.checkpoint import ACTIVATIONS, KV_CACHE, write_transforms, write_weights
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading.papers import copy_papers
from toolchain.loading.streamed import streamed_blocks
from toolchain.outliers import as_documents
from toolchain.payload import float_parameters
from toolchain.prepare import Prepared
from toolchain.recipe import Recipe
from toolchain.scoring import Comparison, Scored
from toolchain.transforms import online_products

_PROMPT = "The capital of France is"
_REFERENCE_TOKENS = 96
_GREEDY_TOKENS = 32
_STREAMED_GREEDY_TOKENS = 8  # for each of which a model whose blocks are on disk reads them all
_RECORDED = ("torch", "transformers", "compressed-tensors", "safetensors", "numpy", "numba", "gguf")


def versions() -> dict[str, str]:
    """Of what decides the codes and the files."""
    return {"boa-edge": __version__} | {name: metadata.version(name) for name in _RECORDED}


def arithmetic() -> dict[str, Any]:
    """What the rounding of sums depends on, and by it the codes, beside what `versions` says."""
    return {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}


def write_checkpoint(
    directory: Path,
    prepared: Prepared,
    recipe: Recipe,
    text: Calibration,
    own: Scored,
    rows: list[Comparison],
    seconds: float,
) -> None:
    """Write every file of a checkpoint into `directory` (docs/contracts.md).

    Args:
        own: what is written; `rows` has its figures last, behind those of other methods.
        seconds: of the whole run.
    """
    source, quantized = prepared.source, own.quantized
    scale_dtype = torch.bfloat16 if recipe.round_scales else torch.float32
    floats = float_parameters(source, quantized)
    # R3 alone cancels: queries and keys are turned alike.
    owes = any(product.kind != "r3" for product in online_products(source.spec, prepared.transforms))
    write_weights(directory, source.config, source.spec, quantized.weights, floats, scale_dtype, owes_products=owes)
    write_transforms(directory, prepared.transforms)
    if own.activations is not None:
        write_json(directory / ACTIVATIONS, own.activations.to_document())
    if prepared.cache is not None:
        write_json(directory / KV_CACHE, prepared.cache.to_document())
    source.tokenizer.save_pretrained(directory)
    copy_papers(source.papers, directory)
    write_json(directory / "generation_config.json", source.generation_config)
    write_text(directory / "recipe.yaml", recipe.to_yaml())
    save_file(_reference(prepared, text, own), directory / "reference.safetensors")
    provenance = {
        "schema_version": 1,
        "created_by": f"boa-edge {__version__}",
        "source": {"model": source.identity, "files": source.files},
        "calibration": text.source,
        "versions": versions(),
        "platform": platform.platform(),
        "arithmetic": arithmetic(),
        "seed": recipe.seed,
        "recipe": recipe.name,
        "method": recipe.method,
        "layers": [{"name": name, **layer} for name, layer in quantized.layers.items()],
        "comparison": [asdict(row) for row in rows],
        "evaluation": {
            "tokens": text.scored.numel(),
            "sequence_length": text.scored.shape[1],
            "source": text.source["source"],
            "overlaps_calibration": text.overlap,
            "overlaps_guard": own.guarded is not None and text.judges_scored,
            "original_perplexity": own.original_perplexity,
        },
        "transforms": {"names": list(recipe.transforms), "notes": prepared.notes},
        "activations": None if own.guarded is None else own.guarded.to_document(),
        "kv_cache": prepared.cache_statistics,
        "outliers": {"before": as_documents(prepared.before), "after": as_documents(prepared.after)},
        "seconds": round(seconds, 1),
        "peak_mb": rows[-1].peak_mb,
    }
    write_json(directory / "provenance.json", provenance)


def _reference(prepared: Prepared, text: Calibration, own: Scored) -> dict[str, torch.Tensor]:
    """Logits and greedy tokens of the original and of the fake-quantized model, to hold a device against."""
    source = prepared.source
    original = FakeQuantized(source.model, source.spec, {})
    fake = FakeQuantized(source.model, source.spec, own.quantized.weights, own.activations, prepared.cache)
    tokens = text.scored[0, :_REFERENCE_TOKENS]
    prompt = torch.tensor(source.tokenizer(_PROMPT)["input_ids"], dtype=torch.int64)
    greedy = _GREEDY_TOKENS if streamed_blocks(source.model) is None else _STREAMED_GREEDY_TOKENS
    with torch.inference_mode():
        return {
            "tokens": tokens.clone(),
            "original_logits": original.logits(tokens[None])[0].to(torch.float16),
            "quantized_logits": fake.logits(tokens[None])[0].contiguous(),
            "prompt": prompt,
            "original_greedy": original.greedy(prompt, greedy),
            "quantized_greedy": fake.greedy(prompt, greedy),
        }
