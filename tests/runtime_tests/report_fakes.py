"""A bundle that no runtime could load, and a device that answers without loading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from boa_edge.files import sha256_file
from devices.contract import Event, Execution, GaugeSample, GenerateRequest, RunResult, ScoreRequest
from runtime_tests import Report, measure

VOCABULARY = 64
POSITIONS = 40
PROMPT = 8
GREEDY = 32
RECIPE = {
    "method": "boa",
    "weights": {"bits": 4, "group_size": 32, "symmetric": True},
    "embedding": {"bits": 8, "group_size": 32},
    "scale_search": "hessian",
    "round_scales": True,
    "damping": 0.01,
    "calibration": {"sequences": 64, "sequence_length": 512, "held_out_sequences": 8},
    "seed": 0,
}
RECIPE_A8 = {**RECIPE, "activations": {"scheme": "per_block", "bits": 8, "budget": 0.1}, "transforms": ["smooth"]}
HOSTILE = "<script>alert(1)</script><img/src=x>&\u202e'\""
BLOCKS = 30
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def words(hostile: str | None = None) -> dict[str, int]:
    """The vocabulary: every id a word; id 5 is `hostile` where one is given."""
    names = [f"word{index}" for index in range(VOCABULARY)]
    if hostile is not None:
        names[5] = hostile
    return {name: index for index, name in enumerate(names)}


def provenance() -> dict[str, Any]:
    """What `quantize` records, whole."""
    noise = np.random.default_rng(3)

    def row(method: str, recipe: str | None, scores: tuple[float, float, float], cost: list[Any]) -> dict[str, Any]:
        perplexity, kl, top1 = scores
        return {
            "method": method,
            "recipe": recipe,
            "perplexity": perplexity,
            "kl": kl,
            "top1": top1,
            "payload_bytes": cost[0],
            "seconds": cost[1],
            "peak_mb": cost[2],
        }

    return {
        "source": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "files": {"model.gguf": "ab" * 32}},
        "calibration": {"source": "self", "sequences": 32, "sequence_length": 512, "tokens": 16384, "seed": 0},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "boa-edge": "0.1.0"},
        "seed": 0,
        "method": "boa",
        "seconds": 301.5,
        "peak_mb": 2900.0,
        "layers": [
            {
                "name": f"model.layers.{block}.{projection}",
                "method": "boa" if projection[10:11] in "qkv" else "gptq",
                "bits": 4,
                "group_size": 32,
                "loss": float(noise.uniform(0.1, 3.0)),
                "relative_loss": float(10 ** noise.uniform(-4.5, -1.5)),
                "seconds": float(noise.uniform(0.1, 0.9)),
            }
            for block in range(BLOCKS)
            for projection in PROJECTIONS
        ],
        "comparison": [
            row("original", None, (28.8, 0.0, 1.0), [538_000_000, None, None]),
            row("rtn", "w4g32-rtn", (33.1, 0.121, 0.81), [98_300_000, 2.1, 1200.0]),
            row("gptq", "w4g32-gptq", (30.2, 0.058, 0.87), [98_300_000, 120.5, 2400.0]),
            row("boa", "w4g32a8-boa-rotate-smooth", (29.9, 0.049, 0.885), [98_300_000, 301.5, 2900.0]),
        ],
        "evaluation": {"source": "wikitext2-test.txt", "tokens": 8192, "sequence_length": 512},
    }


def activations(blocks: int = BLOCKS) -> dict[str, Any]:
    """What `quantize` records of a recipe with int8 activations and a transform."""
    noise = np.random.default_rng(5)
    modules = [f"model.layers.{block}.{projection}" for block in range(blocks) for projection in PROJECTIONS]
    costs = {name: float(10 ** noise.uniform(-6, -3)) for name in [*modules, "lm_head"]}
    kept = [f"model.layers.{block}.mlp.down_proj" for block in sorted({min(1, blocks - 1), blocks - 1})]
    costs |= {name: 0.05 / (1 + place) for place, name in enumerate(kept)}
    return {
        "transforms": {"names": ["smooth"], "notes": ["smooth q_k: left out, heads are normed"]},
        "activations": {
            "weights_kl": 0.0492,
            "all_int8_kl": 0.0911,
            "kl": 0.0537,
            "kept": kept,
            "costs": dict(sorted(costs.items(), key=lambda item: -item[1])),
        },
        "outliers": {"before": _outliers(noise, blocks, 400.0), "after": _outliers(noise, blocks, 12.0)},
    }


def _outliers(noise: np.random.Generator, blocks: int, spike: float) -> list[dict[str, Any]]:
    """Attention and MLP raised in all blocks, and `down` far above them in two."""

    def row(layer: int, place: str, height: float) -> dict[str, Any]:
        maximum = height * float(10 ** noise.uniform(-0.15, 0.15))
        return {"layer": layer, "place": place, "maximum": maximum, "typical": 0.5, "kurtosis": 3 + maximum**1.6}

    raised = {"attention": spike / 10, "o": 2.0, "mlp": spike / 20}
    rows = []
    for layer in range(blocks):
        rows += [row(layer, place, height) for place, height in raised.items()]
        rows.append(row(layer, "down", 40 * spike if layer in (1, blocks - 1) else spike / 4))
    return [*rows, row(-1, "head", spike / 3)]


def reference_tensors() -> dict[str, NDArray[Any]]:
    """A seeded reference: the quantized logits are the original's with a little noise."""
    noise = np.random.default_rng(7)
    tokens = noise.integers(0, VOCABULARY, POSITIONS)
    original = noise.normal(size=(POSITIONS, VOCABULARY)) * 1.5
    original[np.arange(POSITIONS - 1), tokens[1:]] += 3.0
    quantized = original + noise.normal(size=original.shape) * 0.2
    greedy = noise.integers(0, VOCABULARY, GREEDY)
    changed = greedy.copy()
    changed[20:] = (changed[20:] + 1) % VOCABULARY
    return {
        "tokens": tokens,
        "original_logits": original.astype(np.float16),
        "quantized_logits": quantized.astype(np.float32),
        "prompt": noise.integers(0, VOCABULARY, PROMPT),
        "original_greedy": greedy,
        "quantized_greedy": changed,
    }


