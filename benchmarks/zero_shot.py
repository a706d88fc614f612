"""How far calibration on text that the model writes is from calibration on real text.

    python -m benchmarks.zero_shot --calibration valid.txt --text test.txt -o docs/benchmarks [--recipe w4g32-gptq]

The same recipe on four calibration texts of the same size: a real one; text written in the plain way (one schedule, no
chat template, nothing filtered); the pool's fit sequences as they come; the weighted part of the pool that matches it
best. Reports perplexity and KL on a held-out text, and, per kind of linear, |H_text - H_real|_F / |H_real|_F of the
full-precision model's column Hessians after both are scaled to trace 1, averaged over the blocks. The same distance of
a second sample of the real text is the noise floor. Writes zero_shot.json and zero_shot.md.

Pieces that are finished are kept in --work, each by what decides it, and not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.identity import document_hash, own_source, tensor_hash
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import read_json, write_json, write_text
from boa_edge.progress import say, track
from boa_edge.quiet import quiet_libraries
from toolchain.calibration.pool import Writer, asked, find_conventions, self_text, write_pool
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import SourceModel, load_source
from toolchain.metrics import evaluate_logits
from toolchain.products import fast_products
from toolchain.recipe import CalibrationSize, Recipe, load_recipe
from toolchain.run import quantize_model
from toolchain.text import read_text, sequences, spread, tokenize

_LABELS = {
    "real": "real text",
    "plain": "self-written, plain",
    "pool": "zero-shot, not selected",
    "selected": "zero-shot, selected",
    "real-again": "real text, other sample",
}
_QUANTIZED = ("real", "plain", "pool", "selected")


def _texts(
    source: SourceModel, size: CalibrationSize, calibration: Path, work: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tokens, and weights where there are any, by the name of the text; and the facts of the zero-shot one."""
    real_text = tokenize(read_text(calibration), source.tokenizer)
    lengths = [size.sequences, size.sequence_length]
    own = [source.files, own_source(), *lengths]
    facts_path = work / f"facts-{document_hash([*own, size.pool])}.json"

    def real() -> dict[str, dict[str, Tensor]]:
        rows = spread(sequences(real_text, size.sequence_length, calibration), 2 * size.sequences)
        return {"real": {"tokens": rows[::2]}, "real-again": {"tokens": rows[1::2]}}

    def plain() -> dict[str, dict[str, Tensor]]:
        # What --calibration self did before: a hot start after the beginning-of-sequence token, nothing else.
        start = source.tokenizer.bos_token_id
        conventions = dataclasses.replace(find_conventions(source, 0), frame=None, start=start)
        writer = Writer(source, size.sequence_length, 0, conventions=conventions, schedules=("hot",))
        return {"plain": {"tokens": writer.write(size.sequences).tokens}}

    def zero_shot() -> dict[str, dict[str, Tensor]]:
        start = time.monotonic()
        keep = work / "self-text"
        text = self_text(source, size, size.sequence_length, 0, keep)
        say(f"zero-shot text: {time.monotonic() - start:.0f} s, {text.facts}")
        write_json(facts_path, text.facts | {"seconds": round(time.monotonic() - start)})
        selected = {"tokens": text.sequences}
        if text.weights is not None:
            selected["weights"] = text.weights
        count, needed = asked(size)
        writer = Writer(source, size.sequence_length, 0, keep=keep, identity={"count": count, "needed": needed})
        pool = write_pool(writer, source.tokenizer, count, needed)  # kept: read back, not written again
        # Every candidate has the same chance, so that conversations and other texts stay half and half.
        chosen = spread(pool.fit, size.sequences)
        return {"selected": selected, "pool": {"tokens": pool.written.tokens[chosen]}}

    texts: dict[str, dict[str, Tensor]] = {}
    makers: list[tuple[tuple[str, ...], Callable[[], dict[str, dict[str, Tensor]]], list[Any]]] = [
        (("real", "real-again"), real, [tensor_hash(real_text), *lengths]),
        (("plain",), plain, own),
        (("selected", "pool"), zero_shot, [*own, size.pool]),
    ]
    for names, make, decides in makers:
        paths = {name: work / f"text-{name}-{document_hash(decides)}.safetensors" for name in names}
        if not all(path.exists() for path in paths.values()):
            for name, text in make().items():
                save_file({part: tensor.contiguous() for part, tensor in text.items()}, paths[name])
        texts |= {name: load_file(path) for name, path in paths.items()}
    return texts, read_json(facts_path, "what was written")


