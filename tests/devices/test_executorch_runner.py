"""The native runner with its own attention computes what the Python runtime computes with the official operators."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.runtime import Runtime
from numpy.typing import NDArray
from tiny_llm import ATTENTION, QUANTIZED, VOCABULARY, Shape, build_program, write_bundle

from boa_edge.errors import BoaEdgeError, UsageError
from devices import GenerateRequest, RunResult, ScoreRequest, open_device
from devices.binaries import RUNNERS, files_for
from runtime_tests.profiling import read_profile

EMULATED = [pytest.param(name, marks=pytest.mark.emulated) for name in ("arm64", "arm64-a53", "arm64-i8mm")]
DEVICES = ["host", *EMULATED]
SHAPES = {"attention": ATTENTION, "quantized": QUANTIZED}
# Float programs differ by the order of sums only. A tie of int8 rounding may fall otherwise on another CPU.
TOLERANCE = {"attention": 2e-5, "quantized": 2e-3}

Logits = NDArray[np.float32]


@pytest.fixture(scope="module")
def programs() -> dict[str, bytes]:
    return {name: build_program(shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def bundles(programs: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("llm")
    return {name: write_bundle(base / name, programs[name], shape) for name, shape in SHAPES.items()}


def text(shape: Shape, count: int | None = None) -> tuple[int, ...]:
    tokens = np.random.default_rng(5).integers(0, VOCABULARY, shape.context).tolist()
    return tuple(tokens[:count])


@cache
def reference(path: Path) -> Any:
    """The Python runtime's `forward`. It is loaded by path: a program must outlive its methods."""
    program = Runtime.get().load_program(path / "model.pte")
    return program, program.load_method("forward")


def reference_step(path: Path, tokens: tuple[int, ...], start: int) -> Logits:
    """Logits [vocabulary] of the last of `tokens`, which stand at `start`."""
    _, method = reference(path)
    (logits,) = method.execute([torch.tensor([tokens]), torch.tensor([start])])
    return logits.numpy()[0].copy()


def reference_logits(path: Path, tokens: tuple[int, ...]) -> Logits:
    """Logits [n, vocabulary], token by token."""
    return np.stack([reference_step(path, (token,), index) for index, token in enumerate(tokens)])


def reference_greedy(path: Path, shape: Shape, prompt: tuple[int, ...], count: int, piece: int) -> list[int]:
    """The prompt in pieces, then token by token."""
    for start in range(0, len(prompt), piece):
        logits = reference_step(path, prompt[start : start + piece], start)
    found = [int(logits.argmax())]
    while len(found) < count:
        found.append(int(reference_step(path, (found[-1],), len(prompt) + len(found) - 1).argmax()))
    return found


def close(found: Logits, wanted: Logits, name: str) -> None:
    assert float(np.ptp(wanted)) > 1  # else the tolerance would say little
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE[name] * float(np.abs(wanted).max()))


def ids(result: RunResult, run: int = 0) -> list[int]:
    return [event["id"] for event in result.events if event["event"] == "token" and event["run"] == run]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(SHAPES))
def test_scored_logits_equal_the_python_runtimes(bundles: dict[str, Path], name: str, device: str) -> None:
    """Over the whole context: every layer's cache is filled, and attention goes over several tiles of keys."""
    tokens = text(SHAPES[name])
    result = open_device(device).run(bundles[name], ScoreRequest(tokens))
    assert result.logits is not None
    close(result.logits, reference_logits(bundles[name], tokens), name)
    start = result.events[0]
    assert start["attention"] == ("boa-edge neon" if device != "host" else start["attention"])
    assert start["attention"].startswith("boa-edge ")
    assert {"boa-edge-runner-executorch", "libexecutorch.so", "libexecutorch_backend_xnnpack.so"} <= set(result.files)
    assert result.execution == ("measured" if device == "host" else "emulated")


@pytest.mark.parametrize("device", DEVICES)
def test_a_long_prompt_in_pieces_gives_the_python_runtimes_tokens(bundles: dict[str, Path], device: str) -> None:
    path, prompt, count = bundles["attention"], text(ATTENTION, 130), 20
    result = open_device(device).run(path, GenerateRequest(prompt, count, warmup=1, repeats=1))
    wanted = reference_greedy(path, ATTENTION, prompt, count, piece=ATTENTION.prefill)
    assert len(set(wanted)) > 4  # else the test would hardly notice a broken cache
    assert ids(result, 0) == ids(result, 1) == wanted


