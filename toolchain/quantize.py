"""The first stage: a model in, a quantized checkpoint out."""

from __future__ import annotations

import platform
import resource
import shutil
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from boa_edge import __version__
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import as_input, check_output, check_writable, output_directory, write_json, write_text
from boa_edge.progress import say
from toolchain import distributed
from toolchain.accelerator import find_accelerator
from toolchain.activations.plan import ActivationPlan
from toolchain.allocation import check_budget
from toolchain.calibration import Calibration, kept_text, load_calibration
from toolchain.checkpoint import ACTIVATIONS, KV_CACHE, stored_dtype, write_transforms, write_weights
from toolchain.fake_quantized import FakeQuantized
from toolchain.guard import Guarded, guard
from toolchain.loading import SourceModel, load_source
from toolchain.loading.papers import copy_papers
from toolchain.loading.streamed import streamed_blocks
from toolchain.methods import METHODS
from toolchain.metrics import Fidelity, evaluate_logits
from toolchain.outliers import as_documents
from toolchain.prepare import Prepared, prepare
from toolchain.products import fast_products
from toolchain.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from toolchain.resume import ResumeFile
from toolchain.run import QuantizedModel, quantize_model
from toolchain.spill import Spill
from toolchain.transforms import online_products, to_record, transforms_of

_PROMPT = "The capital of France is"
_REFERENCE_TOKENS = 96
_GREEDY_TOKENS = 32
_STREAMED_GREEDY_TOKENS = 8  # for each of which a model whose blocks are on disk reads them all
_RECORDED = ("torch", "transformers", "compressed-tensors", "safetensors", "numpy", "numba", "gguf")
_GROUP_SIZES = (16, 32, 64, 128, 192, 256)


@dataclass(frozen=True)
class Comparison:
    """One method on the held-out text.

    Attributes:
        payload_bytes: codes, scales and float tensors as they count on disk.
        peak_mb: peak resident memory of the process so far, in megabytes (10^6).
    """

    method: str
    recipe: str
    perplexity: float
    kl: float
    top1: float
    payload_bytes: int
    seconds: float
    peak_mb: int


@dataclass(frozen=True)
class QuantizeResult:
    """What the stage made."""

    checkpoint: Path
    recipe: str
    rows: tuple[Comparison, ...]
    original_perplexity: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        own = self.rows[-1]
        return {
            "checkpoint": str(self.checkpoint),
            "recipe": self.recipe,
            "perplexity": round(own.perplexity, 4),
            "kl": round(own.kl, 5),
            "top1": round(own.top1, 4),
            "original_perplexity": round(self.original_perplexity, 4),
            "payload_bytes": own.payload_bytes,
            "compared": [asdict(row) for row in self.rows[:-1]],
            "peak_mb": own.peak_mb,
            "seconds": round(self.seconds, 1),
        }


