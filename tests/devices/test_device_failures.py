"""Whatever a runner does wrong, the caller learns it in one line and nothing is left behind."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_device_events import GENERATE, script
from tiny_decoder import CONTEXT, VOCABULARY, write_bundle

from boa_edge.errors import BoaEdgeError, UsageError
from devices import GenerateRequest, ScoreRequest, onnxruntime_library
from devices.device import RunnerDevice
from devices.local import LocalTransport
from devices.paths import cache_directory
from devices.profile import Profile
from devices.workplace import LocalWorkplace, local_directory

SCORE = ScoreRequest(tokens=(1, 2))
SCORED = {"event": "score", "tokens": 2, "ns": 9}


class FakeWorkplace(LocalWorkplace):
    """Runs a Python text where the runner should run."""

    def __init__(self, directory: Path, text: str) -> None:
        super().__init__(directory)
        self._text = text

    def command(self, program: str, arguments: Sequence[str]) -> tuple[str, ...]:
        return (sys.executable, "-c", self._text, *arguments)


class FakeTransport(LocalTransport):
    def __init__(self, profile: Profile, text: str) -> None:
        super().__init__(profile)
        self._text = text

    @contextmanager
    def open(self) -> Iterator[LocalWorkplace]:
        with local_directory() as directory:
            yield FakeWorkplace(directory, self._text)


def device(text: str, silence: float = 20.0) -> RunnerDevice:
    profile = Profile(name="fake", description="a fake", transport="local", silence_limit_s=silence)
    return RunnerDevice(profile, FakeTransport(profile, text))


def printing(events: list[dict[str, Any]], then: str = "") -> str:
    """A program that prints these events, the start event with the installed version, and goes on with `then`."""
    for event in events:
        if event["event"] == "start":
            event["runtime_version"] = onnxruntime_library.version()
    lines = [json.dumps(event) for event in events]
    return f"import os, signal, subprocess, sys, time\nfor line in {lines!r}: print(line, flush=True)\n{then}\n"


def workplaces() -> list[Path]:
    return list((cache_directory() / "work").glob("run-*"))


@pytest.fixture(autouse=True)
def own_work_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Count left-over directories without those of a test that runs beside this one; keep the built runners."""
    shared = cache_directory()
    own = tmp_path / "cache"
    own.mkdir()
    for name in ("runners", "onnxruntime", "system"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(shared / name)
    monkeypatch.setenv("BOA_EDGE_CACHE", str(own))


@pytest.mark.parametrize(
    ("keep", "then", "found"),
    [
        (4, "os.kill(os.getpid(), signal.SIGSEGV)", "after 4 events, it was ended by SIGSEGV"),
        (4, "os.kill(os.getpid(), signal.SIGKILL)", "the memory ran out"),
        (4, "os.kill(os.getpid(), signal.SIGILL)", "profile's features and QEMU's CPU must agree"),
        (4, "print('libfoo not found', file=sys.stderr); sys.exit(127)", "Last words: libfoo not found"),
        (0, "", "its output ended after 0 events, before 'start'"),
        (-1, "", "before 'end'"),
        (99, "sys.exit(3)", "after its end event, it exited with 3"),
        (99, "print('{}')", "'{}' after its end event"),
        (4, "print('{}')", "unknown event None"),
        (99, 'print(\'{"event":"load","ns":1}\')', "after its end event"),
        (4, 'print(\'{"event":"load","ns":\', end=\'\')', "not a JSON object"),
        (4, "print('Loading...')", "printed 'Loading...'"),
        (4, "os.write(1, b'\\xff\\xfe\\n')", "not a JSON object"),
        (4, "print('x' * (1 << 21), end='', flush=True); time.sleep(60)", "a line of more than"),
        (1, 'print(\'{"event":"error","message":"no such op"}\'); sys.exit(1)', "the runner failed: no such op"),
    ],
)
def test_a_run_that_goes_wrong_says_how(tiny_bundle: Path, keep: int, then: str, found: str) -> None:
    events = script(GENERATE)
    text = printing(events[:keep], then)
    with pytest.raises(BoaEdgeError, match="device fake") as error:
        device(text).run(tiny_bundle, GENERATE)
    assert found in str(error.value)
    assert workplaces() == []


@pytest.mark.parametrize(
    "then",
    [
        "while True: print('garbage', flush=True); time.sleep(0.1)",
        "print('garbage', flush=True); time.sleep(600)",
        "print('garbage', end='', flush=True); os.close(1); time.sleep(600)",
    ],
)
def test_a_runner_that_does_not_end_once_it_is_refused_is_stopped(tiny_bundle: Path, then: str) -> None:
    started = time.monotonic()
    with pytest.raises(BoaEdgeError, match=r"printed 'garbage'.* Last words: sorry⟨U\+001B⟩\[2J"):
        device(printing([], f"print('sorry\\x1b[2J', file=sys.stderr, flush=True)\n{then}"), silence=600.0).run(
            tiny_bundle, GENERATE
        )
    assert time.monotonic() - started < 20
    assert workplaces() == []


@pytest.mark.parametrize(
    "then",
    ["time.sleep(600)", "os.close(1); time.sleep(600)", "print('{', end='', flush=True); time.sleep(600)"],
)
def test_a_hang_ends_within_the_limit_and_takes_its_children_along(
    tiny_bundle: Path, tmp_path: Path, then: str
) -> None:
    mark = tmp_path / "child"
    child = f"subprocess.Popen(['sh', '-c', 'sleep 3; touch {mark}'], stdout=subprocess.DEVNULL)\n"
    started = time.monotonic()
    with pytest.raises(BoaEdgeError, match=r"printed nothing for 1 s|did not end within 1 s") as error:
        device(printing(script(GENERATE)[:3], child + then), silence=1.0).run(tiny_bundle, GENERATE)
    assert time.monotonic() - started < 15
    assert "BOA_EDGE_SILENCE_LIMIT" in str(error.value)
    time.sleep(max(0.0, 4 - (time.monotonic() - started)))
    assert not mark.exists()


@pytest.mark.parametrize("limit", [1e10, float("inf")])
def test_a_limit_longer_than_the_system_can_wait_is_none(limit: float, tiny_bundle: Path) -> None:
    assert device(printing(script(GENERATE)), silence=limit).run(tiny_bundle, GENERATE).events[-1]["rc"] == 0


def test_silence_counts_between_lines_not_over_the_whole_run(tiny_bundle: Path) -> None:
    lines = [json.dumps(event) for event in script(GENERATE)]
    lines[0] = lines[0].replace("1.2.3", onnxruntime_library.version())
    text = f"import time\nfor line in {lines!r}: time.sleep(0.15); print(line, flush=True)\n"
    assert device(text, silence=1.2).run(tiny_bundle, GENERATE).events[-1] == {"event": "end", "rc": 0}


@pytest.mark.parametrize(
    ("write", "found"),
    [
        ("", "no logits file"),
        (f"open(path, 'wb').write(bytes({2 * VOCABULARY * 4 - 1}))", f"{2 * VOCABULARY * 4} bytes"),
        (f"open(path, 'wb').write(b'\\xff' * {2 * VOCABULARY * 4})", "not finite"),
    ],
)
def test_wrong_logits_are_refused(tiny_bundle: Path, write: str, found: str) -> None:
    path = "path = sys.argv[sys.argv.index('--logits') + 1]\n"
    with pytest.raises(BoaEdgeError, match=found):
        device(printing(script(SCORE), path + write)).run(tiny_bundle, SCORE)


def test_logits_come_back_as_they_were_written(tiny_bundle: Path) -> None:
    path = "path = sys.argv[sys.argv.index('--logits') + 1]\n"
    wanted = np.arange(2 * VOCABULARY, dtype="<f4").reshape(2, VOCABULARY)
    write = f"open(path, 'wb').write(bytes.fromhex('{wanted.tobytes().hex()}'))"
    result = device(printing(script(SCORE), path + write)).run(tiny_bundle, SCORE)
    assert result.logits is not None
    np.testing.assert_array_equal(result.logits, wanted)


def test_an_exception_of_the_listener_stops_the_run(tiny_bundle: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        device(printing(script(GENERATE), "time.sleep(600)")).run(tiny_bundle, GENERATE, stop)
    assert workplaces() == []


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        (GenerateRequest((), 1), "prompt is empty"),
        (ScoreRequest(()), "tokens is empty"),
        (GenerateRequest((1, VOCABULARY), 1), rf"prompt\[1\] is {VOCABULARY}"),
        (GenerateRequest((-1,), 1), r"prompt\[0\] is -1"),
        (GenerateRequest((1,), 0), "new_tokens is 0"),
        (GenerateRequest((1,), 1, repeats=0), "repeats is 0"),
        (GenerateRequest((1,), 1, warmup=-1), "warmup is -1"),
        (ScoreRequest((1,), threads=0), "threads is 0"),
        (ScoreRequest((1,), threads=1025), "threads is 1025; it must be at most 1024"),
        (ScoreRequest((1,), cores=(-1,)), "core -1"),
        (GenerateRequest((1,), 1, repeats=10**20), "it must be at most"),
        (ScoreRequest((1,) * (CONTEXT + 1)), f"context has {CONTEXT}"),
        (GenerateRequest((1,), CONTEXT + 1), f"context has {CONTEXT}"),
    ],
)
def test_a_request_that_does_not_fit_the_model_is_a_usage_error(
    tiny_bundle: Path, request_: GenerateRequest | ScoreRequest, found: str
) -> None:
    with pytest.raises(UsageError, match=found):
        device("").run(tiny_bundle, request_)