def make_bundle(
    path: Path,
    *,
    hostile: str | None = None,
    tensors: dict[str, NDArray[Any]] | None = None,
    origin: dict[str, Any] | None = None,
    activations: str = "int8",
    recipe: dict[str, Any] | None = None,
) -> Path:
    """Write a bundle whose manifest is right (docs/contracts.md)."""
    reference = path / "reference"
    reference.mkdir(parents=True)
    (path / "model.onnx").write_bytes(b"\x08\x0a" * 4000)
    (path / "model.onnx.data").write_bytes(b"\x5a" * 300_000)
    runtime = {
        "schema_version": 1,
        "runtime": "onnx",
        "model": "model.onnx",
        "activations": activations,
        "session_config": {"session.qdq_matmulnbits_accuracy_level": "4"},
        "context_length": 2048,
        "eos_token_ids": [2],
        "bos_token_id": 1,
        "vocab_size": VOCABULARY,
        "layers": BLOCKS,
        "kv_heads": 3,
        "head_dim": 64,
    }
    (path / "runtime.json").write_text(json.dumps(runtime))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32}))
    (path / "generation_config.json").write_text("{}")
    write_tokenizer(path / "tokenizer.json", words(hostile))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    save_file(tensors or reference_tensors(), reference / "reference.safetensors")
    (reference / "recipe.yaml").write_text(yaml.safe_dump(recipe or RECIPE, sort_keys=False))
    if origin is not None:
        (reference / "provenance.json").write_text(json.dumps(origin))
    write_manifest(path)
    return path


def shorten(bundle: Path, context: int) -> None:
    """Give a bundle's program another context."""
    document = json.loads((bundle / "runtime.json").read_text())
    (bundle / "runtime.json").write_text(json.dumps(document | {"context_length": context}))
    write_manifest(bundle)


def write_tokenizer(path: Path, vocabulary: dict[str, int]) -> None:
    """A word-level tokenizer that joins words by spaces."""
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0"},
    }
    path.write_text(json.dumps(document))


def write_manifest(path: Path) -> None:
    """List every file with its size and hash."""
    files = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name != "manifest.json":
            role = "reference" if name.startswith("reference/") else "runtime"
            files[name] = {"size": file.stat().st_size, "sha256": sha256_file(file), "role": role}
    manifest = {"schema_version": 1, "created_by": {"boa-edge": "0.1.0"}, "recipe": RECIPE, "files": files}
    (path / "manifest.json").write_text(json.dumps(manifest))


