"""A device that slows down, or whose runs differ, is said to; one that keeps its pace is not."""

from __future__ import annotations

import pytest

from runtime_tests.events import Generation, GenerationRun
from runtime_tests.throttling import slowdown_of, throttling_notes, uneven_note


def generation(*runs: list[int]) -> Generation:
    """Runs with these times per token; a warm-up, ten times slower, goes before them."""
    all_runs = [[10 * ns for ns in runs[0]], *runs]
    made = tuple(
        GenerationRun(index, index == 0, 4, 1000, tuple(range(len(times) + 1)), tuple(times))
        for index, times in enumerate(all_runs)
    )
    return Generation(None, made, None, None)


@pytest.mark.parametrize(("slow", "found"), [(100, 1.0), (150, 1.5), (50, 0.5)])
def test_the_last_third_is_held_against_the_first(slow: int, found: float) -> None:
    assert slowdown_of(generation([100] * 20 + [slow] * 10)) == found
    assert len(throttling_notes([], generation([100] * 20 + [slow] * 10), "measured")) == (found > 1.15)
    assert throttling_notes([], generation([100] * 20 + [slow] * 10), "emulated") == []


def test_few_tokens_say_nothing() -> None:
    assert slowdown_of(generation([100] * 19 + [900] * 10)) is None


def test_runs_that_differ_are_said_whatever_their_order() -> None:
    even, slow = [1_000_000, 1_100_000] * 5, [2_000_000] * 10
    for runs in ((even, slow, even), (slow, even, even), (even, even, slow)):
        (note,) = uneven_note(generation(*runs), "measured")
        assert "1.05 ms" in note
        assert "2 ms" in note
        assert uneven_note(generation(*runs), "emulated") == []
    assert uneven_note(generation(even, [1_150_000] * 10), "measured") == []
    assert uneven_note(generation(even), "measured") == []  # the warm-up does not count
    assert uneven_note(generation([], []), "measured") == []
