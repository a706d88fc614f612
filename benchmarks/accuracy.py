"""Round to nearest, GPTQ and BoA side by side: same model, same calibration tokens, same evaluator.

    python -m benchmarks.accuracy --calibration valid.txt --text test.txt -o docs/benchmarks [--bits 4,3,2]

Each quantization runs in a process of its own (time and peak memory are its own); one process then evaluates all of
them, so that the original's logits are computed once. Writes accuracy.json and accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from boa_edge.files import write_json, write_text
from boa_edge.progress import say
from boa_edge.quiet import quiet_libraries
from toolchain.checkpoint import Checkpoint
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import load_source
from toolchain.methods import METHODS
from toolchain.metrics import Fidelity, evaluate_all
from toolchain.text import read_text, sequences, tokenize


def _quantize(model: str, name: str, calibration: Path, work: Path) -> dict[str, float]:
    output = work / name
    summary = work / f"{name}.json"
    if not summary.exists():
        command = [sys.executable, "-m", "boa_edge.cli", "quantize", model, "--recipe", name]
        command += ["--calibration", str(calibration), "-o", str(output), "--overwrite"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        summary.write_text(done.stdout.splitlines()[-1])
    return json.loads(summary.read_text())


def _evaluate(model: str, names: list[str], text: Path, tokens: int, length: int, work: Path) -> list[Fidelity]:
    source = load_source(model)
    rows = sequences(tokenize(read_text(text), source.tokenizer)[:tokens], length, text)
    original = FakeQuantized(source.model, source.spec, {})
    candidates = []
    for name in names:
        checkpoint = Checkpoint(work / name)
        modules = [*source.spec.linear_inputs(), source.spec.embedding]
        weights = {module: checkpoint.quantized(module) for module in modules if checkpoint.is_quantized(module)}
        candidates.append(FakeQuantized(source.model, source.spec, weights).logits)
    return evaluate_all(candidates, rows, original.logits, "evaluating")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument(
        "--format", default="asym", help="what follows the bits in a recipe's name, such as asym or g32"
    )
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", type=Path, help="where checkpoints are kept (default: a temporary directory)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    quiet_libraries()
    names = [f"w{bits}{arguments.format}-{method}" for bits in arguments.bits.split(",") for method in METHODS]
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        made = [_quantize(arguments.model, name, arguments.calibration, work) for name in names]
        scored = _evaluate(arguments.model, names, arguments.text, arguments.tokens, arguments.length, work)
        rows = []
        for name, summary, score in zip(names, made, scored, strict=True):
            weights = Checkpoint(work / name).recipe["weights"]
            rows.append(
                {"method": name.rpartition("-")[2], "ours": True, **weights, "seed": 0}
                | {"perplexity": score.perplexity, "kl": score.kl, "top1": score.top1}
                | {
                    "seconds": summary["seconds"],
                    "peak_mb": summary["peak_mb"],
                    "payload_bytes": summary["payload_bytes"],
                }
            )
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "accuracy.json", rows)
    head = (
        "| weights | method | perplexity | KL (nats/token) | top-1 | seconds | peak MB |\n|---|---|---|---|---|---|---|"
    )
    lines = [head, f"| original | | {scored[0].reference_perplexity:.2f} | 0 | 100 % | | |"]
    for name, row in zip(names, rows, strict=True):
        figures = f"{row['perplexity']:.2f} | {row['kl']:.4f} | {row['top1']:.1%} | {row['seconds']:.0f}"
        lines.append(f"| {name.partition('-')[0]} | {row['method']} | {figures} | {row['peak_mb']} |")
    write_text(arguments.output / "accuracy.md", "\n".join(lines) + "\n")
    say("\n".join(lines))
    print(json.dumps({"rows": len(rows), "output": str(arguments.output)}, separators=(",", ":")))


if __name__ == "__main__":
    main()
