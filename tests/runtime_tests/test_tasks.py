"""lm-eval's requests, answered by a bundle's program, are what PyTorch answers with the same codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError, UsageError
from exporters import Bundle, export, open_decoder
from runtime_tests.evaluate import open_subject
from runtime_tests.tasks import evaluate_tasks
from runtime_tests.tasks.scorer import BundleScorer
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe

RECIPE = {
    "method": "rtn",
    "weights": {"bits": 4, "group_size": 32},
    "calibration": {"sequences": 4, "sequence_length": 32, "held_out_sequences": 1},
}


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tasks")
    quantize(str(tiny_model), base / "checkpoint", recipe=parse_recipe(RECIPE, "test"), calibration=str(text_file))
    export(base / "checkpoint", "onnx", base / "bundle", activations="float32")
    return base / "bundle"


def pytorch(bundle: Path, ids: list[int]) -> torch.Tensor:
    """log p [n, V] of the checkpoint."""
    logits = open_subject(str(bundle.parent / "checkpoint")).logits(torch.tensor([ids]))
    return logits[0].detach().double().log_softmax(-1)


class Counting:
    """A decoder whose next token is always one more than the last, and which counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self.calls.append(tuple(tokens[0].tolist()))
        rows = np.zeros((1, tokens.shape[1], 50), np.float32)
        for place, token in enumerate(tokens[0]):
            rows[0, place, token + 1] = 5
        return rows

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        self.calls.append(tuple(prompt))
        return [prompt[-1] + 1 + i for i in range(new_tokens)]


def test_the_likelihood_of_a_continuation_is_pytorchs(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    scorer = BundleScorer(open_decoder(opened), opened.runtime.context_length)
    context, end = [7, 91, 33, 12], [60, 5, 18]
    expected = pytorch(bundle, [*context, *end])
    found, greedy = scorer.likelihood(context, end)
    assert found == pytest.approx(float(sum(expected[3 + i, token] for i, token in enumerate(end))), abs=1e-3)
    assert not greedy
    best = int(expected[3].argmax())
    assert scorer.likelihood(context, [best])[1]


def test_long_contexts_lose_their_beginning_and_equal_inputs_are_read_once() -> None:
    decoder = Counting()
    scorer = BundleScorer(decoder, 6)
    one, greedy = scorer.likelihood(range(10), [10, 11])
    assert greedy
    assert decoder.calls == [(5, 6, 7, 8, 9, 10)]
    assert one == pytest.approx(2 * (5 - np.log(np.exp(5) + 49)))
    assert not scorer.likelihood(range(10), [10, 30])[1]  # the same inputs: its last token is not read
    assert len(decoder.calls) == 1
    assert scorer.likelihood([1], [2])[1]
    assert len(decoder.calls) == 2
    with pytest.raises(BoaEdgeError, match=r"7 tokens are to be scored; 6 are read.*--context"):
        scorer.likelihood([1], range(7))
    with pytest.raises(ValueError, match="needed"):
        scorer.likelihood([], [1])


def test_text_is_generated_until_its_end() -> None:
    decoder = Counting()
    scorer = BundleScorer(decoder, 48)
    assert scorer.generate([1, 2, 3], 40, lambda tokens: 10 in tokens)[:7] == [4, 5, 6, 7, 8, 9, 10]
    assert len(decoder.calls) == 1
    assert scorer.generate(range(20), 30, lambda tokens: 45 in tokens) == list(range(20, 50))
    assert decoder.calls[1:] == [tuple(range(2, 20))] * 2
    with pytest.raises(BoaEdgeError, match="48 tokens are to be generated; 48 are read"):
        scorer.generate([1], 48, lambda tokens: True)


def test_without_the_package_it_says_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"lm-eval, which brings the tasks, is not installed.*pip install"):
        evaluate_tasks(bundle, ["piqa"])


TASK = """task: bridges
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.5
"""


def test_a_task_of_ones_own(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right answers are those that PyTorch prefers, in all but the last question."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = open_subject(str(bundle.parent / "checkpoint")).tokenizer
    questions, choices = ["a stone in the", "seven bridges and", "light on water,", "north of"], ["x", "y", "z"]
    rows = []
    for question in questions:
        ids = tokenizer.encode(question, add_special_tokens=False)
        last = pytorch(bundle, ids)[-1]
        label = max(range(3), key=lambda i: float(last[tokenizer.encode(choices[i], add_special_tokens=False)[0]]))
        rows.append({"question": question, "choices": choices, "label": label})
    rows[-1]["label"] = (rows[-1]["label"] + 1) % 3
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "bridges.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    command = [sys.executable, "-c", "from boa_edge.cli import main; main()", "lm-eval", str(bundle)]
    command += ["--tasks", "bridges", "--include", str(tmp_path / "tasks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (score,) = [one for one in result["scores"] if one["metric"] == "acc"]
    assert (score["task"], score["value"], score["samples"], score["shots"]) == ("bridges", 0.75, 4, 0)
    assert score["stderr"] > 0
    assert (result["runtime"], result["form"], result["execution"]) == ("onnx", "qdq", "measured")
    with pytest.raises(UsageError, match=r"no task 'bridge'.*bridges"):
        evaluate_tasks(bundle, ["bridge"], include=tmp_path / "tasks")
    data.unlink()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "lm-eval could not ask its questions" in done.stderr
    assert "Traceback" not in done.stderr.splitlines()[-1]
