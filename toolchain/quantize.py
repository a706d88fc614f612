"""The first stage: a model in, a quantized checkpoint out."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from boa_edge.errors import UsageError
from boa_edge.files import as_input, check_output, check_writable, output_directory
from boa_edge.progress import say
from toolchain import distributed
from toolchain.accelerator import find_accelerator
from toolchain.allocation import check_budget
from toolchain.calibration import Calibration, kept_text, load_calibration
from toolchain.loading import SourceModel, load_source
from toolchain.loading.streamed import streamed_blocks
from toolchain.methods import METHODS
from toolchain.prepare import Prepared, prepare
from toolchain.products import fast_products
from toolchain.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from toolchain.resume import ResumeFile
from toolchain.scoring import Comparison, quantize_and_score
from toolchain.spill import Spill
from toolchain.transforms import to_record
from toolchain.writing import arithmetic, versions, write_checkpoint

_GROUP_SIZES = (16, 32, 64, 128, 192, 256)


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
    with ExitStack() as holds:
        for resume in filter(None, unfinished):
            holds.enter_context(resume.held())
            start -= resume.spent
        rows = [quantize_and_score(prepared, *each, text, keep).row for each in zip(others, unfinished, strict=False)]
        own = quantize_and_score(prepared, chosen, unfinished[-1], text, keep)
        rows.append(own.row)
        if distributed.is_main():
            with output_directory(target, overwrite=overwrite) as directory:
                write_checkpoint(directory, prepared, chosen, text, own, rows, time.monotonic() - start)
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
        "threads and instructions": arithmetic(),
        "versions": versions(),
    }
    return ResumeFile(output, recipe.solved_by, identity)
