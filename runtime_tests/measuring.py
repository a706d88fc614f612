"""Measure bundles on a device and write the report."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import devices
from boa_edge import __version__
from boa_edge.errors import BoaEdgeError
from boa_edge.files import as_input, disk_errors, output_directory, write_json, write_text
from boa_edge.progress import say
from devices.contract import Device, Execution, GenerateRequest, RunResult, ScoreRequest
from runtime_tests.cost import cost
from runtime_tests.energy import energy, obstacle, repeats
from runtime_tests.estimate import estimates
from runtime_tests.events import (
    Generation,
    attention_of,
    check_numbers,
    gather_generation,
    load_time,
    runtime_of,
    score_time,
)
from runtime_tests.facts import BundleFacts, open_bundle
from runtime_tests.fidelity import check_logits, score
from runtime_tests.figure import EMULATED_MEMORY, EMULATED_TIME
from runtime_tests.following import follow
from runtime_tests.generation import compare_greedy, notes
from runtime_tests.labels import visible
from runtime_tests.metrics import Logits
from runtime_tests.model import DeviceFacts, Energy, OperatorProfile, Report, Settings, Tool
from runtime_tests.origin import quantization
from runtime_tests.profiling import profile_name, read_profile
from runtime_tests.reading import REPORT
from runtime_tests.report import render, to_markdown
from runtime_tests.reproduce import commands
from runtime_tests.settings import Wishes, settle
from runtime_tests.speed import memory, samples, speed, thread_row
from runtime_tests.text import load_decoder
from runtime_tests.throttling import throttling_notes, uneven_note
from runtime_tests.variants import check_comparable, directory_names, variant, variant_names


def measure(
    bundle: Path,
    device: str | Device,
    output: Path,
    *,
    threads: int | tuple[int, ...] = 1,
    warmup: int | None = None,
    repeats: int | None = None,
    new_tokens: int | None = None,
    score_tokens: int | None = None,
    workload: str | None = None,
    cores: tuple[int, ...] = (),
    profile: bool = False,
    overwrite: bool = False,
) -> Report:
    """Run `bundle` on `device`, compare it with what PyTorch answered, and write `report.json`, `.html` and `.md`.

    Args:
        bundle: a bundle directory; it is verified first.
        device: a name that `boa-edge devices` lists, or a device.
        output: the directory to make.
        threads, warmup, repeats, new_tokens, score_tokens, workload, cores: see `Wishes`.
        profile: generate once more with every operator timed, and leave the runtime's record beside the report.
        overwrite: replace an existing report.

    Raises:
        BoaEdgeError: the bundle is damaged, the device is not usable, or a run on it failed.
        UsageError: a setting is out of range, or `output` exists.
    """
    counts = (threads,) if isinstance(threads, int) else threads
    wishes = Wishes(counts, warmup, repeats, new_tokens, score_tokens, workload, cores)
    return measure_together([bundle], device, output, wishes, profile=profile, overwrite=overwrite)[0]


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
    inputs = {f"bundle {number}": bundle for number, bundle in enumerate(bundles, start=1)}
    profiles = {"the device's profile": as_input(device) if isinstance(device, str) else None}
    with output_directory(output, overwrite=overwrite, inputs=inputs | profiles) as directory:
        facts = [open_bundle(bundle) for bundle in bundles]
        check_comparable(facts)
        opened = devices.open_device(device) if isinstance(device, str) else device
        argument = device if isinstance(device, str) else device.name
        execution = opened.execution
        # The same for all: what the shortest context has room for.
        settings = settle(min(facts, key=_context), execution, wishes)
        names = variant_names([one.deployed for one in facts])
        places = directory_names(names)
        reports = []
        for index, one in enumerate(facts):
            place = directory / places[index] if index else directory
            place.mkdir(exist_ok=True)
            record = place / profile_name(one.deployed.runtime) if profile else None
            reports.append(_measure(one, settings, opened, execution, argument, record))
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


def _context(facts: BundleFacts) -> float:
    found = facts.deployed.runtime_config.get("context_length")
    return found if isinstance(found, int) else math.inf


class _Session:
    """The runs on one device, one after the other, with what each left for the report: all of one `execution`."""

    def __init__(self, facts: BundleFacts, device: Device, execution: Execution, settings: Settings) -> None:
        self._facts, self._device, self._execution, self._settings = facts, device, execution, settings
        self.results: list[RunResult] = []

    def score(self, tokens: Sequence[int]) -> Logits:
        """Teacher-forced logits [n, V]."""
        settings = self._settings
        request = ScoreRequest(tokens=tuple(map(int, tokens)), threads=settings.threads, cores=settings.cores)
        result = self._run(request)
        return check_logits(result.logits, (len(tokens), self._facts.reference.vocabulary))

    @property
    def separate(self) -> bool:
        """Whether the workload is another generation than the greedy continuation that PyTorch's is compared with."""
        settings = self._settings
        return (settings.prompt_tokens, settings.new_tokens) != (len(self._facts.reference.prompt), settings.greedy)

    def continue_greedily(self) -> Generation:
        """The greedy continuation of the reference prompt; as often as the workload where it is the workload."""
        settings = self._settings
        # Twice, to see whether the device repeats itself.
        warmup, repeats = (0, 2) if self.separate else (settings.warmup, settings.repeats)
        prompt = tuple(map(int, self._facts.reference.prompt))
        return self._gather(
            GenerateRequest(prompt, settings.greedy, warmup, repeats, settings.threads, cores=settings.cores)
        )

    def generate(self, threads: int) -> Generation:
        """The workload."""
        settings = self._settings
        return self._gather(self._workload(settings.warmup, settings.repeats, threads))

    def _gather(self, request: GenerateRequest) -> Generation:
        return gather_generation(
            self._run(request),
            prompt_tokens=len(request.prompt),
            new_tokens=request.new_tokens,
            warmup=request.warmup,
            repeats=request.repeats,
        )

    def profile(self, path: Path) -> OperatorProfile:
        """One generation with every operator timed; the runtime's record goes to `path`."""
        result = self._run(self._workload(0, 1, self._settings.threads, profile=True))
        if result.profile is None:
            raise BoaEdgeError("the device gave no operator profile", where=self._device.name)
        with disk_errors(path):
            path.write_bytes(result.profile)
        return read_profile(path, self._facts.deployed.runtime, result.execution)

    def energy(self, generation: Generation) -> Energy:
        """The workload again, as often as its battery's gauge needs it, or why not."""
        state = self.results[-1].state.get("after", {})
        reason = obstacle(state, self._execution)
        if reason is not None:
            return Energy(reason=reason)
        count, battery = repeats(generation), state["gauge"]["battery"]
        say(f"{visible(self._device.name)}: {count} x {self._settings.workload}, the battery's gauge read meanwhile")
        result = self._run(self._workload(0, count, self._settings.threads, battery=battery))
        return energy(result.gauge, load_time(result), generation)

    def _workload(
        self, warmup: int, repeats: int, threads: int, *, profile: bool = False, battery: str | None = None
    ) -> GenerateRequest:
        settings = self._settings
        return GenerateRequest(
            self._workload_prompt(),
            settings.new_tokens,
            warmup,
            repeats,
            threads,
            profile=profile,
            cores=settings.cores,
            battery=battery,
        )

    def _workload_prompt(self) -> tuple[int, ...]:
        """As many tokens as the workload's prompt has: the reference prompt, else the reference text over and over."""
        reference = self._facts.reference
        source = reference.tokens if self.separate else reference.prompt
        return tuple(map(int, islice(cycle(source), self._settings.prompt_tokens)))

    def _run(self, request: GenerateRequest | ScoreRequest) -> RunResult:
        device = self._device
        tokens = request.new_tokens if isinstance(request, GenerateRequest) else 0
        result = device.run(self._facts.path, request, follow(device.name, tokens))
        if result.execution != self._execution:
            raise BoaEdgeError(
                f"a run was {result.execution} where the measurement began as {self._execution}",
                where=f"device {visible(device.name)}",
                fix="Another device answers by that name: name one device, and measure again",
            )
        check_numbers(result.events, device.name)
        self.results.append(result)
        return result