def test_the_size_of_the_pieces_does_not_matter(bundles: dict[str, Path], tmp_path: Path, runner: Path) -> None:
    """One token at a time, odd pieces, and all at once: the cache holds the same, so the next tokens are the same."""
    prompt = text(ATTENTION, 79)
    found = {}
    for piece in (1, 7, 64, 80):
        command = ("--model", str(bundles["attention"] / "model.pte"), "--tokens", tokens_file(tmp_path, prompt))
        code, events = run(runner, *command, "--mode", "generate", "--new-tokens", "12", "--prefill", str(piece))
        assert code == 0
        found[piece] = [event["id"] for event in events if event["event"] == "token"]
    assert len({tuple(tokens) for tokens in found.values()}) == 1
    assert found[7] == reference_greedy(bundles["attention"], ATTENTION, prompt, 12, piece=79)


def test_scoring_and_generation_see_the_same_logits(bundles: dict[str, Path]) -> None:
    device, prompt = open_device("host"), text(QUANTIZED, 21)
    tokens = ids(device.run(bundles["quantized"], GenerateRequest(prompt, 10)))
    scored = device.run(bundles["quantized"], ScoreRequest((*prompt, *tokens)))
    assert scored.logits is not None
    assert scored.logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == tokens


def test_the_number_of_threads_changes_nothing(bundles: dict[str, Path]) -> None:
    tokens = text(ATTENTION)
    one, two = (open_device("host").run(bundles["attention"], ScoreRequest(tokens, threads=n)) for n in (1, 2))
    assert one.logits is not None
    assert two.logits is not None
    np.testing.assert_array_equal(one.logits, two.logits)
    assert two.events[0]["threads"] == 2
    # A prompt is enough work for attention to be shared between the threads.
    request = GenerateRequest(text(ATTENTION, 130), 20)
    runs = [open_device("host").run(bundles["attention"], replace(request, threads=n)) for n in (1, 2, 3)]
    assert ids(runs[0]) == ids(runs[1]) == ids(runs[2])


@pytest.mark.parametrize("device", ["host", EMULATED[0]])
def test_a_profile_counts_every_call(bundles: dict[str, Path], tmp_path: Path, device: str) -> None:
    request = GenerateRequest(
        text(QUANTIZED, 20), 5, profile=True
    )  # two calls for the prompt, four for the tokens after
    result = open_device(device).run(bundles["quantized"], request)
    assert result.profile is not None
    (tmp_path / "p.etdump").write_bytes(result.profile)
    profile = read_profile(tmp_path / "p.etdump", "executorch", result.execution)
    calls = {entry.name: entry.calls for entry in profile.operators}
    assert calls["llama::custom_sdpa"] == 6
    assert calls["llama::update_cache"] == 2 * 6
    assert sum(entry.ns for entry in profile.operators) + profile.rest_ns == profile.total_ns
    linears = [entry for entry in profile.operators if "QB4W" in entry.name]
    assert linears
    assert all(entry.delegated for entry in linears)
    assert sum(entry.calls for entry in linears) == 3 * 6
    assert profile.execution == ("measured" if device == "host" else "emulated")


def test_without_being_asked_there_is_no_profile(bundles: dict[str, Path]) -> None:
    assert open_device("host").run(bundles["quantized"], GenerateRequest((1,), 1)).profile is None


@pytest.mark.parametrize("content", [b"", b"no profile", b"\x18\0\0\0ED00" + bytes(64)])
def test_a_damaged_profile_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.etdump").write_bytes(content)
    with pytest.raises(BoaEdgeError, match=r"p\.etdump"):
        read_profile(tmp_path / "p.etdump", "executorch", "measured")


