"""The commands that lead to the same report."""

from __future__ import annotations

import shlex

from runtime_tests.model import Deployed, Settings
from runtime_tests.provenance import Provenance


def commands(
    deployed: Deployed, provenance: Provenance, settings: Settings, device: str, *, profiled: bool
) -> tuple[str, ...]:
    """Shell lines: quantize, export, measure. Paths to choose stand in capitals, and what was not recorded."""
    quantize = ["boa-edge", "quantize", _argument(provenance.source.model)]
    quantize += ["--recipe", "BUNDLE/reference/recipe.yaml"]
    if provenance.calibration.source:
        quantize += ["--calibration", provenance.calibration.source]
    measure = ["boa-edge", "measure", "BUNDLE", "--device", device]
    measure += ["--threads", ",".join(map(str, (settings.threads, *settings.sweep)))]
    if settings.cores:
        measure += ["--cores", ",".join(map(str, settings.cores))]
    measure += ["--workload", settings.workload, "--new-tokens", str(settings.greedy)]
    for name in ("warmup", "repeats", "score_tokens"):
        measure += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    if profiled:
        measure.append("--profile")
    return (
        shlex.join([*quantize, "-o", "CHECKPOINT"]),
        shlex.join([*_export(deployed), "-o", "BUNDLE"]),
        shlex.join([*measure, "-o", "REPORT"]),
    )


def _argument(model: str | None) -> str:
    """How `quantize` takes the model; the one that comes along has a name of its own in brackets."""
    return "default" if model is not None and model.startswith("default (") else model or "MODEL"


def _export(deployed: Deployed) -> list[str]:
    config = deployed.runtime_config
    export = ["boa-edge", "export", "CHECKPOINT", "--runtime", deployed.runtime, "--activations", deployed.activations]
    if config.get("form"):
        export += ["--form", str(config["form"])]
    if config.get("prefill_length"):  # (of programs whose lengths are chosen)
        export += ["--context", str(config["context_length"]), "--prefill", str(config["prefill_length"])]
    return export
