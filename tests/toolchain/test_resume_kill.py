"""Runs that are killed again and again (SIGKILL) resume to the same codes, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import make_model, tiny_config
from toolchain.recipe import load_recipe

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
BLOCKS = 6
KILLS = 10
# All that the method does, in fewer rounds.
EDGE: dict[str, object] = {
    "attention_rows": "gauss_newton",
    "activation_order": True,
    "recollect": True,
    "deviation": 0.5,
    "residual": 0.5,
    "refits": 1,
    "sweeps": 1,
}

# One process that has imported everything, and once loaded the model, which imports the rest, forks one per line of its
# input, which then is `boa-edge` with that line's arguments: a kill costs a second and not the ten that Python needs to
# import torch and transformers.
STARTER = """
import json, os, sys
from boa_edge.quiet import quiet_libraries, quiet_transformers
quiet_libraries()
quiet_transformers()
import boa_edge.cli, toolchain.quantize
toolchain.quantize.load_source(sys.argv.pop())
for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        sys.argv = ["boa-edge", *arguments]
        boa_edge.cli.main()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Starter:
    """Starts `boa-edge`, kills it where told to, and says how it ended."""

    def __init__(self, log: Path, model: Path) -> None:
        self._log = log
        command = [sys.executable, "-c", STARTER, str(model)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT, cwd=ROOT)

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def run(self, arguments: list[str], until: Callable[[], bool] | None = None, delay: float = 0.0) -> int:
        """Exit status; -9 where it was killed, `delay` seconds after `until` became true."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._log.unlink(missing_ok=True)
        print(json.dumps([arguments, str(self._log)]), file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        if until is not None:
            limit = time.monotonic() + 300
            while not until() and time.monotonic() < limit:
                time.sleep(0.001)
            time.sleep(delay)
            with suppress(ProcessLookupError):  # too late: the status says so
                os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def starter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    made = Starter(tmp_path_factory.mktemp("log") / "log.txt", model)
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("six") / "model", tiny_config(num_hidden_layers=BLOCKS))


def write_recipe(path: Path, method: str, bits: int = 3, solver: dict[str, object] | None = None) -> Path:
    document = {
        "method": method,
        "weights": {"bits": bits, "group_size": None, "symmetric": False},
        "calibration": {"sequences": 6, "sequence_length": 48, "held_out_sequences": 1},
    }
    path.write_text(yaml.safe_dump(document | ({"solver": solver} if solver else {})))
    return path


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Codes, scales, zero points and everything else that the checkpoint holds."""
    names = ("model.safetensors", "embedding.safetensors", "reference.safetensors")
    return {f"{name}/{key}": value for name in names for key, value in load_file(checkpoint / name).items()}


@pytest.mark.parametrize(("method", "solver"), [("edge", EDGE), ("gptq", None)], ids=["edge", "gptq"])
def test_a_run_killed_ten_times_yields_the_same_codes(
    method: str, solver: dict[str, object] | None, starter: Starter, model: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", method, solver=solver)

    def arguments(output: str, recipe: Path = recipe, text: Path = text_file) -> list[str]:
        place = str(tmp_path / output)
        return ["quantize", str(model), "--recipe", str(recipe), "--calibration", str(text), "-o", place]

    assert starter.run(arguments("whole")) == 0, starter.log
    unfinished = tmp_path / f".killed.{load_recipe(str(recipe)).solved_by}.unfinished"

    def finished() -> int:
        return len(list(unfinished.glob("block-*.safetensors")))

    chance = random.Random(f"{method} 0")
    steps = [1] * (BLOCKS - 1) + [0] * (KILLS - BLOCKS + 1)
    chance.shuffle(steps)
    seen = []
    for step in steps:
        wanted = finished() + step
        if step and wanted <= BLOCKS:  # somewhere in the block after one that it has finished
            status = starter.run(arguments("killed"), lambda wanted=wanted: finished() >= wanted, chance.random() / 50)
        else:  # somewhere while it loads, goes again through finished blocks, or works on the next
            status = starter.run(arguments("killed"), lambda: "loading" in starter.log, chance.random() / 10)
        assert status == -signal.SIGKILL, f"it was not killed in time:\n{starter.log}"
        seen.append(finished())
    assert seen == sorted(seen)
    assert seen[-1] >= BLOCKS - 1
    assert len(set(seen)) > 1, f"all kills fell into the same blocks: {seen}"
    assert not (tmp_path / "killed").exists()

    other_text = tmp_path / "other.txt"
    other_text.write_text(text_file.read_text()[::-1])
    other_recipe = write_recipe(tmp_path / "other.yaml", method, bits=4, solver=solver)
    for different, what in (({"recipe": other_recipe}, "recipe"), ({"text": other_text}, "calibration")):
        assert starter.run(arguments("killed", **different)) == 1
        assert f"an unfinished run differs from this one in: {what}. Delete {unfinished} to start over" in starter.log
    assert finished() == seen[-1]

    # A process of its own, with nothing from any other's memory.
    last = [sys.executable, "-m", "boa_edge.cli", *arguments("killed")]
    done = subprocess.run(last, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"resuming {load_recipe(str(recipe)).solved_by}: {seen[-1]} blocks are finished" in done.stderr
    whole, killed = stored(tmp_path / "whole"), stored(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []
    assert not unfinished.exists()