@pytest.mark.parametrize(
    "request_", [GenerateRequest((1, 2), 64), ScoreRequest((1,) * 65), ScoreRequest((VOCABULARY,))]
)
def test_what_does_not_fit_the_model_is_refused_before_anything_runs(
    bundles: dict[str, Path], request_: GenerateRequest | ScoreRequest
) -> None:
    with pytest.raises(UsageError, match=r"context has 64|vocabulary has 97"):
        open_device("host").run(bundles["quantized"], request_)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"prefill_length": None}, "needs a 'prefill_length'"),
        ({"prefill_length": 0}, "must be positive"),
        ({"prefill_length": 17}, "takes at most 16 tokens at once"),
        ({"form": "qdq"}, "'form' is \"qdq\"; it must be llm"),
        ({"vocab_size": VOCABULARY + 1}, "logits file of"),
        ({"session_config": {"a": "b"}}, "has no settings"),
        ({"runtime": "tensorflow"}, "no runner for runtime 'tensorflow'"),
    ],
)
def test_a_bundle_that_disagrees_with_its_program_is_one_error(
    programs: dict[str, bytes], tmp_path: Path, changes: dict[str, object], found: str
) -> None:
    bundle = write_bundle(tmp_path / "bundle", programs["quantized"], QUANTIZED, **changes)
    with pytest.raises(BoaEdgeError) as error:
        open_device("host").run(bundle, ScoreRequest((1, 2)))
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's runner with its libraries beside it."""
    directory = tmp_path_factory.mktemp("runner")
    for name, source in files_for(RUNNERS["executorch"], "host").items():
        (directory / name).symlink_to(source) if name.endswith(".so") else (directory / name).write_bytes(
            source.read_bytes()
        )
    program = directory / RUNNERS["executorch"].program
    program.chmod(0o755)
    return program


def run(runner: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run([str(runner), *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def tokens_file(directory: Path, tokens: tuple[int, ...]) -> str:
    path = directory / "tokens.bin"
    np.asarray(tokens, "<i8").tofile(path)
    return str(path)


def damaged(program: bytes, how: str) -> bytes | None:
    random = np.random.default_rng(0).bytes(5000)
    half = len(program) // 2
    return {
        "missing": None,
        "empty": b"",
        "text": b"not a program",
        "noise": random,
        "noise inside": program[:64] + random + program[64 + len(random) :],
        "no head": program[64:],
        "half": program[:half],
        "one byte short": program[:-1],
    }[how]


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize(
    "how", ["missing", "empty", "text", "noise", "noise inside", "no head", "half", "one byte short"]
)
def test_a_damaged_program_is_one_error_event(
    runner: Path, programs: dict[str, bytes], tmp_path: Path, name: str, how: str
) -> None:
    content = damaged(programs[name], how)
    path = tmp_path / "model.pte"
    if content is not None:
        path.write_bytes(content)
    code, events = run(
        runner,
        "--model",
        str(path),
        "--tokens",
        tokens_file(tmp_path, (1, 2)),
        "--mode",
        "generate",
        "--new-tokens",
        "1",
    )
    assert code == 1
    assert [event["event"] for event in events] == ["start", "error"]
    assert len(events[-1]["message"]) > 20


@pytest.mark.parametrize(
    ("arguments", "tokens", "found"),
    [
        (("--new-tokens", "1"), (1, VOCABULARY), f"token 1 is {VOCABULARY}; the vocabulary has {VOCABULARY} entries"),
        (("--new-tokens", "1"), (-1,), "token 0 is -1"),
        (("--new-tokens", "64"), (1, 2), "65 positions are asked for; the program's cache has 64"),
        (("--new-tokens", "1", "--form", "qdq"), (1,), "--form is 'qdq'; it must be llm"),
        (("--new-tokens", "1", "--prefill", "0"), (1,), "--prefill is '0'"),
        (("--new-tokens", "1", "--config", "a=b"), (1,), "no settings"),
    ],
)
def test_a_wrong_request_is_one_error_event(
    runner: Path,
    bundles: dict[str, Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
    tokens: tuple[int, ...],
    found: str,
) -> None:
    model = str(bundles["quantized"] / "model.pte")
    command = ("--model", model, "--tokens", tokens_file(tmp_path, tokens), "--mode", "generate", *arguments)
    code, events = run(runner, *command)
    assert code == 1
    assert events[-1]["event"] == "error"
    assert found in events[-1]["message"]


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"get_vocab_size": 96, "get_max_seq_len": 81}, "get_vocab_size says 96, the logits have 97 entries"),
        # A program that claims a longer cache than it has: the kernel itself must stop it.
        ({"get_max_context_len": 400}, "llama::update_cache: positions 160 to 161 are outside a cache of 160"),
    ],
)
def test_a_program_that_says_wrong_things_of_itself_is_an_error(
    runner: Path, tmp_path: Path, metadata: dict[str, int], found: str
) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(build_program(ATTENTION, **metadata))
    tokens = tokens_file(tmp_path, (*text(ATTENTION), 1))
    logits = str(tmp_path / "logits.bin")
    code, events = run(runner, "--model", str(path), "--tokens", tokens, "--mode", "score", "--logits", logits)
    assert code == 1
    assert events[-1]["event"] == "error"
    assert found in events[-1]["message"]
