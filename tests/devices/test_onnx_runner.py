"""The native runner computes what ONNX Runtime computes from Python, here and on the emulated device."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from tiny_decoder import CONTEXT, HEAD, KV_HEADS, LAYERS, VOCABULARY, build_model, write_bundle

from boa_edge.errors import BoaEdgeError, UsageError
from devices import GenerateRequest, ScoreRequest, open_device
from devices.binaries import RUNNERS, files_for
from runtime_tests.profiling import read_profile

EMULATED = [pytest.param(name, marks=pytest.mark.emulated) for name in ("arm64", "arm64-a53")]
DEVICES = ["host", *EMULATED]
PROMPT = (5, 17, 3, 88, 41)
NEW = 12


@cache
def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])


def reference_logits(bundle: Path, tokens: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of the whole sequence at once, from Python."""
    empty = np.zeros((1, KV_HEADS, 0, HEAD), np.float32)
    count = len(tokens)
    inputs: dict[str, Any] = {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
    }
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            inputs[f"past_key_values.{layer}.{kind}"] = empty
    (logits,) = session(bundle).run(["logits"], inputs)
    return np.asarray(logits[0], dtype=np.float32)


def reference_greedy(bundle: Path, prompt: tuple[int, ...], count: int) -> list[int]:
    """Without a cache: every token from a new pass over the whole sequence."""
    tokens = prompt
    for _ in range(count):
        tokens = (*tokens, int(reference_logits(bundle, tokens)[-1].argmax()))
    return list(tokens[len(prompt) :])


@pytest.mark.parametrize("name", DEVICES)
def test_greedy_tokens_with_the_cache_equal_those_without(tiny_bundle: Path, name: str) -> None:
    seen: list[dict[str, Any]] = []
    request = GenerateRequest(PROMPT, NEW, warmup=1, repeats=2)
    result = open_device(name).run(tiny_bundle, request, seen.append)
    wanted = reference_greedy(tiny_bundle, PROMPT, NEW)
    assert len(set(wanted)) > 3  # else the test would hardly notice a broken cache
    for run in range(3):
        assert [event["id"] for event in result.events if event.get("run") == run and "id" in event] == wanted
    assert tuple(seen) == result.events
    assert result.logits is None


@pytest.mark.parametrize("name", DEVICES)
def test_scored_logits_equal_onnx_runtimes(tiny_bundle: Path, name: str) -> None:
    result = open_device(name).run(tiny_bundle, ScoreRequest(PROMPT))
    assert result.logits is not None
    assert result.logits.dtype == np.float32
    np.testing.assert_allclose(result.logits, reference_logits(tiny_bundle, PROMPT), rtol=1e-4, atol=1e-4)
    assert result.execution == ("measured" if name == "host" else "emulated")
    memory = next(event for event in result.events if event["event"] == "memory")
    assert memory["peak_rss_bytes"] >= memory["rss_bytes"] > 1 << 20
    assert {"boa-edge-runner-onnx", "libonnxruntime.so"} <= set(result.files)
    assert name == "host" or "ld-linux-aarch64.so.1" in result.files
    assert all(len(digest) == 64 for digest in result.files.values())


@pytest.mark.parametrize("name", ["host", EMULATED[0]])
def test_a_sequence_as_long_as_the_context_and_several_threads_work(tiny_bundle: Path, name: str) -> None:
    tokens = tuple(np.random.default_rng(3).integers(0, VOCABULARY, CONTEXT).tolist())
    result = open_device(name).run(tiny_bundle, ScoreRequest(tokens, threads=2))
    assert result.logits is not None
    np.testing.assert_allclose(result.logits, reference_logits(tiny_bundle, tokens), rtol=1e-4, atol=1e-4)
    assert result.events[0]["threads"] == 2


@pytest.mark.parametrize("name", ["host", EMULATED[0]])
def test_external_weights_travel_along(tmp_path: Path, tiny_bundle: Path, name: str) -> None:
    bundle = write_bundle(tmp_path / "external", external=True)
    assert (bundle / "model.onnx.data").stat().st_size > (bundle / "model.onnx").stat().st_size
    result = open_device(name).run(bundle, ScoreRequest(PROMPT))
    assert result.logits is not None
    np.testing.assert_allclose(result.logits, reference_logits(tiny_bundle, PROMPT), rtol=1e-4, atol=1e-4)


