"""This project's methods and every peer side by side: one model, the same calibration tokens, one evaluator.

    python -m benchmarks.accuracy --calibration valid.txt --text test.txt -o docs/benchmarks
    python -m benchmarks.accuracy --redraw -o docs/benchmarks

Each quantization runs in a process of its own, one at a time; what it leaves is the float weights that its codes stand
for. They are put into the original, and KL(original || quantized) is measured on held-out text. Everything is kept in
the work directory by what decides it, so that a run that is stopped goes on where it stopped. Writes accuracy.json and
accuracy-failed.json, and from these accuracy.md and accuracy.svg/.png, anew after every group of runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.contenders import Contender, Setting, chosen, fitting
from benchmarks.identity import document_hash, own_source, own_version, tensor_hash
from benchmarks.kept import Write, beside
from benchmarks.ours import AT, name_of, recipe_for
from benchmarks.peers.harness import SUMMARY_FILE, WEIGHTS_FILE
from benchmarks.peers.table import EnvironmentMissingError, Peer, identity, python_of
from benchmarks.quantizer import ROOT, QuantizerError, run_quantizer
from benchmarks.report import write_report
from benchmarks.results import Outcome, read_results
from benchmarks.source import exported
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import output_directory, read_json, write_json
from boa_edge.progress import say
from boa_edge.quiet import quiet_libraries, quiet_transformers
from toolchain.activations import ActivationFormat
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import ACTIVATIONS
from toolchain.loading import load_source
from toolchain.metrics import evaluate_all
from toolchain.products import fast_products
from toolchain.recipe import Recipe
from toolchain.text import behind, opening, read_text, sequences, tokenize

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
    if arguments.redraw:
        return redraw(arguments)
    benchmark = Benchmark(arguments, chosen(arguments.methods))
    write = beside(arguments.output, benchmark.protocol, write_report) if arguments.keep else write_report
    return benchmark.run(write)


def redraw(arguments: argparse.Namespace) -> list[Outcome]:
    """Write everything again from the results that are there."""
    known = {} if arguments.model is None else {"model": arguments.model}
    length = arguments.length
    if arguments.text is not None:
        known["text"] = _amount(arguments.tokens // length, length, arguments.text)
    if arguments.calibration is not None:
        known["calibration"] = _amount(arguments.sequences, length, arguments.calibration)
    outcomes = read_results(arguments.output, known, "Measure anew; --model, --text and --calibration name theirs")
    if not outcomes:
        raise UsageError("holds no results", where=arguments.output)
    write_report(arguments.output, outcomes)
    return outcomes


def _amount(count: int, length: int, text: Path) -> str:
    return f"{count} x {length} tokens of {text.name}"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for `boa-edge quantize` (default)")
    parser.add_argument("--calibration", type=Path, help="text file")
    parser.add_argument("--text", type=Path, help="held-out text file")
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
    parser.add_argument("--keep", action="store_true", help="results in OUTPUT that are not made anew stay")
    parser.add_argument("--redraw", action="store_true", help="only write OUTPUT again, from the results in it")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(words)
    if not given.redraw and (given.calibration is None or given.text is None):
        parser.error("--calibration and --text are required")
    return given


class Benchmark:
    """One request, on its way."""

    def __init__(self, arguments: argparse.Namespace, methods: list[Contender]) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work.absolute()
        self.seeds = [int(seed) for seed in arguments.seeds.split(",")]
        self.contenders = methods
        self.source = load_source(arguments.model or "default")
        settings = [fitting(name, self.source) for name in arguments.settings.split(",")]
        self.settings = list({setting.name: setting for setting in settings}.values())
        self.model = self._export()
        self.model_key = document_hash(self.source.files)
        tokenizer = self.source.tokenizer
        self.calibration = tokenize(read_text(arguments.calibration), tokenizer)
        held_out = tokenize(read_text(arguments.text), tokenizer)[: arguments.tokens]
        self.first = opening(tokenizer)
        self.rows = sequences(held_out, arguments.length, arguments.text, self.first)
        self.rows_key = tensor_hash(self.rows)
        self.environments: dict[str, Path | str] = {}
        self.failed: dict[Path, str] = {}
        self.own_version = own_version()
        self.own_source = own_source()
        self.protocol = {
            "model": self.source.identity,
            "text": _amount(self.rows.shape[0], arguments.length, arguments.text),
            "calibration": _amount(arguments.sequences, arguments.length, arguments.calibration),
        }

    @fast_products()
    def run(self, write: Write) -> list[Outcome]:
        """Quantize, evaluate and write, setting by setting and seed by seed."""
        outcomes: list[Outcome] = []
        for setting in self.settings:
            for seed in self.seeds:
                outcomes += self._group(setting, seed)
                self.arguments.output.mkdir(parents=True, exist_ok=True)
                write(self.arguments.output, outcomes)
        return outcomes

    def _group(self, setting: Setting, seed: int) -> list[Outcome]:
        tokens = calibration_rows(self.calibration, self.arguments.sequences, self.arguments.length, seed, self.first)
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
            facts = self._asked(contender, setting, seed, scheme)
            told = self._measured(contender, places[run], scheme) if run in places else {"reason": failures[run]}
            outcomes.append(Outcome(facts | told))
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
            recipe = _recipe(contender, setting, scheme)
            variant = variant if scheme is None else f"{variant}{AT}{scheme}"
            decides |= {"recipe": recipe.model_dump(), "source": self.own_source, "seed": None}
        else:
            decides |= {"script": peer.script, "identity": identity(peer)}
        place = self.work / "runs" / document_hash(decides)
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

    def _asked(self, contender: Contender, setting: Setting, seed: int, scheme: str | None) -> dict[str, Any]:
        """What is known of an outcome beforehand."""
        return {
            "method": contender.label,
            "ours": contender.peer is None,
            "setting": setting.name,
            "asked": setting.asked,
            **asdict(setting.format),
            "activations": scheme,
            "recipe": None if contender.peer else name_of(_recipe(contender, setting, scheme)),
            "seed": seed,
            "calibrated": contender.calibrated,
            **self.protocol,
        }

    def _measured(self, contender: Contender, place: Path, scheme: str | None) -> dict[str, Any]:
        summary = read_json(place / SUMMARY_FILE, "summary")
        score = read_json(place / self._evaluation(scheme), "evaluation")
        return {
            **{name: score[name] for name in ("kl", "perplexity", "reference_perplexity", "top1")},
            **{name: summary[name] for name in ("seconds", "cpu_seconds", "peak_mb")},
            "version": self.own_version if contender.peer is None else summary["version"],
            **{name: summary[name] for name in ("date", "machine", "notes")},
        }

    def _export(self) -> Path:
        """The original as a Hugging Face directory, which every quantizer reads."""
        return exported(self.source, self.work / "models" / document_hash(self.source.files))


def _recipe(contender: Contender, setting: Setting, scheme: str | None) -> Recipe:
    """Of a method of ours."""
    form = setting.format
    return recipe_for(contender.variant, form.bits, form.group_size, form.symmetric, scheme)


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


def calibration_rows(tokens: Tensor, count: int, length: int, seed: int, first: tuple[int, ...] = ()) -> Tensor:
    """`count` windows of `length` tokens at places chosen by `seed`, none overlapping: int64 [count, length].

    Args:
        first: tokens that every window begins with.
    """
    length -= len(first)
    generator = torch.Generator().manual_seed(seed)
    spare = tokens.numel() - count * length
    if spare < 0:
        raise BoaEdgeError(f"the calibration text has {tokens.numel()} tokens, {count} x {length} are needed")
    offset = int(torch.randint(min(length, spare + 1), (), generator=generator))
    windows = tokens[offset : offset + (tokens.numel() - offset) // length * length].view(-1, length)
    return behind(first, windows[torch.randperm(windows.shape[0], generator=generator)[:count]]).contiguous()


if __name__ == "__main__":
    main()
