"""This project's methods and every peer side by side: one model, the same calibration tokens, one evaluator.

    python -m benchmarks.accuracy --calibration valid.txt --text test.txt -o docs/benchmarks

Each quantization runs in a process of its own, one at a time; what it leaves is the float weights that its codes stand
for. They are put into the original, and KL(original || quantized) is measured on held-out text. Everything is kept in
the work directory by what decides it, so that a run that is stopped goes on where it stopped. Writes accuracy.json,
accuracy.md and accuracy.svg/.png, anew after every group of runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.contenders import Contender, Setting, chosen, fitting
from benchmarks.kept import beside
from benchmarks.ours import AT, recipe_for
from benchmarks.peers.harness import SUMMARY_FILE, WEIGHTS_FILE
from benchmarks.peers.table import NOT_RUN, EnvironmentMissingError, Peer, identity, python_of
from benchmarks.quantizer import ROOT, QuantizerError, run_quantizer
from benchmarks.report import Outcome, Protocol, write_report
from benchmarks.source import exported
from boa_edge.errors import BoaEdgeError
from boa_edge.files import output_directory, read_json, write_json
from boa_edge.progress import say
from boa_edge.quiet import quiet_libraries, quiet_transformers
from toolchain.activations import ActivationFormat
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import ACTIVATIONS
from toolchain.loading import load_source
from toolchain.metrics import evaluate_all
from toolchain.products import fast_products
from toolchain.text import read_text, sequences, tokenize

SETTINGS = "w4g32,w4g32a8,w4g128asym,w4asym,w3asym,w2asym"
_EVALUATED_AT_ONCE, _EVALUATED_BYTES = 8, 6 << 30


def main() -> None:
    """The command line."""
    arguments = parse(sys.argv[1:])
    quiet_libraries()
    quiet_transformers()
    try:
        outcomes = compare(arguments)
    except BoaEdgeError as error:
        sys.exit(f"error: {error}")
    rows = sum(outcome.row is not None for outcome in outcomes)
    print(json.dumps({"rows": rows, "output": str(arguments.output)}, separators=(",", ":")))


def compare(arguments: argparse.Namespace) -> list[Outcome]:
    """Do what is asked for, and write it."""
    write = beside(arguments.output / "accuracy.json", write_report) if arguments.keep else write_report
    return Benchmark(arguments, chosen(arguments.methods)).run(write)


def parse(words: list[str]) -> argparse.Namespace:
    """The request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--text", type=Path, required=True, help="held-out text file")
    parser.add_argument("--settings", default=SETTINGS, help=f"weight formats as in a recipe's name ({SETTINGS})")
    parser.add_argument("--methods", default="", help="only methods whose label has one of these, comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="of the choice of calibration text")
    parser.add_argument("--sequences", type=int, default=64, help="of calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=24576, help="of held-out text")
    parser.add_argument("--limit", type=float, default=120, help="minutes that one quantization may take")
    cache = Path(os.environ.get("BOA_EDGE_CACHE") or ROOT / ".cache").expanduser().absolute()
    parser.add_argument("--work", type=Path, default=cache / "bench-accuracy", help="where results are kept")
    parser.add_argument("--environments", type=Path, default=cache / "peers", help="where peers are installed")
    parser.add_argument("--keep", action="store_true", help="rows of OUTPUT/accuracy.json that are not made anew stay")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args(words)


class Benchmark:
    """One request, on its way."""

    def __init__(self, arguments: argparse.Namespace, methods: list[Contender]) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work.absolute()
        self.seeds = [int(seed) for seed in arguments.seeds.split(",")]
        self.contenders = methods
        self.source = load_source(arguments.model)
        self.settings = [fitting(name, self.source) for name in arguments.settings.split(",")]
        self.model = self._export()
        self.model_key = _hash(self.source.files)
        tokenizer = self.source.tokenizer
        self.calibration = tokenize(read_text(arguments.calibration), tokenizer)
        held_out = tokenize(read_text(arguments.text), tokenizer)[: arguments.tokens]
        self.rows = sequences(held_out, arguments.length, arguments.text)
        self.rows_key = tensor_hash(self.rows)
        self.environments: dict[str, Path | str] = {}
        self.failed: dict[Path, str] = {}
        self.own_version = own_version()
        self.own_source = own_source()

    @fast_products()
    def run(self, write: Callable[[Path, list[Outcome], Protocol], None]) -> list[Outcome]:
        """Quantize, evaluate and write, setting by setting and seed by seed."""
        outcomes: list[Outcome] = []
        for setting in self.settings:
            for seed in self.seeds:
                outcomes += self._group(setting, seed)
                self.arguments.output.mkdir(parents=True, exist_ok=True)
                write(self.arguments.output, outcomes, self._protocol())
        return outcomes

    def _group(self, setting: Setting, seed: int) -> list[Outcome]:
        tokens = calibration_rows(self.calibration, self.arguments.sequences, self.arguments.length, seed)
        path = self.work / "tokens" / f"{tensor_hash(tokens)}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"tokens": tokens}, path)
        runs = [(contender, scheme) for scheme in setting.schemes for contender in self.contenders]
        places: dict[tuple[str, str | None], Path] = {}
        failures: dict[tuple[str, str | None], str] = {}
        for contender, scheme in runs:
            run = (contender.label, scheme)
            if (refused := contender.refuses(setting)) is not None:
                failures[run] = f"not supported: {refused}"
                continue
            try:
                places[run] = self._quantize(contender, setting, seed, path, scheme)
            except (EnvironmentMissingError, QuantizerError) as error:
                failures[run] = str(error)
                say(f"{setting.name} {contender.label}: {error}")
        for scheme in setting.schemes:
            self._evaluate([place for (_, own), place in places.items() if own == scheme], scheme)
        for place in places.values():  # a few hundred megabytes each
            (place / WEIGHTS_FILE).unlink(missing_ok=True)
        outcomes = []
        for contender, scheme in runs:
            run = (contender.label, scheme)
            made = places.get(run)
            row = self._row(contender, setting, seed, made, scheme) if made else None
            notes = read_json(made / SUMMARY_FILE, "summary")["notes"] if made else []
            title, own = setting.titled(scheme), contender.peer is None
            outcomes.append(Outcome(title, contender.label, own, seed, row, failures.get(run), notes))
        return outcomes

    def _quantize(self, contender: Contender, setting: Setting, seed: int, tokens: Path, scheme: str | None) -> Path:
        """Directory of a finished run, made if it is not there."""
        wanted = setting.format
        peer, variant = contender.peer, contender.variant
        decides: dict[str, Any] = {
            "model": self.model_key,
            "tokens": tokens.stem if contender.calibrated else None,
            "seed": seed if contender.calibrated else None,
            "format": asdict(wanted),
        }
        if peer is None:
            recipe = recipe_for(variant, wanted.bits, wanted.group_size, wanted.symmetric, scheme)
            variant = variant if scheme is None else f"{variant}{AT}{scheme}"
            decides |= {"recipe": recipe.model_dump(), "source": self.own_source, "seed": None}
        else:
            decides |= {"script": peer.script, "identity": identity(peer)}
        place = self.work / "runs" / _hash(decides)
        if (place / self._evaluation(scheme)).exists() or (place / WEIGHTS_FILE).exists():
            return place
        if place in self.failed:  # by another seed, which the method does not read
            raise QuantizerError(self.failed[place])
        python = Path(sys.executable) if peer is None else self._python(peer)
        command = [str(python), "-m", "benchmarks.ours" if peer is None else f"benchmarks.peers.{peer.script}"]
        command += ["--model", str(self.model), "--tokens", str(tokens), "--seed", str(seed)]
        command += ["--bits", str(wanted.bits), "--group-size", str(wanted.group_size or 0)]
        command += ["--symmetric", str(int(wanted.symmetric)), "--variant", variant]
        say(f"{setting.name} {contender.label}, seed {seed}")
        place.parent.mkdir(parents=True, exist_ok=True)
        log = self.work / "logs" / f"{place.name}.log"
        with output_directory(place, overwrite=True) as partial:
            try:
                run_quantizer([*command, "--out", str(partial)], partial, log, self.arguments.limit)
            except QuantizerError as error:
                self.failed[place] = str(error)
                raise
            write_json(partial / "request.json", decides | {"method": contender.label})
        return place

    def _python(self, peer: Peer) -> Path:
        """A peer's interpreter; its environment is tried once."""
        key = peer.environment or ""
        if key not in self.environments:
            try:
                self.environments[key] = python_of(peer, self.arguments.environments.absolute())
            except EnvironmentMissingError as error:
                self.environments[key] = f"not installable here: {error}"
        found = self.environments[key]
        if isinstance(found, str):
            raise EnvironmentMissingError(found)
        return found

    def _evaluation(self, scheme: str | None) -> str:
        """The file of a run's evaluation."""
        return f"evaluation-{self.rows_key}{'' if scheme is None else f'-{scheme}'}.json"

    def _evaluate(self, places: list[Path], scheme: str | None) -> None:
        """Evaluate the runs that have not been."""
        name = self._evaluation(scheme)
        missing = list(dict.fromkeys(place for place in places if not (place / name).exists()))
        size = sum(parameter.numel() * 4 for parameter in self.source.model.parameters())
        at_once = max(1, min(_EVALUATED_AT_ONCE, _EVALUATED_BYTES // size))
        original = with_weights(self.source.model, {})
        for start in range(0, len(missing), at_once):
            part = missing[start : start + at_once]
            candidates = [
                with_weights(self.source.model, load_file(place / WEIGHTS_FILE), self._plan(place, scheme))
                for place in part
            ]
            what = f"evaluating {len(part)}"
            for place, score in zip(part, evaluate_all(candidates, self.rows, original, what), strict=True):
                write_json(place / name, asdict(score))

    def _plan(self, place: Path, scheme: str | None) -> ActivationPlan | None:
        """The activations that a run has planned, or those of all linears of the blocks."""
        if scheme is None:
            return None
        path = place / ACTIVATIONS
        if path.exists():
            return ActivationPlan.from_document(read_json(path, "the activation plan"), path)
        group = read_json(place / "request.json", "request")["format"]["group_size"]
        return ActivationPlan(ActivationFormat(scheme), dict.fromkeys(self.source.spec.linear_inputs(), group))

    def _row(
        self, contender: Contender, setting: Setting, seed: int, place: Path, scheme: str | None
    ) -> dict[str, Any]:
        summary = read_json(place / SUMMARY_FILE, "summary")
        score = read_json(place / self._evaluation(scheme), "evaluation")
        version = self.own_version if contender.peer is None else summary["version"]
        return {
            "method": contender.label,
            "ours": contender.peer is None,
            "setting": setting.name,
            **asdict(setting.format),
            "activations": scheme,
            "seed": seed,
            "calibrated": contender.calibrated,
            "kl": score["kl"],
            "perplexity": score["perplexity"],
            "reference_perplexity": score["reference_perplexity"],
            "top1": score["top1"],
            "seconds": summary["seconds"],
            "cpu_seconds": summary["cpu_seconds"],
            "peak_mb": summary["peak_mb"],
            "version": version,
            "date": summary["date"],
            "machine": summary["machine"],
            "calibration": self._calibration(),
            "notes": summary["notes"],
        }

    def _calibration(self) -> str:
        given = self.arguments
        return f"{given.sequences} x {given.length} tokens of {given.calibration.name}"

    def _protocol(self) -> Protocol:
        given = self.arguments
        changed = {setting.asked: setting.name for setting in self.settings if setting.asked != setting.name}
        return Protocol(
            model=self.source.identity,
            calibration=self._calibration(),
            seeds=self.seeds,
            text=f"{self.rows.shape[0]} x {self.rows.shape[1]} tokens of {given.text.name}",
            version=self.own_version,
            changed_groups=changed,
            not_run=NOT_RUN if any(contender.peer for contender in self.contenders) else {},
        )

    def _export(self) -> Path:
        """The original as a Hugging Face directory, which every quantizer reads."""
        return exported(self.source, self.work / "models" / _hash(self.source.files))


def with_weights(
    model: nn.Module, weights: Mapping[str, Tensor], activations: ActivationPlan | None = None
) -> Callable[[Tensor], Tensor]:
    """Logits of `model` with some parameters replaced, and activations quantized; the model itself is not touched."""
    parameters = dict(weights)

    def logits(tokens: Tensor) -> Tensor:
        with nullcontext() if activations is None else activations.installed(model):
            output = functional_call(model, parameters, (tokens,), {"use_cache": False}, tie_weights=False)
        found: Tensor = output.logits
        return found

    return logits


def calibration_rows(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """`count` windows of `length` tokens at places chosen by `seed`, none overlapping: int64 [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    spare = tokens.numel() - count * length
    if spare < 0:
        raise BoaEdgeError(f"the calibration text has {tokens.numel()} tokens, {count} x {length} are needed")
    offset = int(torch.randint(min(length, spare + 1), (), generator=generator))
    windows = tokens[offset : offset + (tokens.numel() - offset) // length * length].view(-1, length)
    return windows[torch.randperm(windows.shape[0], generator=generator)[:count]].contiguous()


def tensor_hash(tensor: Tensor) -> str:
    """Of a tensor's shape and values."""
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()).hexdigest()[:12]


def own_source() -> str:
    """Of the sources that decide what this project's methods make."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "toolchain").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def own_version() -> str:
    """The commit, `-dirty` where the tree has changes."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return f"boa-edge {done.stdout.strip()}" if done.returncode == 0 else "unknown"


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
