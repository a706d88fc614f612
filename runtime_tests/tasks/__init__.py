"""Tasks of lm-eval (lm-evaluation-harness) on a bundle: its program runs on this machine, in its own runtime."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from boa_edge import __version__
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.progress import say
from exporters import open_decoder
from exporters.bundle import Bundle
from runtime_tests.tasks.scorer import BundleScorer
from toolchain.loading import load_tokenizer

PACKAGE = "lm-eval"


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        filter: what lm-eval does to answers before it looks at them; `none` mostly.
        value, stderr: as lm-eval computes them; stderr is None where it gives none.
        samples: how many questions were asked.
        shots: examples before each question.
        version: of the task.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int | None
    shots: int | None
    version: str | None


@dataclass(frozen=True)
class TasksResult:
    """All of them."""

    bundle: str
    runtime: str
    form: str
    activations: str
    scores: tuple[TaskScore, ...]
    limit: int | None
    versions: dict[str, str]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready. Scores are measured: by the deployed program, here."""
        return {**asdict(self), "execution": "measured", "scores": [asdict(score) for score in self.scores]}


def evaluate_tasks(
    bundle: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    include: Path | None = None,
) -> TasksResult:
    """Ask a bundle the questions of some tasks.

    Args:
        tasks: by lm-eval's names.
        limit: questions of each task at most; a score of few is no score, and says so by its standard error.
        shots: examples before each question; the task's own number where None.
        include: a directory with tasks of the user's own (lm-eval's YAML files).

    Raises:
        UsageError: lm-eval is not installed, or knows no such task.
        BoaEdgeError: the bundle is damaged, or a task's data cannot be had.
    """
    start = time.monotonic()
    opened = Bundle.open(bundle)
    if importlib.util.find_spec("lm_eval") is None:
        fix = "Install it: pip install 'boa-edge[tasks]' (in a checkout: .venv/bin/pip install -e '.[tasks]')"
        raise UsageError(f"the package {PACKAGE}, which brings the tasks, is not installed", fix=fix)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from runtime_tests.tasks.adapter import BundleModel

    if include is not None and not include.is_dir():
        raise UsageError("is no directory", where=include, fix="Name the directory of your tasks' YAML files")
    manager = TaskManager(include_path=None if include is None else str(include))
    _check_names(tasks, manager.all_tasks)
    runtime = opened.runtime
    scorer = BundleScorer(open_decoder(opened), runtime.context_length)
    model = BundleModel(scorer, load_tokenizer(bundle), runtime.eos_token_ids, runtime.bos_token_id)
    say(f"{', '.join(tasks)}: loading the questions")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # (it prints, and our output is for programs)
            found = simple_evaluate(
                model, tasks=list(tasks), limit=limit, num_fewshot=shots, task_manager=manager, log_samples=False
            )
    except (BoaEdgeError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # (whatever lm-eval and its sources of data raise)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BoaEdgeError(
            f"{', '.join(tasks)}: lm-eval could not ask its questions ({reason})",
            fix="Tasks fetch their data at their first use: run it once with a network, with the same $HF_HOME, or "
            "give tasks with data of your own by --include",
        ) from error
    if found is None:
        raise BoaEdgeError("lm-eval gave no result")
    return TasksResult(
        bundle=str(bundle),
        runtime=runtime.runtime,
        form=runtime.form,
        activations=runtime.activations,
        scores=tuple(_scores(found)),
        limit=limit,
        versions={"boa-edge": __version__, PACKAGE: importlib.metadata.version(PACKAGE)},
        seconds=round(time.monotonic() - start, 1),
    )


def _check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    if not tasks:
        raise UsageError("no task is named", where="--tasks", fix="Name some, such as --tasks arc_easy,piqa")
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, 3)
            fix = f"Did you mean {' or '.join(near)}?" if near else "`lm_eval --tasks list` shows them"
            raise UsageError(f"lm-eval knows no task {task!r}", where="--tasks", fix=fix)


def _scores(found: Mapping[str, Any]) -> list[TaskScore]:
    """`metric,filter` -> number, beside `metric_stderr,filter` -> number or N/A."""
    scores = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not _finite(value):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            version = found.get("versions", {}).get(task)
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=kind,
                    value=float(value),
                    stderr=float(error) if _finite(error) else None,
                    samples=found.get("n-samples", {}).get(task, {}).get("effective"),
                    shots=found.get("n-shot", {}).get(task),
                    version=None if version is None else str(version),
                )
            )
    return scores


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
