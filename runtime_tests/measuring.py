"""Measure bundles on a device and write the report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import devices
from boa_edge import __version__
from boa_edge.errors import BoaEdgeError
from boa_edge.files import disk_errors, output_directory, write_json, write_text
from boa_edge.progress import say
from devices.contract import Device, Execution, GenerateRequest, RunResult, ScoreRequest
from runtime_tests.cost import cost
from runtime_tests.events import Generation, attention_of, gather_generation, load_time, runtime_of, score_time
from runtime_tests.facts import BundleFacts, open_bundle
from runtime_tests.fidelity import check_logits, score
from runtime_tests.figure import EMULATED_MEMORY, EMULATED_TIME
from runtime_tests.following import follow
from runtime_tests.generation import compare_greedy, notes
from runtime_tests.labels import visible
from runtime_tests.metrics import Logits
from runtime_tests.model import DeviceFacts, OperatorProfile, Report, Settings, Tool
from runtime_tests.origin import quantization
from runtime_tests.profiling import PROFILE, read_profile
from runtime_tests.reading import REPORT
from runtime_tests.report import render, to_markdown
from runtime_tests.reproduce import commands
from runtime_tests.settings import settle
from runtime_tests.speed import memory, samples, speed
from runtime_tests.text import load_decoder
from runtime_tests.throttling import throttling_notes
from runtime_tests.variants import check_comparable, variant, variant_names


def measure(
    bundle: Path,
    device: str | Device,
    output: Path,
    *,
    threads: int = 1,
    warmup: int | None = None,
    repeats: int | None = None,
    new_tokens: int = 32,
    score_tokens: int | None = None,
    profile: bool = False,
    overwrite: bool = False,
) -> Report:
    """Run `bundle` on `device`, compare it with what PyTorch answered, and write `report.json`, `.html` and `.md`.

    Args:
        bundle: a bundle directory; it is verified first.
        device: a name that `boa-edge devices` lists, or a device.
        output: the directory to make.
        threads: of the runtime.
        warmup: generation runs that do not count; 1, under emulation 0.
        repeats: generation runs that count; 3, under emulation 1.
        new_tokens: to generate in each run.
        score_tokens: of the reference text; all, under emulation at most 96.
        profile: generate once more with every operator timed, and leave the runtime's record beside the report.
        overwrite: replace an existing report.

    Raises:
        BoaEdgeError: the bundle is damaged, the device is not usable, or a run on it failed.
        UsageError: a setting is out of range, or `output` exists.
    """
    chosen = Wishes(threads, warmup, repeats, new_tokens, score_tokens)
    return measure_together([bundle], device, output, chosen, profile=profile, overwrite=overwrite)[0]


@dataclass(frozen=True)
class Wishes:
    """Settings as they were asked for; see `measure`."""

    threads: int = 1
    warmup: int | None = None
    repeats: int | None = None
    new_tokens: int = 32
    score_tokens: int | None = None


def measure_together(
    bundles: Sequence[Path],
    device: str | Device,
    output: Path,
    wishes: Wishes,
    *,
    profile: bool = False,
    overwrite: bool = False,
) -> tuple[Report, ...]:
    """Measure several bundles of one model on one device, one after the other.

    Of a single bundle, as `measure`. Of several, `output` holds the first's report, in which all stand side by side,
    and the others' whole reports in directories of their names.

    Raises:
        BoaEdgeError, UsageError: as `measure`; also bundles that do not answer the same questions.
    """
    with output_directory(output, overwrite=overwrite) as directory:
        facts = [open_bundle(bundle) for bundle in bundles]
        check_comparable(facts)
        opened = devices.open_device(device) if isinstance(device, str) else device
        settings = [settle(one, opened.execution, **asdict(wishes)) for one in facts]
        names = variant_names([one.deployed for one in facts])
        places = [name.replace(" ", "-").replace("/", "-") for name in names]
        reports = []
        for index, one in enumerate(facts):
            place = directory / places[index] if index else directory
            place.mkdir(exist_ok=True)
            reports.append(_measure(one, settings[index], opened, place / PROFILE if profile else None))
        if len(reports) > 1:
            links = [None, *(f"{place}/report.html" for place in places[1:])]
            variants = tuple(map(variant, reports, names, links))
            reports[0] = reports[0].model_copy(update={"variants": variants})
        for index, report in enumerate(reports):
            place = directory / places[index] if index else directory
            write_json(place / REPORT, report.as_dict())
            write_text(place / "report.html", render(report))
            write_text(place / "report.md", to_markdown(report))
    return tuple(reports)


class _Session:
    """The runs on one device, one after the other, with what each left for the report."""

    def __init__(self, facts: BundleFacts, device: Device, settings: Settings) -> None:
        self._facts, self._device, self._settings = facts, device, settings
        self.results: list[RunResult] = []

    def score(self, tokens: Sequence[int]) -> Logits:
        """Teacher-forced logits [n, V]."""
        request = ScoreRequest(tokens=tuple(map(int, tokens)), threads=self._settings.threads)
        result = self._run(request)
        return check_logits(result.logits, (len(tokens), self._facts.reference.vocabulary))

    def generate(self) -> Generation:
        """The generation runs."""
        settings = self._settings
        return gather_generation(
            self._run(self._generation(settings.warmup, settings.repeats)),
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            warmup=settings.warmup,
            repeats=settings.repeats,
        )

    def profile(self, path: Path) -> OperatorProfile:
        """One generation with every operator timed; the runtime's record goes to `path`."""
        result = self._run(self._generation(0, 1, profile=True))
        if result.profile is None:
            raise BoaEdgeError("the device gave no operator profile", where=self._device.name)
        with disk_errors(path):
            path.write_bytes(result.profile)
        return read_profile(path, result.execution)

    def _generation(self, warmup: int, repeats: int, *, profile: bool = False) -> GenerateRequest:
        return GenerateRequest(
            prompt=tuple(map(int, self._facts.reference.prompt)),
            new_tokens=self._settings.new_tokens,
            warmup=warmup,
            repeats=repeats,
            threads=self._settings.threads,
            profile=profile,
        )

    def _run(self, request: GenerateRequest | ScoreRequest) -> RunResult:
        device = self._device
        result = device.run(self._facts.path, request, follow(device.name, self._settings.new_tokens))
        if result.execution != device.execution:
            raise BoaEdgeError(
                f"the run was {result.execution}, but the device is {device.execution}", where=device.name
            )
        self.results.append(result)
        return result