def _damage(bundle: Path, kind: str) -> None:
    runtime = json.loads((bundle / "runtime.json").read_text(encoding="utf-8"))
    if kind == "one byte":
        content = bytearray((bundle / "model.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / "model.onnx").write_bytes(content)
    elif kind == "truncated":
        (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:-1])
    elif kind.startswith("no "):
        (bundle / kind.removeprefix("no ")).unlink()
    elif kind == "escape":
        (bundle / "runtime.json").write_text(json.dumps({**runtime, "model": "../model.onnx"}), encoding="utf-8")
    elif kind == "field":
        del runtime["vocab_size"]
        (bundle / "runtime.json").write_text(json.dumps(runtime), encoding="utf-8")
    elif kind == "runtime":
        (bundle / "runtime.json").write_text(json.dumps({**runtime, "runtime": "abacus"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("one byte", "SHA-256 differs"),
        ("truncated", "its manifest says"),
        ("no model.onnx", "model file is missing"),
        ("no runtime.json", "runtime.json is missing"),
        ("no manifest.json", "manifest is missing"),
        ("escape", "must be the name of a file"),
        ("field", "'vocab_size' is missing"),
        ("runtime", "no runner for runtime 'abacus'"),
    ],
)
def test_a_damaged_bundle_is_refused_before_anything_runs(tmp_path: Path, kind: str, found: str) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    _damage(bundle, kind)
    with pytest.raises(BoaEdgeError, match=found):
        device("").run(bundle, GENERATE)


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    old = cache_directory() / "work" / "run-dead"
    old.mkdir(parents=True)
    with local_directory() as first, local_directory() as second:
        assert not old.exists()
        assert first.is_dir()
        assert second.is_dir()
    assert workplaces() == []