@distributed.joined()
@fast_products()
def quantize(
    model: str,
    output: Path,
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    calibration: str | None = None,
    compare: tuple[str, ...] = (),
    overwrite: bool = False,
    stream: bool | None = None,
    spill: Path | None = None,
    accelerator: str | None = None,
) -> QuantizeResult:
    """Quantize a model and write the checkpoint; under `torchrun` the ranks share the work and the first one writes.

    Args:
        model: `default`, a Hugging Face directory, a hub id or a GGUF file.
        recipe: by name or file.
        calibration: a text file, a data set's name, or `self`; None means `self`.
        compare: other methods to run on the same model and text, for the comparison in the report.
        stream: leave the model's blocks on disk until they are worked on; None: where it is large for this machine.
        spill: directory for activations, mapped into memory; None keeps them in memory, the accelerator's where there
            is one.
        accelerator: on which device blocks are worked on, by PyTorch's name for it; None: the processor.

    Raises:
        UsageError, BoaEdgeError: as the parts say.
    """
    start = time.monotonic()
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    for method in compare:
        if method not in METHODS:
            raise UsageError(f"unknown method {method!r}", where="--compare", fix=f"Accepted: {', '.join(METHODS)}")
    target, spill = distributed.from_main(
        lambda: (
            check_output(output, overwrite=overwrite, inputs=_inputs(model, recipe, calibration, spill)),
            None if spill is None else check_writable(spill, "--spill"),
        )
    )
    place = find_accelerator(accelerator)
    torch.manual_seed(chosen.seed)
    say(f"loading {model}")
    source = load_source(model, stream)
    _check_groups(source, chosen)
    check_budget(source, chosen)
    if calibration in (None, "self") and streamed_blocks(source.model) is not None:
        say("note: to write its calibration text the model reads all its blocks from disk for every token")
        say("note: a text file (--calibration FILE) takes minutes where that takes hours")
    text = distributed.from_main(
        lambda: load_calibration(calibration, source, chosen.calibration, chosen.seed, kept_text(target))
    )
    compared = [chosen.with_method(method) for method in dict.fromkeys(compare)]
    others = [each for each in compared if each.solved_by != chosen.solved_by]
    prepared = prepare(source, chosen, text.sequences)
    unfinished = [_resume_file(target, prepared, each, text, place) for each in (*others, chosen)]
    keep = Spill(spill, place)
    rows = [_quantize_and_score(prepared, *each, text, keep).row for each in zip(others, unfinished, strict=False)]
    own = _quantize_and_score(prepared, chosen, unfinished[-1], text, keep)
    rows.append(own.row)
    if distributed.is_main():
        with output_directory(target, overwrite=overwrite) as directory:
            _write(directory, prepared, chosen, text, own, rows, time.monotonic() - start)
        for resume in filter(None, unfinished):
            resume.discard()
        shutil.rmtree(kept_text(target), ignore_errors=True)
    return QuantizeResult(output, chosen.name, tuple(rows), own.original_perplexity, time.monotonic() - start)


def _inputs(model: str, recipe: str | Recipe, calibration: str | None, spill: Path | None) -> dict[str, Path | None]:
    return {
        "the model": None if model == "default" else as_input(model),
        "the recipe": None if isinstance(recipe, Recipe) else as_input(recipe),
        "the calibration text": None if calibration in (None, "self") else as_input(calibration),
        "--spill": spill,
    }


def _check_groups(source: SourceModel, recipe: Recipe) -> None:
    formats = [(recipe.weights.group_size, source.spec.linear_inputs(), "weights.group_size")]
    if recipe.embedding is not None:
        tables = {source.spec.embedding: source.spec.hidden_size}
        formats.append((recipe.embedding.group_size, tables, "embedding.group_size"))
    for size, widths, field in formats:
        if size is None:
            continue
        for name, width in widths.items():
            if width % size:
                fitting = [g for g in _GROUP_SIZES if all(w % g == 0 for w in widths.values())]
                accepted = ", ".join(map(str, fitting)) or "none"
                problem = f"group size {size} does not divide the {width} inputs of {name}"
                fix = f"Group sizes that divide every layer of this model: {accepted} (or none: per output channel)"
                raise UsageError(problem, where=field, fix=fix)


def _resume_file(
    output: Path, prepared: Prepared, recipe: Recipe, text: Calibration, place: torch.device
) -> ResumeFile | None:
    """Where this run keeps its finished blocks; none for a method that takes seconds, nor on other ranks."""
    if recipe.options is None or not distributed.is_main():
        return None
    document, tensors = to_record(prepared.transforms)
    identity = {
        "model": prepared.source.files,
        "transforms": document,
        "transforms' tensors": torch.cat([*(each.flatten() for each in tensors.values()), torch.zeros(0)]),
        "activations": None if prepared.activations is None else prepared.activations.to_document(),
        "cache": None if prepared.cache is None else prepared.cache.to_document(),
        "recipe": recipe.effective(),
        "calibration": text.sequences,
        "weights": text.weights,
        "accelerator": place.type,
        "number of processes": distributed.world_size(),
        "versions": _versions(),
    }
    return ResumeFile(output, recipe.solved_by, identity)


@dataclass(frozen=True)
class _Scored:
    """A quantized model, which activations it computes with, and how it does on the held-out text."""

    quantized: QuantizedModel
    guarded: Guarded | None
    row: Comparison
    original_perplexity: float

    @property
    def activations(self) -> ActivationPlan | None:
        return None if self.guarded is None else self.guarded.plan