def _measure(facts: BundleFacts, settings: Settings, device: Device, profile: Path | None = None) -> Report:
    session = _Session(facts, device, settings)
    execution = device.execution
    decode = load_decoder(facts.path)

    name = visible(device.name)
    say(f"{name}: scoring {settings.score_tokens} tokens ({execution})")
    reference = facts.reference.head(settings.score_tokens)
    fidelity = score(reference, session.score(reference.tokens.tolist()), execution)

    say(f"{name}: generating {settings.warmup} + {settings.repeats} x {settings.new_tokens} tokens ({execution})")
    generation = session.generate()
    greedy = compare_greedy(reference, generation, decode, lambda tokens: session.score(tokens)[-1], execution)

    loads = [ns for ns in map(load_time, session.results) if ns is not None]
    operators = None
    if profile is not None:
        say(f"{name}: generating once more, every operator timed ({execution})")
        operators = session.profile(profile)
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=Tool(version=__version__, python=platform.python_version(), platform=platform.platform()),
        deployed=facts.deployed,
        device=_device_facts(device, session.results),
        settings=settings,
        fidelity=fidelity,
        generation=greedy,
        speed=speed(generation, loads, execution),
        memory=memory(generation, execution),
        cost=cost(session.results),
        samples=samples(generation, loads, score_time(session.results[0]), execution),
        quantization=quantization(facts.provenance, facts.deployed.recipe),
        profile=operators,
        reproduce=commands(facts.deployed, facts.provenance, settings, device.name),
        notes=(
            *notes(greedy, fidelity, facts.deployed),
            *throttling_notes(session.results, generation, execution),
            *dict.fromkeys(note for result in session.results for note in result.notes),
            *_execution_notes(execution),
        ),
    )


def _device_facts(device: Device, results: Sequence[RunResult]) -> DeviceFacts:
    return DeviceFacts(
        name=device.name,
        execution=device.execution,
        runtime=runtime_of(results[0]),
        attention=attention_of(results[0]),
        fingerprint=device.fingerprint(),
        state=_state(results),
        programs={name: digest for result in results for name, digest in result.files.items()},
        commands=tuple(result.command for result in results),
    )


def _state(results: Sequence[RunResult]) -> dict[str, dict[str, Any]] | None:
    """Before the first run and after the last."""
    if not (results[0].state and results[-1].state):
        return None
    return {"before": results[0].state["before"], "after": results[-1].state["after"]}


def _execution_notes(execution: Execution) -> list[str]:
    """Accuracy belongs to bundle and device together: a runtime computes differently on another CPU."""
    found = [
        "Fidelity holds for this device: a runtime may choose other kernels, and so other numbers, on another CPU."
    ]
    if execution == "emulated":
        found.append(f"Times are {EMULATED_TIME}. Memory is an {EMULATED_MEMORY}.")
    return found
