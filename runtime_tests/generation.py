"""Greedy generation on the device against the two PyTorch models' answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from devices.contract import Execution
from runtime_tests.activations import compared
from runtime_tests.events import Generation
from runtime_tests.fidelity import greedy_match
from runtime_tests.figure import Figure, figure
from runtime_tests.metrics import Logits
from runtime_tests.model import Continuation, Deployed, Fidelity, GreedyGeneration
from runtime_tests.reference import Reference
from runtime_tests.text import Decode

NextLogits = Callable[[Sequence[int]], Logits]


def compare_greedy(
    reference: Reference, generation: Generation, decode: Decode, next_logits: NextLogits, execution: Execution
) -> GreedyGeneration:
    """Compare the first counted run with the stored continuations.

    Args:
        next_logits: the device's logits [V] after a sequence of tokens; asked once, and only where the device leaves
            the quantized model's path.
    """
    tokens = generation.counted[0].tokens
    against_quantized = greedy_match(reference.quantized_greedy, tokens)
    place = against_quantized.first_divergence
    margin: Figure | None = None
    if place is not None:
        logits = next_logits([*map(int, reference.prompt), *tokens[:place]])
        gap = float(logits[tokens[place]]) - float(logits[int(reference.quantized_greedy[place])])
        margin = figure(gap, "logits", execution, n=1)

    def continuation(ids: Sequence[int]) -> Continuation:
        return Continuation(tokens=tuple(map(int, ids)), text=decode(ids))

    return GreedyGeneration(
        prompt=continuation(reference.prompt.tolist()),
        original=continuation(reference.original_greedy.tolist()),
        quantized=continuation(reference.quantized_greedy.tolist()),
        deployed=continuation(tokens),
        against_original=greedy_match(reference.original_greedy, tokens),
        against_quantized=against_quantized,
        repeatable=all(run.tokens == tokens for run in generation.runs) if len(generation.runs) > 1 else None,
        divergence_margin=margin,
    )


def notes(greedy: GreedyGeneration, fidelity: Fidelity, deployed: Deployed) -> list[str]:
    """What a reader has to know about the text that the device wrote."""
    found = []
    match, scores = greedy.against_quantized, fidelity.deployed
    if match.first_divergence is None:
        found.append(
            f"All {match.compared} greedily generated tokens equal those of the PyTorch model with the same weights."
        )
    else:
        text = (
            f"Greedy generation leaves the PyTorch model with the same weights at token {match.first_divergence + 1} "
            f"of {match.compared}."
        )
        found.append(text + _margin_note(greedy.divergence_margin, scores.max_logit_error_from_quantized))
    kl = scores.kl_from_quantized
    if kl is not None and kl.number is not None:
        cause = compared(deployed)
        found.append(f"{cause}: the KL divergence between the two is {kl.number:.3g} nats per token.")
    if greedy.repeatable is False:
        found.append("Runs of the same prompt on the device gave different tokens: greedy decoding is not repeatable.")
    return found


def _margin_note(margin: Figure | None, error: Figure | None) -> str:
    """Whether the first different token was a near tie."""
    if margin is None or margin.number is None:
        return ""
    if margin.number >= 0:
        text = f" There the device prefers its own token by {margin.number:.3g} logits"
    else:
        text = f" Scoring the same tokens, the device prefers the other by {-margin.number:.3g} logits"
    if error is not None and error.number is not None:
        text += f"; on the reference text the largest difference of a logit between the two is {error.number:.3g}"
    return text + "."
