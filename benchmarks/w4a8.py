"""What int8 activations cost, and what takes the cost away: on a model as it is, and with massive activations planted.

    python -m benchmarks.w4a8 --calibration valid.txt --text test.txt -o docs/benchmarks [--method gptq]

Planted: a few channels of what every norm puts out, and of what `up` does, carry values hundreds of times larger, with
the weights that read them as much smaller; the float function is the same. Both models are quantized to 4 bits in
groups of 32, the table to 8, with activations in floating point, then at 8 bits as each runtime computes with them: as
they are, smoothed, rotated, both, the smoothed ones with what the head takes in rotated too, and the recommended recipe
with its guard. KL is from the original, on text that calibrated nobody.
Finished rows are kept in --work. Writes w4a8.json, w4a8.md and w4a8.svg/.png.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import calibration_rows
from benchmarks.charts import pyplot, save
from benchmarks.identity import own_source, own_version, tensor_hash
from benchmarks.report import OURS_COLOURS, PEER_COLOURS
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import read_json, write_json, write_text
from boa_edge.progress import say
from boa_edge.quiet import quiet_libraries, quiet_transformers
from toolchain.fake_quantized import FakeQuantized
from toolchain.guard import guard
from toolchain.loading import SourceModel, load_source
from toolchain.metrics import evaluate_logits
from toolchain.prepare import prepare
from toolchain.products import fast_products
from toolchain.recipe import Recipe, parse_recipe
from toolchain.run import quantize_model
from toolchain.text import read_text, sequences, tokenize

SCHEMES = {"per_block": "ONNX Runtime", "per_token": "ExecuTorch"}
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "smooth": ("smooth",),
    "rotate": ("rotate",),
    "rotate+smooth": ("rotate", "smooth"),
    "smooth+table": ("smooth", "rotatetable"),
    "rotate+smooth+table": ("rotate", "smooth", "rotatetable"),
}
RECOMMENDED, GUARDED = {"per_block": "smooth", "per_token": "smooth+table"}, "guarded"
ROWS = (*VARIANTS, GUARDED)
_BUDGET, _GUARD_SEQUENCES = 0.1, 8
CHANNELS, FACTOR = 6, 256.0
_WEIGHTS = {"bits": 4, "group_size": 32}
_WIDE = 10  # times the smallest KL: from there on the chart is logarithmic


@fast_products()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a Llama-type model")
    parser.add_argument("--method", default="edge")
    parser.add_argument("--variants", default=",".join(ROWS), help="rows, comma-separated (%(default)s)")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--text", type=Path, required=True, help="held-out text file")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="of held-out text")
    parser.add_argument("--work", type=Path, required=True, help="where finished rows are kept")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    quiet_libraries()
    quiet_transformers()
    try:
        rows = run(given)
    except BoaEdgeError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"rows": len(rows), "output": str(given.output)}, separators=(",", ":")))


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, those that are new measured."""
    source = load_source(given.model)
    calibration = tokenize(read_text(given.calibration), source.tokenizer)
    drawn = calibration_rows(calibration, given.sequences + _GUARD_SEQUENCES, given.length, 0)
    rows, guard_rows = drawn[: given.sequences], drawn[given.sequences :]
    held_out = sequences(tokenize(read_text(given.text), source.tokenizer)[: given.tokens], given.length, given.text)
    done: list[dict[str, Any]] = []
    words = given.variants.split(",")
    if unknown := set(words) - set(ROWS):
        problem = f"unknown variants {', '.join(sorted(unknown))}"
        raise UsageError(problem, where="--variants", fix=f"Accepted: {', '.join(ROWS)}")
    asked = [variant for variant in ROWS if variant in words]
    for name, model in (("as it is", source), ("planted", planted(source))):
        for scheme, variant in [(None, "weights alone")] + [(s, v) for s in SCHEMES for v in asked]:
            key = [source.files, own_source(), given.method, name, scheme, tensor_hash(rows), tensor_hash(held_out)]
            path = _place(given.work, key, variant)
            if not path.exists():
                say(f"{name}: {scheme or 'floating point'}, {variant}")
                asked_for = RECOMMENDED[scheme] if scheme is not None and variant == GUARDED else variant
                recipe = _recipe(given.method, scheme, asked_for)
                given.work.mkdir(parents=True, exist_ok=True)
                for guarded, document in measure(source, model, recipe, (rows, guard_rows), held_out):
                    own = GUARDED if guarded else asked_for
                    write_json(
                        _place(given.work, key, own), {"model": name, "scheme": scheme, "variant": own, **document}
                    )
            done.append(read_json(path, "a row"))
            given.output.mkdir(parents=True, exist_ok=True)
            write(given, done, source)
    return done


def _place(work: Path, key: list[Any], variant: str) -> Path:
    """Where a finished row is kept, by what decides it."""
    return work / f"{hashlib.sha256(json.dumps([*key, variant]).encode()).hexdigest()[:16]}.json"


def _recipe(method: str, scheme: str | None, variant: str) -> Recipe:
    transforms = VARIANTS.get(variant, ())
    document: dict[str, Any] = {"method": method, "weights": _WEIGHTS, "transforms": list(transforms)}
    if scheme is not None:
        document["activations"] = {"scheme": scheme, "budget": _BUDGET if variant == RECOMMENDED[scheme] else None}
    return parse_recipe(document, "benchmark")


