"""What a token costs in instructions, from the counts of an emulated device."""

from __future__ import annotations

from collections.abc import Sequence

from devices.contract import RunResult
from runtime_tests.figure import figure
from runtime_tests.model import Cost
from runtime_tests.statistics import percentile

_NOTE = "instructions of the emulated program from event to event, one thread: repeatable, and not convertible to time"


def cost(results: Sequence[RunResult]) -> Cost | None:
    """Of the first generation whose instructions were counted; None where none was."""
    for result in results:
        counts = result.instructions
        prefill = next((event for event in result.events if event["event"] == "prefill"), None)
        if counts is None or prefill is None:
            continue
        prompt, tokens, last = [], [], 0
        for before, after, event in zip(counts, counts[1:], result.events[1:], strict=False):
            if event.get("warmup"):
                continue
            if event["event"] == "prefill":
                prompt.append(after - before)
            elif event["event"] == "token":
                last = event["i"]
                if last > 0:  # token 0 comes out of the prompt
                    tokens.append(after - before)
        return Cost(
            prompt_tokens=prefill["tokens"],
            new_tokens=last + 1,
            instructions_prompt=figure(
                percentile(prompt, 50), "instructions", result.execution, n=len(prompt), note=_NOTE
            ),
            instructions_per_token=figure(
                percentile(tokens, 50), "instructions", result.execution, n=len(tokens), note=_NOTE
            ),
        )
    return None
