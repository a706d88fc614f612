"""Effective settings of a measurement: what was asked for, else what suits the device."""

from __future__ import annotations

import re
from dataclasses import dataclass

from boa_edge.errors import UsageError
from boa_edge.progress import say
from devices.contract import MOST_CORES, MOST_RUNS, MOST_THREADS, Execution
from runtime_tests.facts import BundleFacts
from runtime_tests.model import Settings

_EMULATED_SCORE_TOKENS = 96
_GREEDY_TOKENS = 32
_WORKLOAD = re.compile(r"pp([1-9]\d{0,6})/tg([1-9]\d{0,6})")
STANDARD_WORKLOAD = "pp128/tg64"
"""What devices of real time are timed with, where the bundle's context has room for it."""


@dataclass(frozen=True)
class Wishes:
    """Settings as they were asked for; None for what suits the device.

    Attributes:
        threads: of the runtime; where there are several, the speeds are measured with each, everything else with the
            first.
        warmup: generation runs that do not count; 1, under emulation 0.
        repeats: generation runs that count; 3, under emulation 1.
        new_tokens: of the greedy continuation that is compared with PyTorch's; 32.
        score_tokens: of the reference text; all, under emulation at most 96.
        workload: what is timed, `pp<prompt tokens>/tg<generated tokens>`. Without it, and where new_tokens was asked
            for or under emulation, where a token can take a second, the greedy continuation itself is timed.
        cores: numbers of the CPU cores to run on; empty for any.
    """

    threads: tuple[int, ...] = (1,)
    warmup: int | None = None
    repeats: int | None = None
    new_tokens: int | None = None
    score_tokens: int | None = None
    workload: str | None = None
    cores: tuple[int, ...] = ()


def settle(facts: BundleFacts, execution: Execution, wishes: Wishes) -> Settings:
    """Fill in what was not asked for.

    Raises:
        UsageError: a value is out of range, or the bundle's context or reference text is too short for it.
    """
    emulated = execution == "emulated"
    available = len(facts.reference.tokens)
    context = facts.deployed.runtime_config.get("context_length")
    usual = min(available, _EMULATED_SCORE_TOKENS) if emulated else available
    score_tokens = _scored(wishes.score_tokens, usual, context)
    greedy_tokens = _GREEDY_TOKENS if wishes.new_tokens is None else wishes.new_tokens
    settings = {
        "warmup": ((0 if emulated else 1) if wishes.warmup is None else wishes.warmup, 0),
        "repeats": ((1 if emulated else 3) if wishes.repeats is None else wishes.repeats, 1),
        "new_tokens": (greedy_tokens, 1),
        "score_tokens": (score_tokens, 2),
    }
    for name, (value, least) in settings.items():
        _within(value, least, MOST_RUNS, name)
    if not wishes.threads:
        raise UsageError("names no number of threads", where="--threads")
    for count in wishes.threads:
        _within(count, 1, MOST_THREADS, "threads")
    for core in wishes.cores:
        _within(core, 0, MOST_CORES - 1, "cores")
    if len(set(wishes.threads)) < len(wishes.threads):
        raise UsageError("names a number of threads twice", where="--threads", fix="Name each once")
    if score_tokens > available:
        where = "--score-tokens"
        raise UsageError(f"the bundle's reference text has only {available} tokens, not {score_tokens}", where=where)
    prompt_tokens = len(facts.reference.prompt)
    if isinstance(context, int) and prompt_tokens + greedy_tokens > context:
        fix = f"At most {max(context - prompt_tokens, 0)} fit after the prompt of {prompt_tokens}"
        raise UsageError(f"{greedy_tokens} exceed the context of {context} tokens", where="--new-tokens", fix=fix)
    timed_prompt, timed_tokens = _timed(wishes, emulated, (prompt_tokens, greedy_tokens), context)
    return Settings(
        workload=f"pp{timed_prompt}/tg{timed_tokens}",
        threads=wishes.threads[0],
        sweep=wishes.threads[1:],
        cores=wishes.cores,
        warmup=settings["warmup"][0],
        repeats=settings["repeats"][0],
        prompt_tokens=timed_prompt,
        new_tokens=timed_tokens,
        greedy_tokens=greedy_tokens,
        score_tokens=score_tokens,
    )


def _scored(wish: int | None, usual: int, context: object) -> int:
    """Tokens of the reference text to score: the usual number, or as many as fit the context, unless asked for."""
    wanted = usual if wish is None else wish
    if not isinstance(context, int) or wanted <= context:
        return wanted
    if wish is not None:
        fix = f"At most {context} fit"
        raise UsageError(f"{wish} exceed the context of {context} tokens", where="--score-tokens", fix=fix)
    say(f"scoring the {context} tokens of the reference text that fit the bundle's context, not {wanted}")
    return context


def _timed(wishes: Wishes, emulated: bool, greedy: tuple[int, int], context: object) -> tuple[int, int]:
    """Prompt and generated tokens of the workload that is timed."""
    text = wishes.workload
    if text is None:
        if emulated or wishes.new_tokens is not None:
            return greedy
        text = STANDARD_WORKLOAD
    match = _WORKLOAD.fullmatch(text)
    if match is None:
        fix = f"Write pp<prompt tokens>/tg<generated tokens>, such as {STANDARD_WORKLOAD}"
        raise UsageError(f"{text!r} is no workload", where="--workload", fix=fix)
    prompt, tokens = int(match[1]), int(match[2])
    if isinstance(context, int) and prompt + tokens > context:
        if wishes.workload is None:
            return greedy
        fix = "Ask for fewer tokens"
        raise UsageError(f"{text} exceeds the context of {context} tokens", where="--workload", fix=fix)
    return prompt, tokens


def _within(value: int, least: int, most: int, name: str) -> None:
    where = f"--{name.replace('_', '-')}"
    if value < least:
        raise UsageError(f"{value} is too small: at least {least}", where=where)
    if value > most:
        raise UsageError(f"{value} is too large: at most {most}", where=where)
