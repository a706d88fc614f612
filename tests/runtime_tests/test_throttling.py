"""A device that slows down, or whose runs differ, is said to; one that keeps its pace is not."""

from __future__ import annotations

import pytest

from devices.contract import RunResult
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


@pytest.mark.parametrize(("slow", "found"), [(1.0, 1.0), (1.5, 1.5), (0.5, 0.5)])
def test_the_last_runs_are_held_against_the_first_token_by_token(slow: float, found: float) -> None:
    """Late tokens cost more than early ones in every run, which is not the device's doing."""
    growing = [1000 + 100 * place for place in range(10)]
    runs = [growing, [5 * ns for ns in growing], [round(slow * ns) for ns in growing]]
    assert slowdown_of(generation(*runs)) == pytest.approx(found)
    notes = throttling_notes([], generation(*runs), "measured")
    assert len(notes) == (found > 1.15)
    assert all("1.50 times" in note for note in notes)
    assert throttling_notes([], generation(*runs), "emulated") == []


def test_a_single_run_and_few_tokens_say_nothing() -> None:
    assert slowdown_of(generation([100] * 20 + [900] * 20)) is None
    assert slowdown_of(generation([100] * 14, [900] * 14)) is None


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("0x50000", "0x50000", None),  # of another day
        ("0x50000", "0xd0000", "0x80000"),
        ("0x50005", "0x50000", "0x5"),
        (None, "0x50000", None),
        ("0x0", "0x0", None),
        ("nonsense", "0x1", "0x1"),
    ],
)
def test_a_board_tells_of_now_and_not_of_all_since_it_booted(before: str | None, after: str, said: str | None) -> None:
    state = {"before": {"throttled": before}, "after": {"throttled": after}}
    result = RunResult((), None, (), {}, "measured", state=state)
    notes = throttling_notes([result], generation([100]), "measured")
    told = [f"The board reported throttling or low voltage while it was measured: {said}."]
    assert notes == ([] if said is None else told)


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