def _measure(
    facts: BundleFacts,
    settings: Settings,
    device: Device,
    execution: Execution,
    argument: str,
    profile: Path | None = None,
) -> Report:
    """The report of one bundle; `argument` is the device as the user named it."""
    session = _Session(facts, device, execution, settings)
    decode = load_decoder(facts.path)

    name = visible(device.name)
    say(f"{name}: scoring {settings.score_tokens} tokens ({execution})")
    reference = facts.reference.head(settings.score_tokens)
    fidelity = score(reference, session.score(reference.tokens.tolist()), execution)

    def announce(threads: int) -> None:
        runs = f"{settings.warmup} + {settings.repeats} x {settings.workload}"
        say(f"{name}: {runs}, {threads} thread{'' if threads == 1 else 's'} ({execution})")

    if session.separate:
        say(f"{name}: generating {settings.greedy} tokens after the reference prompt ({execution})")
    else:
        announce(settings.threads)
    generation = continued = session.continue_greedily()
    if session.separate:
        announce(settings.threads)
        generation = session.generate(settings.threads)
    timed = session.results[-1:]
    greedy = compare_greedy(reference, continued, decode, lambda tokens: session.score(tokens)[-1], execution)
    loads = [ns for ns in map(load_time, session.results) if ns is not None]
    sweep = []
    for threads in settings.sweep:
        announce(threads)
        sweep.append(thread_row(threads, session.generate(threads), execution))
        timed.append(session.results[-1])
    used = session.energy(generation)
    operators = None
    if profile is not None:
        say(f"{name}: generating once more, every operator timed ({execution})")
        operators = session.profile(profile)
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=Tool(version=__version__, python=platform.python_version(), platform=platform.platform()),
        deployed=facts.deployed,
        device=_device_facts(device, execution, session.results),
        settings=settings,
        fidelity=fidelity,
        generation=greedy,
        speed=speed(generation, loads, execution),
        sweep=tuple(sweep),
        memory=memory(generation, execution),
        cost=cost([*timed, *session.results]),
        energy=used,
        samples=samples(generation, loads, score_time(session.results[0]), execution),
        quantization=quantization(facts.provenance, facts.deployed.recipe),
        profile=operators,
        estimates=estimates(facts.deployed, facts.config),
        reproduce=commands(facts.deployed, facts.provenance, settings, argument, profiled=operators is not None),
        notes=(
            *notes(greedy, fidelity, facts.deployed),
            *throttling_notes(session.results, generation, execution),
            *uneven_note(generation, execution),
            *dict.fromkeys(note for result in session.results for note in result.notes),
            *_execution_notes(execution),
        ),
    )


def _device_facts(device: Device, execution: Execution, results: Sequence[RunResult]) -> DeviceFacts:
    return DeviceFacts(
        name=device.name,
        execution=execution,
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