def test_the_fingerprint_is_json_and_names_the_device() -> None:
    for name in ("host", "arm64"):
        document = json.loads(json.dumps(open_device(name).fingerprint()))
        assert document["name"] == name
        assert document["cores"] >= 1


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's runner with its library beside it."""
    directory = tmp_path_factory.mktemp("runner")
    for name, source in files_for(RUNNERS["onnx"], "host").items():
        (directory / name).symlink_to(source) if name.endswith(".so") else (directory / name).write_bytes(
            source.read_bytes()
        )
    (directory / RUNNERS["onnx"].program).chmod(0o755)
    return directory / RUNNERS["onnx"].program


def run(runner: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run([str(runner), *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def tokens_file(directory: Path, tokens: tuple[int, ...]) -> str:
    path = directory / "tokens.bin"
    np.asarray(tokens, "<i8").tofile(path)
    return str(path)


GENERATE = ("--mode", "generate", "--new-tokens", "1")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((), "--model is missing"),
        (("--model",), "--model needs a value"),
        (("--model", "m", "--model", "m"), "given twice"),
        (("--wild", "1"), "unknown argument '--wild'"),
        (("--model", "m", "--tokens", "t", "--mode", "sing"), "'sing'"),
        (("--model", "m", "--tokens", "t", "--mode", "generate"), "--new-tokens is needed with --mode generate"),
        (("--model", "m", "--tokens", "t", "--mode", "score"), "--logits is needed with --mode score"),
        (("--model", "m", "--tokens", "t", *GENERATE, "--logits", "f"), "--logits has no meaning"),
        (("--model", "m", "--tokens", "t", "--mode", "score", "--logits", "f", "--repeats", "2"), "--repeats has no"),
        (("--model", "m", "--tokens", "t", "--mode", "generate", "--new-tokens", "0"), "--new-tokens is '0'"),
        (("--threads", "two"), "--threads is 'two'"),
        (("--threads", "1x"), "--threads is '1x'"),
        (("--repeats", "99999999999999999999"), "--repeats is"),
        (("--config", "novalue"), "it must be KEY=VALUE"),
        (("--config", "=x"), "it must be KEY=VALUE"),
    ],
)
def test_a_wrong_command_line_is_one_error_event(runner: Path, arguments: tuple[str, ...], found: str) -> None:
    code, events = run(runner, *arguments)
    assert code != 0
    assert [event["event"] for event in events] == ["error"]
    assert found in events[0]["message"]


@pytest.mark.parametrize(("content", "found"), [(b"", "0 bytes"), (b"1234567", "7 bytes"), (None, "cannot be opened")])
def test_a_torn_token_file_is_an_error(
    runner: Path, tiny_bundle: Path, tmp_path: Path, content: bytes | None, found: str
) -> None:
    path = tmp_path / "tokens.bin"
    if content is not None:
        path.write_bytes(content)
    code, events = run(runner, "--model", str(tiny_bundle / "model.onnx"), "--tokens", str(path), *GENERATE)
    assert code != 0
    assert found in events[-1]["message"]


@pytest.mark.parametrize("token", [-1, VOCABULARY, 1 << 40])
def test_a_token_outside_the_vocabulary_is_an_error(
    runner: Path, tiny_bundle: Path, tmp_path: Path, token: int
) -> None:
    tokens = tokens_file(tmp_path, (1, token))
    code, events = run(runner, "--model", str(tiny_bundle / "model.onnx"), "--tokens", tokens, *GENERATE)
    assert code != 0
    assert [event["event"] for event in events] == ["start", "load", "error"]
    assert f"token 1 is {token}; the vocabulary has {VOCABULARY} entries" in events[-1]["message"]


def _without_positions(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["input_ids" if name == "position_ids" else name for name in node.input]
    kept = [item for item in model.graph.input if item.name != "position_ids"]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _strange_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("beam", onnx.TensorProto.INT64, ["batch"]))


def _no_cache_out(model: onnx.ModelProto) -> None:
    model.graph.output.pop()


def _half_cache(model: onnx.ModelProto) -> None:
    model.graph.input[-1].type.tensor_type.shape.dim[1].dim_param = "heads"


def _not_finite(model: onnx.ModelProto) -> None:
    table = next(item for item in model.graph.initializer if list(item.dims) == [VOCABULARY, 16])
    values = onnx.numpy_helper.to_array(table).copy()
    values[7] = np.nan
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_without_positions, "inputs input_ids, attention_mask and position_ids"),
        (_strange_input, "'beam'"),
        (_no_cache_out, f"no output 'present.{LAYERS - 1}.value'"),
        (_half_cache, "must be fixed numbers"),
        (_not_finite, "not finite"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_an_error(runner: Path, tmp_path: Path, change: Any, found: str) -> None:
    model = build_model()
    change(model)
    onnx.save(model, tmp_path / "model.onnx")
    tokens = tokens_file(tmp_path, (1, 2))
    code, events = run(runner, "--model", str(tmp_path / "model.onnx"), "--tokens", tokens, *GENERATE)
    assert code != 0
    assert events[-1]["event"] == "error"
    assert found in events[-1]["message"]


def test_messages_with_any_bytes_are_json(runner: Path) -> None:
    for name in (b'quote " back \\ line \n tab \t', b"\xff\xfe", "ünïcode ☃ 🦉".encode(), b"\xed\xa0\x80", b"\x01\x7f"):
        done = subprocess.run([bytes(runner), b"--" + name, b"1"], capture_output=True, timeout=60, check=False)
        event = json.loads(done.stdout.decode("utf-8"))
        assert event["event"] == "error"
        if name.startswith("ü".encode()):
            assert name.decode() in event["message"]


def test_logits_on_a_full_disk_are_an_error(runner: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    tokens = tokens_file(tmp_path, (1, 2))
    arguments = ("--model", str(tiny_bundle / "model.onnx"), "--tokens", tokens, "--mode", "score")
    code, events = run(runner, *arguments, "--logits", "/dev/full")
    assert code != 0
    assert "disk full" in events[-1]["message"]


def test_an_unseen_event_is_a_failed_run(runner: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    command = [str(runner), "--model", str(tiny_bundle / "model.onnx"), "--tokens", tokens_file(tmp_path, (1, 2))]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, *GENERATE], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode != 0


def test_a_run_stays_on_the_cores_that_it_is_given(tiny_bundle: Path) -> None:
    core = min(os.sched_getaffinity(0))
    here = open_device("host")
    request = GenerateRequest(PROMPT, NEW, threads=2)
    free, pinned = here.run(tiny_bundle, request), here.run(tiny_bundle, replace(request, cores=(core,)))
    assert free.events[0]["cores"] == len(os.sched_getaffinity(0))
    assert pinned.events[0]["cores"] == 1
    assert [event["id"] for event in pinned.events if event["event"] == "token"] == [
        event["id"] for event in free.events if event["event"] == "token"
    ]
    with pytest.raises(BoaEdgeError, match="--cores: the system refuses"):
        here.run(tiny_bundle, replace(request, cores=(1000,)))
    with pytest.raises(UsageError, match="core 5000"):
        here.run(tiny_bundle, replace(request, cores=(5000,)))


@pytest.mark.parametrize("name", ["host", EMULATED[0]])
def test_a_profile_counts_every_call(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    """One prompt and four tokens after it: every operator of the graph five times, none slower than all together."""
    result = open_device(name).run(tiny_bundle, GenerateRequest(PROMPT, 5, profile=True))
    assert result.profile is not None
    path = tmp_path / "p.json"
    path.write_bytes(result.profile)
    profile = read_profile(path, "onnx", result.execution)
    calls = {entry.name: entry.calls for entry in profile.operators}
    assert calls
    assert all(count % 5 == 0 for count in calls.values())
    optimized = tmp_path / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(tiny_bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    products = [node for node in onnx.load(optimized).graph.node if node.op_type in ("MatMul", "Gemm", "FusedMatMul")]
    assert products
    assert sum(calls.get(kind, 0) for kind in {node.op_type for node in products}) == 5 * len(products)
    assert sum(entry.ns for entry in profile.operators) + profile.rest_ns == profile.total_ns
    assert not any(entry.delegated for entry in profile.operators)
    assert open_device(name).run(tiny_bundle, GenerateRequest(PROMPT, 1)).profile is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'[{"cat": "Node"}]',
        b'[{"cat": "Session", "name": "model_run", "dur": -1}]',
        b'[{"cat": "Session", "name": "model_run", "dur": 0}]',
    ],
)
def test_a_damaged_profile_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(BoaEdgeError, match=r"p\.json: the runtime's profile") as caught:
        read_profile(tmp_path / "p.json", "onnx", "measured")
    assert "\n" not in str(caught.value)
