"""Several bundles of one model, measured together: each by its main figures, under a name of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from boa_edge.errors import UsageError
from runtime_tests.facts import BundleFacts
from runtime_tests.model import Deployed, Report, Variant

_LONGEST = 80  # characters of a directory's name


def check_comparable(bundles: Sequence[BundleFacts]) -> None:
    """UsageError where bundles answer other questions: another text, prompt or original model."""
    first = bundles[0].reference
    for other in bundles[1:]:
        same = np.array_equal(first.tokens, other.reference.tokens)
        same = same and np.array_equal(first.prompt, other.reference.prompt)
        same = same and np.array_equal(first.original_logits, other.reference.original_logits)
        if not same:
            raise UsageError(
                f"holds another reference than {bundles[0].path}, so that their accuracies cannot stand side by side",
                where=other.path,
                fix="Measure them one by one, or export both from checkpoints of the same model and text",
            )


def variant_names(deployed: Sequence[Deployed]) -> tuple[str, ...]:
    """For each, no more than it takes to tell them apart: runtime, form, activations, recipe; else numbers."""
    parts = [
        (one.runtime, str(one.runtime_config.get("form") or ""), one.activations, one.recipe_name or "")
        for one in deployed
    ]
    names = [part[0] for part in parts]
    for place in range(1, len(parts[0])):
        if len(set(names)) == len(names):
            return tuple(names)
        words = [part[place] for part in parts]
        if len(set(words)) > 1:
            names = [f"{name} {word}".strip() for name, word in zip(names, words, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} {number}" for number, name in enumerate(names, start=1)]
    return tuple(names)


def directory_names(names: Sequence[str]) -> tuple[str, ...]:
    """For each name a directory's: short, of letters that neither a file system nor a link minds, and its own."""
    taken: set[str] = set()
    places = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_LONGEST].strip(".-") or "bundle"
        candidates = (stem, *(f"{stem}-{number}" for number in range(2, len(names) + 1)))
        # Some file systems take upper and lower case for the same.
        place = next(each for each in candidates if each.lower() not in taken)
        taken.add(place.lower())
        places.append(place)
    return tuple(places)


def variant(report: Report, name: str, link: str | None) -> Variant:
    """A report's main figures."""
    scores = report.fidelity.deployed
    return Variant(
        name=name,
        recipe_name=report.deployed.recipe_name,
        runtime=report.deployed.runtime,
        form=report.deployed.runtime_config.get("form"),
        activations=report.deployed.activations,
        report=link,
        runtime_size=report.deployed.runtime_size,
        perplexity=scores.perplexity,
        kl_from_original=scores.kl_from_original,
        kl_from_quantized=scores.kl_from_quantized,
        top1_with_original=scores.top1_with_original,
        load_time=report.speed.load_time,
        prefill_speed=report.speed.prefill_speed,
        decode_speed=report.speed.decode_speed,
        peak_rss=report.memory.peak_rss,
    )