@dataclass
class FakeDevice:
    """Implements `devices.contract.Device` with seeded answers.

    Attributes:
        logits: what a score of the reference's n tokens answers; cut to the request, repeated where that is longer.
        greedy: what it generates.
        alter: changes the events of a generation before they are handed over.
        facts: what its fingerprint has besides.
    """

    logits: NDArray[np.float32]
    greedy: NDArray[np.int64]
    execution: Execution = "emulated"
    name: str = "arm64"
    alter: Callable[[list[Event]], list[Event]] = lambda events: events
    memory: dict[str, Any] = field(default_factory=lambda: {"peak_rss_bytes": 412_000_000, "rss_bytes": 390_000_000})
    requests: list[GenerateRequest | ScoreRequest] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    gauge: tuple[GaugeSample, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "machine": "aarch64",
            "cpu": {"model": "Cortex-A76", "features": ["fp", "asimd", "asimddp"], "cores": 2},
            "os": "Linux 6.1 (emulated by qemu-aarch64 7.2)",
            "governor": None,
            **self.facts,
        }

    def run(
        self,
        bundle: Path,
        request: GenerateRequest | ScoreRequest,
        on_event: Callable[[Event], None] | None = None,
    ) -> RunResult:
        self.requests.append(request)
        generate = isinstance(request, GenerateRequest)
        events = self._generate(request) if isinstance(request, GenerateRequest) else self._score(request)
        for event in events:
            if on_event is not None:
                on_event(event)
        logits = None
        if isinstance(request, ScoreRequest):
            rows = np.arange(len(request.tokens)) % len(self.logits)
            logits = self.logits[rows]
            place = len(request.tokens) - PROMPT
            if request.tokens[:PROMPT] == tuple(reference_tensors()["prompt"].tolist()):
                logits[-1, self.greedy[place]] = logits[-1].max() + 0.04
        return RunResult(
            events=tuple(events),
            logits=logits,
            command=("boa-edge-runner-onnx", "--model", "model.onnx", "--mode", "generate" if generate else "score"),
            files={"boa-edge-runner-onnx": hashlib.sha256(b"runner").hexdigest(), "libonnxruntime.so.1": "cd" * 32},
            execution=self.execution,
            state={"before": self.state, "after": self.state} if self.state else {},
            gauge=self.gauge if isinstance(request, GenerateRequest) and request.battery else (),
        )

    def _start(self, mode: str, tokens: int) -> list[Event]:
        start = {"event": "start", "schema": 1, "runtime": "onnx", "runtime_version": "1.31.1", "mode": mode}
        return [{**start, "threads": 1, "tokens": tokens}, {"event": "load", "ns": 2_400_000_000}]

    def _end(self) -> list[Event]:
        return [{"event": "memory", **self.memory}, {"event": "end", "rc": 0}]

    def _score(self, request: ScoreRequest) -> list[Event]:
        count = len(request.tokens)
        return [*self._start("score", count), {"event": "score", "tokens": count, "ns": 9_000_000_000}, *self._end()]

    def _generate(self, request: GenerateRequest) -> list[Event]:
        events = self._start("generate", len(request.prompt))
        for run in range(request.warmup + request.repeats):
            warmup = run < request.warmup
            common = {"run": run, "warmup": warmup}
            first = 4_000_000_000 + run
            events.append({"event": "prefill", **common, "tokens": len(request.prompt), "ns": first})
            for place in range(request.new_tokens):
                ns = first if place == 0 else 480_000_000 + 17_000_000 * ((place * 7 + run * 3) % 11)
                token = int(self.greedy[place % len(self.greedy)])
                events.append({"event": "token", **common, "i": place, "id": token, "ns": ns})
        return self.alter([*events, *self._end()])


def make_device(**changes: Any) -> FakeDevice:
    """A device close to the quantized reference, whose greedy text leaves it at the 27th token."""
    tensors = reference_tensors()
    noise = np.random.default_rng(11).normal(size=(POSITIONS, VOCABULARY)) * 0.05
    greedy = tensors["quantized_greedy"].copy()
    greedy[26:] = (greedy[26:] + 2) % VOCABULARY
    logits = (tensors["quantized_logits"] + noise).astype(np.float32)
    return FakeDevice(**{"logits": logits, "greedy": greedy, **changes})


@dataclass(frozen=True)
class Made:
    """A written report."""

    report: Report
    directory: Path

    @property
    def html(self) -> str:
        return (self.directory / "report.html").read_text(encoding="utf-8")


def make(directory: Path, *, bundle: dict[str, Any] | None = None, **device: Any) -> Made:
    """Measure a fake bundle on a fake device into `directory`/report."""
    path = make_bundle(directory / "bundle", **{"origin": provenance(), **(bundle or {})})
    return Made(measure(path, make_device(**device), directory / "report"), directory / "report")
