"""One request on its way: programs made, speeds taken in turns, KL measured."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.table import EnvironmentMissingError, python_of
from benchmarks.runtimes.contenders import CONTENDERS, NATIVE, Contender
from benchmarks.runtimes.figures import Speed, Timed, interleaved, speed_of
from benchmarks.runtimes.native import native_identity, native_logits, native_speed
from benchmarks.runtimes.process import LOGITS, SUMMARY
from benchmarks.runtimes.programs import PROGRAMS, Inputs, NotAvailableError, Program, digest, run_script
from benchmarks.runtimes.rows import Protocol, Report, rows_of
from benchmarks.source import exported
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import read_json, sha256_file, write_json
from boa_edge.progress import say
from runtime_tests.metrics import mean_kl
from toolchain.loading import load_source
from toolchain.quantize import quantize
from toolchain.text import read_text, sequences, tokenize


class Benchmark:
    """A request. Raises BoaEdgeError and UsageError where it cannot be met."""

    def __init__(self, arguments: argparse.Namespace, contenders: list[Contender], version: str) -> None:
        self.arguments, self.contenders, self.version = arguments, contenders, version
        self.work: Path = arguments.work.absolute()
        if arguments.new_tokens < 2:
            raise UsageError("a decode speed needs at least 2 new tokens", where="--new-tokens")
        self.source = load_source(arguments.model)
        ids = tokenize(read_text(arguments.text), self.source.tokenizer)
        if len(ids) < arguments.prompt:
            raise UsageError(f"has {len(ids)} tokens, the prompt needs {arguments.prompt}", where=arguments.text)
        self.prompt = tuple(int(token) for token in ids[: arguments.prompt])
        self.rows = sequences(ids[: arguments.tokens], arguments.length, arguments.text) if arguments.tokens else None
        model_key = digest(self.source.files)
        made = self._exported(model_key), model_key, self._checkpoint(), self.work
        self.inputs = Inputs(arguments.model, *made, arguments.environments.absolute())
        self.failures: dict[str, str] = {}
        self.notes: dict[str, list[str]] = {}
        self.loads: list[float] = []  # averages over a minute, at the start of each run
        self._times: list[Path] = []

    def run(self) -> Report:
        """Make, measure and put together. A contender that fails is listed with the reason."""
        programs: dict[str, Program] = {}
        for contender in self.contenders:
            try:
                self._python(contender)
                programs[contender.label] = PROGRAMS[contender.program](self.inputs)
            except (NotAvailableError, EnvironmentMissingError) as error:
                self.failures[contender.label] = str(error)
        kls = {label: self._kl(self._by_label(label), program) for label, program in self._scored(programs)}
        speeds: dict[str, list[Speed]] = {}
        able = [label for label in programs if label not in self.failures]
        for turn, label in interleaved(able, self.arguments.rounds):
            if label in self.failures:
                continue
            try:
                found = self._speed(self._by_label(label), programs[label], turn)
            except (NotAvailableError, BoaEdgeError) as error:
                self._fail(label, error)
                continue
            speeds.setdefault(label, []).append(found)
        done = {label: found for label, found in speeds.items() if label not in self.failures}
        sizes = {label: program.size for label, program in programs.items()}
        rows = rows_of([one for one in self.contenders if one.label in done], done, sizes, kls)
        return Report(rows, self._protocol(), dict(self.failures), self.notes)

    def finish(self) -> None:
        """The report is written: the next run takes all times anew, since a machine is slower at another hour."""
        for place in self._times:
            place.unlink(missing_ok=True)

    def _by_label(self, label: str) -> Contender:
        return next(one for one in self.contenders if one.label == label)

    def _fail(self, label: str, error: Exception) -> None:
        self.failures[label] = str(error)
        say(f"{label}: {error}")

    def _python(self, contender: Contender) -> Path:
        if contender.environment is None:
            return Path(sys.executable)
        return python_of(contender.environment, self.arguments.environments.absolute())

    def _speed(self, contender: Contender, program: Program, turn: int) -> Speed:
        """One process of one round, or what is kept of it."""
        given = self.arguments
        request = {"prompt": self.prompt, "new_tokens": given.new_tokens, "threads": given.threads}
        decides = {**self._identity(contender, program), **request, "repeats": given.repeats, "round": turn}
        place = self.work / "speeds" / f"{digest(decides)}.json"
        self._times.append(place)
        if place.exists() and not given.again:
            kept = read_json(place, "a kept figure")
            self.notes[contender.label] = kept["notes"]
            self.loads.append(kept["load"])
            return Speed(**kept["speed"])
        say(f"round {turn + 1} of {given.rounds}: {contender.label}")
        self.loads.append(os.getloadavg()[0])
        if contender.driver == NATIVE:
            speed, notes = native_speed(program.path, self.prompt, given.new_tokens, given.threads, given.repeats), []
        else:
            with tempfile.TemporaryDirectory(dir=self._scratch()) as scratch:
                extra = ["--new-tokens", str(given.new_tokens), "--repeats", str(given.repeats)]
                summary = self._drive(contender, program, np.asarray(self.prompt), Path(scratch), extra)
            runs = [Timed(run["prefill_ns"], run["decode_ns"]) for run in summary["runs"]]
            args = (len(self.prompt), given.new_tokens, summary["load_ns"], summary["peak_bytes"])
            speed, notes = speed_of(runs, *args), summary["notes"]
        self.notes[contender.label] = notes
        place.parent.mkdir(parents=True, exist_ok=True)
        kept = {"speed": asdict(speed), "notes": notes, "load": self.loads[-1]}
        write_json(place, kept | {"label": contender.label, "round": turn})
        return speed

    def _scored(self, programs: dict[str, Program]) -> list[tuple[str, Program]]:
        """Whose KL is measured; those that run another's file take its KL over."""
        if self.rows is None:
            return []
        own = {one.label for one in self.contenders if one.same_program not in programs}
        return [(label, program) for label, program in programs.items() if label in own]

    def _kl(self, contender: Contender, program: Program) -> list[float] | None:
        """Mean KL of every sequence that it was scored on, teacher-forced through the program; None where it fails."""
        assert self.rows is not None
        rows = self.rows[: contender.score_rows].numpy()
        decides = {**self._identity(contender, program), "rows": digest(rows.tolist()), "model": self.inputs.model_key}
        place = self.work / "kl" / f"{digest(decides)}.json"
        if place.exists():
            found: list[float] = read_json(place, "a kept figure")["kl"]
            return found
        say(f"KL of {contender.label}")
        with tempfile.TemporaryDirectory(dir=self._scratch()) as scratch:
            try:
                if contender.driver == NATIVE:
                    logits: Any = (native_logits(program.path, row) for row in rows)
                else:
                    self._drive(contender, program, rows, Path(scratch), ["--score"])
                    logits = np.load(Path(scratch) / LOGITS, mmap_mode="r")
                # The last position of a sequence predicts nothing that is in the text.
                kls = [
                    mean_kl(reference[:-1], np.asarray(mine)[:-1])
                    for reference, mine in zip(self._reference(), logits, strict=False)
                ]
            except (NotAvailableError, BoaEdgeError) as error:
                self._fail(contender.label, error)
                return None
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {"kl": kls, "label": contender.label})
        return kls

    def _reference(self) -> Any:
        """The source model's logits, float32 [rows, length, vocabulary]."""
        assert self.rows is not None
        path = self.work / "reference" / f"{digest([self.inputs.model_key, self.rows.tolist()])}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}")
            with torch.inference_mode():
                found = [self.source.model(row[None], use_cache=False).logits[0].float().numpy() for row in self.rows]
            with partial.open("wb") as stream:
                np.save(stream, np.stack(found))
            partial.replace(path)
        return np.load(path, mmap_mode="r")

    def _drive(
        self, contender: Contender, program: Program, tokens: np.ndarray[Any, Any], scratch: Path, extra: list[str]
    ) -> dict[str, Any]:
        """Run a contender's script. NotAvailableError where it fails."""
        np.save(scratch / "tokens.npy", tokens.astype(np.int64))
        threads = self.arguments.threads
        command = [str(self._python(contender)), "-m", f"benchmarks.runtimes.drive_{contender.driver}"]
        command += ["--model", str(program.path), "--tokens", str(scratch / "tokens.npy"), "--threads", str(threads)]
        run_script([*command, "--out", str(scratch), *extra], self.work / "logs" / f"{contender.driver}.log", threads)
        summary: dict[str, Any] = read_json(scratch / SUMMARY, "what a driver wrote")
        return summary

    def _identity(self, contender: Contender, program: Program) -> dict[str, Any]:
        decides: dict[str, Any] = {"program": program.key, "driver": contender.driver}
        if contender.driver == NATIVE:
            return decides | {"runner": native_identity(program.path)}
        here = Path(__file__).parent
        files = [sha256_file(here / name) for name in (f"drive_{contender.driver}.py", "process.py")]
        environment = contender.environment
        return decides | {"files": files, "requirements": None if environment is None else environment.requirements}

    def _scratch(self) -> Path:
        place = self.work / "scratch"
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _exported(self, key: str) -> Path:
        """The source model as a Hugging Face directory, float32, which other tools read."""
        return exported(self.source, self.work / "models" / key)

    def _checkpoint(self) -> Path:
        given = self.arguments
        if given.checkpoint is not None:
            path: Path = given.checkpoint.absolute()
            return path
        if not given.calibration:
            fix = "Name a checkpoint, or a text to make one with the default recipe"
            raise UsageError("neither --checkpoint nor --calibration is given", fix=fix)
        text = Path(given.calibration)
        said = sha256_file(text) if text.is_file() else given.calibration
        place = self.work / "checkpoints" / digest([self.source.files, said, self.version])
        if not place.exists():
            quantize(given.model, place, calibration=given.calibration)
        return place

    def _protocol(self) -> Protocol:
        given = self.arguments
        rows = self.rows
        return Protocol(
            model=self.source.identity,
            text=given.text.name,
            prompt=len(self.prompt),
            new_tokens=given.new_tokens,
            threads=given.threads,
            rounds=given.rounds,
            repeats=given.repeats,
            rows=0 if rows is None else rows.shape[0],
            length=0 if rows is None else rows.shape[1],
            loads=(min(self.loads, default=0.0), max(self.loads, default=0.0)),
            version=self.version,
        )


def chosen(words: str) -> list[Contender]:
    """The contenders that a filter leaves. UsageError where a word of it matches none."""
    wanted = [word.strip().lower() for word in words.split(",") if word.strip()]
    for word in wanted:
        if not any(word in one.label.lower() for one in CONTENDERS):
            raise UsageError(f"no contender {word!r}", fix=f"There are: {'; '.join(one.label for one in CONTENDERS)}")
    return [one for one in CONTENDERS if not wanted or any(word in one.label.lower() for word in wanted)]