def _quantize_and_score(
    prepared: Prepared, recipe: Recipe, resume: ResumeFile | None, text: Calibration, keep: Spill
) -> _Scored:
    start = time.monotonic()
    source, plan = prepared.source, prepared.activations
    try:
        quantized = quantize_model(source, recipe, text.sequences, resume, text.weights, keep, plan, prepared.cache)
    except ArithmeticError as error:
        fix = "Use more calibration text, or a larger `damping` in the recipe"
        raise BoaEdgeError(str(error), where=f"recipe {recipe.name}", fix=fix) from error
    guarded: Guarded | None = None
    if plan is not None and recipe.activations is not None:
        budget = recipe.activations.budget
        if budget is not None and text.judges_scored:
            say("note: too little text is held out to evaluate on other than the guard chooses by (three sequences)")
        guarded = distributed.from_main(lambda: guard(source, quantized, plan, text.judged, budget, prepared.cache))
    seconds = time.monotonic() - start
    fidelity = distributed.from_main(lambda: _score(prepared, recipe, quantized, guarded, text))
    assert fidelity.kl is not None
    assert fidelity.top1 is not None
    assert fidelity.reference_perplexity is not None
    row = Comparison(
        method=recipe.method,
        recipe=recipe.name,
        perplexity=fidelity.perplexity,
        kl=fidelity.kl,
        top1=fidelity.top1,
        payload_bytes=_payload_bytes(source, quantized),
        seconds=round(seconds, 1),
        peak_mb=_peak_mb(),
    )
    say(f"{recipe.name}: perplexity {row.perplexity:.2f}, KL {row.kl:.4f}, top-1 {row.top1:.1%} on held-out text")
    return _Scored(quantized, guarded, row, fidelity.reference_perplexity)


def _score(
    prepared: Prepared, recipe: Recipe, quantized: QuantizedModel, guarded: Guarded | None, text: Calibration
) -> Fidelity:
    source, plan = prepared.source, None if guarded is None else guarded.plan
    fake = FakeQuantized(source.model, source.spec, quantized.weights, plan, prepared.cache)
    return evaluate_logits(
        fake.logits,
        text.scored,
        lambda tokens: source.model(tokens, use_cache=False).logits,
        f"scoring {recipe.name}",
    )


def _float_parameters(source: SourceModel, quantized: QuantizedModel) -> dict[str, torch.Tensor]:
    """Parameters that stay in floating point, in the source's dtype."""
    dtype = stored_dtype(source.config)
    tied_head = f"{source.spec.head}.weight" if source.spec.tied_embeddings else None
    # Norms that have taken up scales would lose them to a narrower type.
    own = (
        {name for names in source.spec.layer_names for name in names.norms()} if transforms_of(source.model) else set()
    )
    return {
        name: source.parameter(name).detach().to(torch.float32 if name.rpartition(".")[0] in own else dtype)
        for name in source.model.state_dict()
        if name.rpartition(".")[0] not in quantized.weights or not name.endswith(".weight")
        if name != tied_head
    }


def _payload_bytes(source: SourceModel, quantized: QuantizedModel) -> int:
    floats = sum(value.numel() * 2 for value in _float_parameters(source, quantized).values())
    return floats + sum(weight.payload_bytes() for weight in quantized.weights.values())


def _peak_mb() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def _versions() -> dict[str, str]:
    return {"boa-edge": __version__} | {name: metadata.version(name) for name in _RECORDED}


def _write(
    directory: Path,
    prepared: Prepared,
    recipe: Recipe,
    text: Calibration,
    own: _Scored,
    rows: list[Comparison],
    seconds: float,
) -> None:
    source, quantized = prepared.source, own.quantized
    scale_dtype = torch.bfloat16 if recipe.round_scales else torch.float32
    floats = _float_parameters(source, quantized)
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
        "versions": _versions(),
        "platform": platform.platform(),
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


def _reference(prepared: Prepared, text: Calibration, own: _Scored) -> dict[str, torch.Tensor]:
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
