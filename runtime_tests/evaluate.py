"""Perplexity, KL and top-1 agreement of any stage's output on a text: a model, a quantized checkpoint or a bundle."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from exporters import open_decoder
from exporters.bundle import Bundle
from toolchain.checkpoint import Checkpoint
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import load_source, load_tokenizer
from toolchain.metrics import Logits, evaluate_logits
from toolchain.products import fast_products
from toolchain.text import opening, read_text, sequences, tokenize
from toolchain.transforms import install_runtime

_CONTEXT = 512


@dataclass(frozen=True)
class EvaluateResult:
    """Figures of one text; KL in nats per token."""

    subject: str
    kind: str
    perplexity: float
    kl: float | None
    top1: float | None
    reference: str | None
    reference_perplexity: float | None
    tokens: int
    sequence_length: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        rounded = {"perplexity": 4, "kl": 6, "top1": 5, "reference_perplexity": 4, "seconds": 1}
        values = asdict(self)
        return {k: round(v, rounded[k]) if k in rounded and v is not None else v for k, v in values.items()}


@dataclass(frozen=True)
class _Subject:
    """What is evaluated; `longest`: the most tokens that it reads at a time, None for a program that says so itself."""

    kind: str
    logits: Logits
    tokenizer: Any
    longest: int | None


@fast_products()
def evaluate(
    subject: str, text: Path, *, reference: str | None = None, tokens: int = 24576, sequence_length: int = _CONTEXT
) -> EvaluateResult:
    """Teacher-forced evaluation on consecutive sequences of a text.

    Args:
        subject: a model (as `quantize` takes it), a checkpoint directory or a bundle directory.
        reference: a model to compare with; its tokenizer must give the same tokens.
        tokens: how many tokens of the text to read at most.

    Raises:
        BoaEdgeError, UsageError: as the parts say; a text shorter than one sequence.
    """
    start = time.monotonic()
    content = read_text(text)
    say(f"loading {subject}")
    evaluated = open_subject(subject)
    compared = None
    if reference is not None:
        say(f"loading {reference}")
        compared = open_subject(reference)
    ids = tokenize(content, evaluated.tokenizer)
    first = opening(evaluated.tokenizer)
    alike = compared is None or (
        torch.equal(ids, tokenize(content, compared.tokenizer)) and first == opening(compared.tokenizer)
    )
    if not alike:
        problem = f"{subject} and {reference} split the text into different tokens"
        raise BoaEdgeError(problem, where=text, fix="Compare models that share a tokenizer")
    limits = [each.longest for each in (evaluated, compared) if each is not None and each.longest is not None]
    longest = min(limits, default=sequence_length)
    if sequence_length > longest:
        say(f"sequences of {longest} tokens in place of {sequence_length}: the longest that is read")
        sequence_length = longest
    rows = sequences(ids[:tokens], sequence_length, text, first)
    fidelity = evaluate_logits(evaluated.logits, rows, compared.logits if compared else None, "evaluating")
    return EvaluateResult(
        subject=subject,
        kind=evaluated.kind,
        perplexity=fidelity.perplexity,
        kl=fidelity.kl,
        top1=fidelity.top1,
        reference=reference,
        reference_perplexity=fidelity.reference_perplexity,
        tokens=rows.numel(),
        sequence_length=sequence_length,
        seconds=time.monotonic() - start,
    )


def open_subject(subject: str) -> _Subject:
    path = Path(subject).expanduser()
    if (path / "manifest.json").is_file():
        return _bundle(path)
    if (path / "recipe.yaml").is_file():
        return _checkpoint(path)
    source = load_source(subject)
    return _Subject(
        "model", lambda ids: source.model(ids, use_cache=False).logits, source.tokenizer, source.spec.max_positions
    )


def _checkpoint(path: Path) -> _Subject:
    checkpoint = Checkpoint(path)
    config = AutoConfig.for_model(**{k: v for k, v in checkpoint.config.items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    state = checkpoint.dequantized_state()
    if checkpoint.spec.tied_embeddings:
        state[f"{checkpoint.spec.head}.weight"] = state[f"{checkpoint.spec.embedding}.weight"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem = f"tensors do not fit the configuration ({' '.join(str(error).split())[:200]})"
        raise BoaEdgeError(problem, where=path, fix="Quantize the model again") from None
    install_runtime(model, checkpoint.spec, checkpoint.transforms)
    fake = FakeQuantized(model, checkpoint.spec, {}, checkpoint.activations, checkpoint.kv_cache)
    return _Subject("checkpoint", fake.logits, load_tokenizer(path), checkpoint.spec.max_positions)


def _bundle(path: Path) -> _Subject:
    decoder = open_decoder(Bundle.open(path))

    def logits(ids: Tensor) -> Tensor:
        return torch.from_numpy(decoder.logits(ids.numpy()))

    return _Subject("bundle", logits, load_tokenizer(path), None)
