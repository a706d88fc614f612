"""Two processes under `torchrun` do what one does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.toolchain.ranks import statistics
from toolchain.checkpoint import Checkpoint
from toolchain.quantize import quantize

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*LAUNCH, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    solver = {"attention_rows": "boa", "recollect": True, "deviation": 0.5, "residual": 0.5, "refits": 1}
    weights = {"bits": 4, "group_size": 32, "symmetric": True}
    size = {"sequences": 9, "sequence_length": 48, "held_out_sequences": 2}
    path.write_text(yaml.safe_dump({"method": "edge", "weights": weights, "solver": solver, "calibration": size}))
    return path


def test_two_ranks_collect_the_same_statistics_and_fail_with_one_message(
    recipe: Path, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ("quantize", tiny_model, "--recipe", recipe, "--calibration", text_file, "-o", tmp_path / "out")
    done = torchrun(ROOT / "tests" / "toolchain" / "ranks.py", tmp_path / "found", *arguments)
    for dtype, accuracy in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        assert (tmp_path / f"found-{dtype}").exists(), done.stderr
        together, alone = load_file(tmp_path / f"found-{dtype}"), statistics(dtype)
        assert together.keys() == alone.keys()
        assert len(alone) == 7 + 7 + 2 + 4 + 2
        for name, expected in alone.items():
            difference = float((together[name] - expected).norm() / expected.norm())
            assert difference < accuracy, (name, dtype, difference)
    assert done.returncode != 0
    # Not by whole lines: the ranks write to one stream.
    told = re.findall(r"(?<![\w.])error: ([^\n]*)", done.stderr)
    assert len(told) == 1, done.stderr
    assert told[0].startswith("recipe w4g32-edge+solver: no damping mends this Hessian"), done.stderr
    assert not (tmp_path / "out").exists()


def test_two_ranks_write_one_checkpoint(recipe: Path, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_model, "--recipe", recipe, "--calibration", text_file, "-o", tmp_path / "two")
    done = torchrun("-m", "boa_edge.cli", *arguments)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert done.stderr.count("loading") == 1, done.stderr
    summary = json.loads(done.stdout)
    alone = quantize(str(tiny_model), tmp_path / "one", recipe=str(recipe), calibration=str(text_file)).as_dict()
    assert summary["original_perplexity"] == pytest.approx(alone["original_perplexity"], rel=1e-5)
    # The sums over tokens are taken in another order. A code whose two neighbours are all but equally good may differ,
    # then those that are solved after it; of what is solved first, nearly all are the same, and the losses are alike.
    two, one = Checkpoint(tmp_path / "two"), Checkpoint(tmp_path / "one")
    first = one.spec.layer_names[0]
    for name in (first.q, first.k, first.v, first.o):
        left, right = two.quantized(name), one.quantized(name)
        assert float((left.codes == right.codes).double().mean()) > 0.97, name
    losses = [sum(layer["relative_loss"] for layer in each.provenance["layers"]) for each in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".two")] == []
