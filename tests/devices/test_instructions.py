"""Instructions repeat from run to run on an emulated device, and tell cheap work from costly work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from devices import GenerateRequest, RunResult, ScoreRequest, instructions, open_device, tools
from runtime_tests.cost import cost

pytestmark = pytest.mark.emulated
REQUEST = GenerateRequest((5, 17, 3, 88, 41), 8)


@pytest.fixture(scope="module", autouse=True)
def counted() -> None:
    emulator = tools.find(tools.QEMU)
    if emulator is None or instructions.plugin_for(emulator) is None:
        pytest.skip("this QEMU takes no plugins (its static builds do not)")


def run(bundle: Path, device: str, request: GenerateRequest = REQUEST) -> RunResult:
    return open_device(device).run(bundle, request)


@pytest.mark.parametrize("device", ["arm64", "arm64-a53"])
def test_three_runs_agree_to_half_a_percent(tiny_bundle: Path, device: str) -> None:
    results = [run(tiny_bundle, device) for _ in range(3)]
    counts = np.array([result.instructions for result in results], dtype=np.float64)
    assert counts.shape == (3, len(results[0].events))
    assert (np.diff(counts, axis=1) > 0).all()
    found = [cost([result]) for result in results]
    for name in ("instructions_per_token", "instructions_prompt"):
        values = [getattr(one, name).value for one in found]
        assert min(values) > 10_000
        assert max(values) <= 1.005 * min(values)
        assert {getattr(one, name).execution for one in found} == {"emulated"}


def test_a_longer_prompt_costs_more_and_a_token_hardly(tiny_bundle: Path) -> None:
    short, long = (cost([run(tiny_bundle, "arm64", GenerateRequest((3,) * n, 4))]) for n in (2, 48))
    assert short is not None
    assert long is not None
    assert long.instructions_prompt.number > 2 * short.instructions_prompt.number  # type: ignore[operator]
    assert long.instructions_per_token.number < 2 * short.instructions_per_token.number  # type: ignore[operator]


def test_warm_ups_are_left_out_and_every_counted_token_is_in(tiny_bundle: Path) -> None:
    found = cost([run(tiny_bundle, "arm64", GenerateRequest((5, 17), 4, warmup=1, repeats=2))])
    assert found is not None
    assert (found.instructions_prompt.n, found.instructions_per_token.n) == (2, 6)


def test_several_threads_are_not_counted(tiny_bundle: Path) -> None:
    result = run(tiny_bundle, "arm64", GenerateRequest((5, 17), 2, threads=2))
    assert result.instructions is None
    assert cost([result]) is None


def test_where_nothing_generated_or_nobody_counted_there_is_no_cost(tiny_bundle: Path) -> None:
    scored = open_device("arm64").run(tiny_bundle, ScoreRequest((1, 2)))
    assert scored.instructions is not None
    assert cost([scored, run(tiny_bundle, "host")]) is None


def test_counts_that_are_cut_off_or_foreign_are_none(tmp_path: Path) -> None:
    path = tmp_path / "counts"
    assert instructions.read_counts(path) is None
    for content in (b"", b"12\nthreads\n14\n", b"12\n-3\n", b"\xff\n"):
        path.write_bytes(content)
        assert instructions.read_counts(path) is None
    path.write_bytes(b"12\n34\n")
    assert instructions.read_counts(path) == (12, 34)


def test_an_emulator_without_plugins_is_recognised(tmp_path: Path) -> None:
    other = tmp_path / "qemu"
    other.write_text("#!/bin/sh\necho 'unknown option: -plugin' >&2\nexit 1\n", encoding="utf-8")
    other.chmod(0o755)
    assert instructions.plugin_for(other) is None
