"""What a long run on a device shows meanwhile: a line on stderr now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from boa_edge.progress import say
from devices.contract import Event
from runtime_tests.labels import visible

_SECONDS = 10.0


def follow(device: str, new_tokens: int = 0) -> Callable[[Event], None]:
    """An `on_event` callback that tells how far the device has come, at most every ten seconds."""
    last = time.monotonic()
    name = visible(device)

    def on_event(event: Event) -> None:
        nonlocal last
        text = _describe(event, new_tokens)
        if text and time.monotonic() - last >= _SECONDS:
            last = time.monotonic()
            say(f"{name}: {text}")

    return on_event


def _describe(event: Event, new_tokens: int) -> str | None:
    kind = event.get("event")
    if kind == "load":
        return "model loaded"
    if kind not in ("prefill", "token"):
        return None
    run = f"{'warm-up' if event.get('warmup') else 'run'} {event.get('run')}"
    if kind == "prefill":
        return f"{run}, prompt read"
    number = event.get("i")
    return f"{run}, token {number + 1}/{new_tokens}" if isinstance(number, int) else None
