"""Effective settings of a measurement: what was asked for, else what suits the device."""

from __future__ import annotations

from boa_edge.errors import UsageError
from devices.contract import Execution
from runtime_tests.facts import BundleFacts
from runtime_tests.model import Settings

_EMULATED_SCORE_TOKENS = 96


def settle(
    facts: BundleFacts,
    execution: Execution,
    *,
    threads: int = 1,
    warmup: int | None = None,
    repeats: int | None = None,
    new_tokens: int = 32,
    score_tokens: int | None = None,
) -> Settings:
    """Fill in what was not asked for: under emulation, where a token can take a second, no warm-up and one run.

    Raises:
        UsageError: a value is out of range, or the bundle's context or reference text is too short for it.
    """
    emulated = execution == "emulated"
    available = len(facts.reference.tokens)
    if score_tokens is None:
        score_tokens = min(available, _EMULATED_SCORE_TOKENS) if emulated else available
    settings = {
        "threads": (threads, 1),
        "warmup": ((0 if emulated else 1) if warmup is None else warmup, 0),
        "repeats": ((1 if emulated else 3) if repeats is None else repeats, 1),
        "new_tokens": (new_tokens, 1),
        "score_tokens": (score_tokens, 2),
    }
    for name, (value, least) in settings.items():
        if value < least:
            raise UsageError(f"{value} is too small: at least {least}", where=f"--{name.replace('_', '-')}")
    if score_tokens > available:
        where = "--score-tokens"
        raise UsageError(f"the bundle's reference text has only {available} tokens, not {score_tokens}", where=where)
    prompt_tokens = len(facts.reference.prompt)
    context = facts.deployed.runtime_config.get("context_length")
    if isinstance(context, int) and prompt_tokens + new_tokens > context:
        fix = f"At most {max(context - prompt_tokens, 0)} fit after the prompt of {prompt_tokens}"
        raise UsageError(f"{new_tokens} exceed the context of {context} tokens", where="--new-tokens", fix=fix)
    return Settings(
        workload=f"pp{prompt_tokens}/tg{new_tokens}",
        prompt_tokens=prompt_tokens,
        **{name: value for name, (value, _) in settings.items()},
    )
