"""Times, speeds and memory out of the runner's samples: warm-ups left out, percentiles by nearest rank."""

from __future__ import annotations

from collections.abc import Sequence

from devices.contract import Execution
from runtime_tests.events import Generation
from runtime_tests.figure import Figure, figure, memory_note, time_note
from runtime_tests.model import Memory, RunSamples, Samples, Speed, ThreadRow
from runtime_tests.statistics import percentile, rate, samples_needed

_MILLISECOND = 1e6


def speed(generation: Generation, loads: Sequence[int], execution: Execution) -> Speed:
    """Summarise the counted runs. `loads`: nanoseconds of every load, one a process."""
    runs = generation.counted
    token_ns = [ns for run in runs for ns in run.token_ns]
    prefill = [rate(run.prompt_tokens, run.prefill_ns) for run in runs]
    decode = [rate(len(run.token_ns), sum(run.token_ns)) for run in runs]

    return Speed(
        load_time=_time(loads, 50, execution),
        first_inference=_time([run.prefill_ns for run in generation.runs[:1]], 50, execution),
        time_to_first_token=_time([run.prefill_ns for run in runs], 50, execution),
        prefill_speed=_speed(prefill, execution),
        decode_speed=_speed(decode, execution),
        token_time_p50=_time(token_ns, 50, execution),
        token_time_p90=_time(token_ns, 90, execution),
        token_time_p95=_time(token_ns, 95, execution),
        token_time_p99=_time(token_ns, 99, execution),
    )


def memory(generation: Generation, execution: Execution) -> Memory:
    """Resident memory of the process that generated."""
    note = memory_note(execution)
    return Memory(
        peak_rss=figure(generation.peak_rss_bytes, "bytes", execution, n=1, note=note),
        rss=figure(generation.rss_bytes, "bytes", execution, n=1, note=note),
        pss=figure(generation.pss_bytes, "bytes", execution, n=1, note=note),
        pss_file=figure(generation.pss_file_bytes, "bytes", execution, n=1, note=note),
        pss_anon=figure(generation.pss_anon_bytes, "bytes", execution, n=1, note=note),
    )


def samples(generation: Generation, loads: Sequence[int], score_ns: int | None, execution: Execution) -> Samples:
    """Everything that was timed, warm-ups too."""
    return Samples(
        execution=execution,
        load_ns=tuple(loads),
        score_ns=score_ns,
        runs=tuple(
            RunSamples(
                run=run.index,
                warmup=run.warmup,
                prefill_ns=run.prefill_ns,
                token_ns=run.token_ns,
                tokens=run.tokens,
            )
            for run in generation.runs
        ),
    )


def thread_row(threads: int, generation: Generation, execution: Execution) -> ThreadRow:
    """The workload's main figures with another number of threads."""
    found = speed(generation, [], execution)
    return ThreadRow(
        threads=threads,
        time_to_first_token=found.time_to_first_token,
        prefill_speed=found.prefill_speed,
        decode_speed=found.decode_speed,
        peak_rss=memory(generation, execution).peak_rss,
    )


def _time(nanoseconds: Sequence[int], percent: float, execution: Execution) -> Figure:
    """A percentile in milliseconds. A clock that stood still measured nothing."""
    positive = [ns for ns in nanoseconds if ns > 0]
    value = percentile(positive, percent)
    note = time_note(execution)
    if value is None and positive:
        note = "; ".join(filter(None, [f"needs {samples_needed(percent)} samples", note]))
    return figure(None if value is None else value / _MILLISECOND, "ms", execution, n=len(positive), note=note)


def _speed(rates: Sequence[float | None], execution: Execution) -> Figure:
    """The median over runs."""
    known = [value for value in rates if value is not None]
    value = percentile(known, 50)
    return figure(value, "tokens/s", execution, n=len(known), note=time_note(execution))