def measure(
    original: SourceModel, model: SourceModel, recipe: Recipe, texts: tuple[Tensor, Tensor], held_out: Tensor
) -> list[tuple[bool, dict[str, Any]]]:
    """One recipe on one model, against the original: without the guard and, where there is a budget, with it.

    Args:
        texts: what is calibrated on, and what the guard judges on.
    """
    rows, guard_rows = texts
    prepared = prepare(model, recipe, rows)
    quantized = quantize_model(prepared.source, recipe, rows, activations=prepared.activations, cache=prepared.cache)
    plans = [prepared.activations]
    if prepared.activations is not None and recipe.activations is not None and recipe.activations.budget is not None:
        budget = recipe.activations.budget
        plans.append(guard(prepared.source, quantized, prepared.activations, guard_rows, budget).plan)
    largest = max((each.maximum for each in prepared.after), default=None)
    found: list[tuple[bool, dict[str, Any]]] = []
    for plan in plans:
        if plan != plans[0] or not found:
            fake = FakeQuantized(prepared.source.model, prepared.source.spec, quantized.weights, plan)
            score = evaluate_logits(
                fake.logits,
                held_out,
                lambda tokens: original.model(tokens, use_cache=False).logits,
                f"scoring {recipe.name}",
            )
        kept = 0 if plan is None else len(plan.kept)
        document = {"kl": score.kl, "perplexity": score.perplexity, "kept": kept, "largest": largest}
        found.append((bool(found), {"recipe": recipe.name, **document}))
    return found


def planted(source: SourceModel) -> SourceModel:
    """The same function with massive activations: CHANNELS of the residual's norms and of `up`, FACTOR times larger."""
    model = copy.deepcopy(source.model)
    spec = source.spec
    generator = torch.Generator().manual_seed(0)
    wide = torch.randperm(spec.hidden_size, generator=generator)[:CHANNELS]
    inner = torch.randperm(spec.intermediate_size, generator=generator)[:CHANNELS]

    def linear(name: str) -> Tensor:
        module: Any = model.get_submodule(name)
        weight: Tensor = module.weight.data
        return weight

    for names in spec.layer_names:
        assert names.gate is not None
        for norm, readers in (
            (names.attention_norm, (names.q, names.k, names.v)),
            (names.mlp_norm, (names.gate, names.up)),
        ):
            linear(norm)[wide] *= FACTOR
            for reader in readers:
                linear(reader)[:, wide] /= FACTOR
        linear(names.up)[inner] *= FACTOR
        linear(names.down)[:, inner] /= FACTOR
    module: nn.Module = model
    return dataclasses.replace(source, model=module)


def write(given: argparse.Namespace, rows: list[dict[str, Any]], source: SourceModel) -> None:
    """All files, anew."""
    write_json(given.output / "w4a8.json", rows)
    parts = [
        "# 4-bit weights, 8-bit activations",
        f"{source.identity}, `{given.method}` at 4 bits in groups of 32, calibrated on {given.sequences} x "
        f"{given.length} tokens of {given.calibration.name}; KL from the original in nats per token on {given.tokens} "
        f"tokens of {given.text.name}. Planted: {CHANNELS} channels behind every norm and every `up` carry values "
        f"{FACTOR:g} times larger, the float function unchanged. Activations are quantized as the runtime does it, "
        "while the codes are solved and while the KL is measured.",
        "![KL by model, runtime and recipe](w4a8.svg)",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        plain = own[0]["kl"]
        lines = [
            "| activations | recipe | KL | of weights alone | largest input | kept in float |",
            "|---|---|---|---|---|---|",
        ]
        for row in own:
            runtime = SCHEMES.get(row["scheme"], "floating point")
            largest = "" if row["largest"] is None else f"{row['largest']:.0f}"
            figures = f"{row['kl']:.4f} | {row['kl'] / plain:.2f} | {largest} | {row['kept']}"
            lines.append(f"| {runtime} | {row['variant']} | {figures} |")
        parts += [f"## The model {name}", "\n".join(lines)]
    write_text(given.output / "w4a8.md", "\n\n".join(parts) + f"\n\n{own_version()}\n")
    draw(given.output, rows)


def draw(output: Path, rows: list[dict[str, Any]]) -> None:
    """A panel per model: a bar per runtime and recipe, the weights alone as a line."""
    plt = pyplot()
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        1,
        len(models),
        figsize=(5.2 * len(models), 1.2 + 0.24 * len(rows) / len(models)),
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], models, strict=True):
        own = [row for row in rows if row["model"] == name]
        bars = own[1:]
        colours = [OURS_COLOURS[1] if row["scheme"] == "per_block" else PEER_COLOURS[1] for row in bars]
        axis.barh(range(len(bars)), [row["kl"] for row in bars], color=colours, height=0.65)
        axis.axvline(own[0]["kl"], color="#444444", lw=1, ls="--")
        for place, row in enumerate(bars):
            axis.annotate(
                f"{row['kl']:.3f}", (row["kl"], place), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.set_yticks(range(len(bars)), [f"{SCHEMES[row['scheme']]}: {row['variant']}" for row in bars], fontsize=8.5)
        axis.invert_yaxis()
        low, high = (limit(row["kl"] for row in own) for limit in (min, max))
        wide = high > _WIDE * low
        if wide:
            axis.set_xscale("log")
        axis.set_xlim(low / 2 if wide else 0, (2.5 if wide else 1.2) * high)
        axis.set_title(f"{name} (dashed: weights alone, {own[0]['kl']:.3f})", loc="left", fontsize=9)
        axis.set_xlabel(f"KL from the original, nats per token{', log scale' if wide else ''}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, output, "w4a8")


if __name__ == "__main__":
    main()