@torch.inference_mode()
def _hessians(source: SourceModel, text: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Weighted second moments of the inputs of every distinct linear, scaled to trace 1, by module name."""
    totals: dict[str, Tensor] = {}
    latest: list[Tensor | None] = [None]
    weight = [1.0]

    def hook(name: str) -> Any:
        def add(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if x is latest[0]:
                return
            latest[0] = x
            rows = x.reshape(-1, x.shape[-1])
            if name not in totals:
                totals[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            totals[name].addmm_(rows.mT, rows, alpha=weight[0])

        return add

    names = [name for block in source.spec.layer_names for name in block.linears()]
    handles = [source.model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        weights = text["weights"].tolist() if "weights" in text else [1.0] * text["tokens"].shape[0]
        for row, weight[0] in track(list(zip(text["tokens"], weights, strict=True)), what):
            source.model.get_submodule("model")(row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / total.diagonal().sum() for name, total in totals.items()}


def _distances(truth: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Mean relative Frobenius distance over the blocks, by the linear's own name."""
    found = defaultdict(list)
    for name, hessian in truth.items():
        found[name.rpartition(".")[2]].append(float((other[name] - hessian).norm() / hessian.norm()))
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def _recipe(name: str) -> Recipe:
    """UsageError for what is not done here: texts are compared by the weights alone."""
    recipe = load_recipe(name)
    if recipe.transforms or recipe.activations is not None or recipe.kv_cache is not None:
        problem = f"recipe {name!r} has transforms, or quantizes activations or the cache"
        raise UsageError(f"{problem}; here only weights are quantized", where="--recipe", fix="Leave these out")
    return recipe


def _score(
    source: SourceModel, recipe: Recipe, text: dict[str, Tensor], rows: Tensor, name: str, work: Path
) -> dict[str, float]:
    decides = [source.files, own_source(), recipe.model_dump(), tensor_hash(rows)]
    decides += [{part: tensor_hash(tensor) for part, tensor in text.items()}]
    kept = work / f"{recipe.name}-{name}-{document_hash(decides)}.json"
    if kept.exists():
        found: dict[str, float] = read_json(kept, "a finished piece")
        return found
    start = time.monotonic()
    quantized = quantize_model(source, recipe, text["tokens"], sequence_weights=text.get("weights"))
    seconds = time.monotonic() - start
    fake = FakeQuantized(source.model, source.spec, quantized.weights)
    original = FakeQuantized(source.model, source.spec, {})
    score = evaluate_logits(fake.logits, rows, original.logits, f"evaluating {name}")
    found = {
        "perplexity": score.perplexity,
        "kl": score.kl or 0.0,
        "top1": score.top1 or 0.0,
        "original_perplexity": score.reference_perplexity or 0.0,
        "seconds": seconds,
    }
    write_json(kept, found)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--recipe", default="w4g32-gptq", help="comma-separated: each is run on every text")
    parser.add_argument("--calibration", type=Path, required=True, help="the real text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="the text to evaluate on")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pool", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=24576, help="of the text to evaluate on")
    parser.add_argument("--work", type=Path, help="where finished pieces are kept (default: a temporary directory)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        document = compare(arguments)
    except BoaEdgeError as error:
        sys.exit(f"error: {error}")
    rows = sum(map(len, document["results"].values()))
    print(json.dumps({"rows": rows, "output": str(arguments.output)}, separators=(",", ":")))


@fast_products()
def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do what is asked for, and write it."""
    recipes = {name: _recipe(name) for name in arguments.recipe.split(",")}
    source = load_source(arguments.model)
    size = CalibrationSize(sequences=arguments.sequences, sequence_length=arguments.length, pool=arguments.pool)
    rows = sequences(tokenize(read_text(arguments.text), source.tokenizer)[: arguments.tokens], 512, arguments.text)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        texts, facts = _texts(source, size, arguments.calibration, work)
        truth = _hessians(source, texts["real"], "statistics of real text")
        distances = {
            name: _distances(truth, _hessians(source, text, f"statistics of {_LABELS[name]}"))
            for name, text in texts.items()
            if name != "real"
        }
        results = {
            written: {name: _score(source, recipe, texts[name], rows, name, work) for name in _QUANTIZED}
            for written, recipe in recipes.items()
        }
    settings = {
        "model": source.identity,
        "sequences": size.sequences,
        "sequence_length": size.sequence_length,
        "pool": size.pool,
        "evaluated_tokens": rows.numel(),
        "seed": 0,
    }
    document = {"settings": settings, "zero_shot_text": facts, "results": results, "hessian_distance": distances}
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "zero_shot.json", document)
    write_text(arguments.output / "zero_shot.md", _markdown(document))
    say(_markdown(document))
    return document


def _markdown(document: dict[str, Any]) -> str:
    settings = document["settings"]
    lines = [
        "# Calibration on real text and on text that the model writes",
        "",
        f"{settings['model']}, {settings['sequences']} x {settings['sequence_length']} tokens of calibration text, "
        f"a pool of {settings['pool']:g} candidates per sequence, {settings['evaluated_tokens']:,} tokens of other "
        "real text evaluated, seed 0. Made by `benchmarks/zero_shot.py`.",
        "",
        "| recipe | calibrated on | perplexity | KL (nats/token) | KL over real text's | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, rows in document["results"].items():
        for name, row in rows.items():
            ratio = row["kl"] / rows["real"]["kl"] - 1
            figures = f"{row['perplexity']:.2f} | {row['kl']:.4f} | {ratio:+.1%} | {row['top1']:.1%}"
            lines.append(f"| {recipe} | {_LABELS[name]} | {figures} |")
    kinds = list(next(iter(document["hessian_distance"].values())))
    lines += [
        "",
        "Distance of the full-precision Hessians to those of the real text, |H - H_real|_F / |H_real|_F at trace 1,",
        "mean over the blocks, by the first linear that reads the input:",
        "",
        f"| text | {' | '.join(kinds)} |",
        f"|---|{'---|' * len(kinds)}",
    ]
    for name, found in document["hessian_distance"].items():
        lines.append(f"| {_LABELS[name]} | {' | '.join(f'{found[kind]:.3f}' for kind in kinds)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
