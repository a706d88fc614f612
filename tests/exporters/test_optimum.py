"""The plug-in for optimum-executorch gives the program of `boa-edge export`, and leaves what is not ours to optimum."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runtimes.contenders import OPTIMUM
from exporters import Bundle, export, open_decoder
from tests.exporters.test_executorch import RECIPE
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugins" / "optimum-executorch"
BOA_EDGE = Path(sys.executable).with_name("boa-edge")
PEERS = Path(os.environ.get("BOA_EDGE_CACHE", ROOT / ".cache")) / "peers"
LENGTH, PROMPT, NEW = 64, [5, 9, 17, 33], 12


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("optimum") / "checkpoint"
    quantize(str(tiny_model), path, recipe=parse_recipe(RECIPE, "test"), calibration=str(text_file))
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    path = checkpoint.parent / "bundle"
    export(checkpoint, "executorch", path, context_length=LENGTH, prefill_length=LENGTH)
    return Bundle.open(path)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its half that knows nothing of optimum."""
    monkeypatch.syspath_prepend(str(PLUGIN / "src"))
    monkeypatch.delitem(sys.modules, "boa_edge_optimum", raising=False)
    return importlib.import_module("boa_edge_optimum")


def nobody() -> Any:
    raise AssertionError("optimum's own task was asked")


def test_the_program_is_that_of_our_export(plugin: Any, checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    assert plugin.is_checkpoint(checkpoint)
    program = plugin.lower(plugin.Checkpoint(checkpoint, {"max_seq_len": LENGTH}, nobody), str(BOA_EDGE))
    with (tmp_path / "model.pte").open("wb") as file:
        program.write_to_file(file)
    program.write_tensor_data_to_file(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pte"]
    assert (tmp_path / "model.pte").read_bytes() == program.buffer == bundle.model.read_bytes()


def test_without_a_length_it_is_optimums_or_what_the_model_reads(
    plugin: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that the program is the one that the variable names, and that it need not take a fixed shape."""
    told, script = tmp_path / "told.json", tmp_path / "boa-edge"
    script.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(told)!r}, 'w'))\n")
    script.chmod(0o755)
    monkeypatch.setenv(plugin.COMMAND, str(script))
    config = json.loads((checkpoint / "config.json").read_text())
    for reads, expected in ((128, 128), (8192, 2048)):
        own = shutil.copytree(checkpoint, tmp_path / f"reads-{reads}")
        (own / "config.json").write_text(json.dumps(config | {"max_position_embeddings": reads}))
        for options, prefill in (({}, expected), ({"disable_dynamic_shapes": True}, 1)):
            plugin.lower(plugin.Checkpoint(own, options, nobody))
            words = json.loads(told.read_text())
            assert words[:4] == ["export", str(own), "--runtime", "executorch"]
            assert words[-4:] == ["--context", str(expected), "--prefill", str(prefill)]


def test_what_cannot_be_is_refused(
    plugin: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="lowers checkpoints that `boa-edge quantize` wrote"):
        plugin.lower(object())
    with pytest.raises(ValueError, match=r"^qlinear, dtype: .* is quantized already"):
        plugin.lower(plugin.Checkpoint(checkpoint, {"qlinear": "8da4w", "dtype": "float16", "device": "cpu"}, nobody))
    monkeypatch.setenv(plugin.COMMAND, "/nowhere/boa-edge")
    with pytest.raises(FileNotFoundError, match="no program '/nowhere/boa-edge': set BOA_EDGE_COMMAND to"):
        plugin.lower(plugin.Checkpoint(checkpoint, {}, nobody))
    monkeypatch.setenv(plugin.COMMAND, str(BOA_EDGE))
    with pytest.raises(RuntimeError, match=r"--context 129 .* ended with 2: error: --context: a context of 129 tokens"):
        plugin.lower(plugin.Checkpoint(checkpoint, {"max_seq_len": 129}, nobody))
    assert "a context of 129 tokens" in capsys.readouterr().err


def test_any_other_recipe_sees_what_optimums_task_loads(plugin: Any, checkpoint: Path) -> None:
    class Loaded:
        metadata = "of the model"

    loads: list[Loaded] = []
    seen = plugin.Checkpoint(checkpoint, {}, lambda: loads.append(Loaded()) or loads[-1])
    assert not loads
    assert seen.metadata == seen.metadata == Loaded.metadata
    assert len(loads) == 1
    with pytest.raises(AttributeError, match="nothing"):
        _ = seen.nothing
    assert not plugin.is_checkpoint(checkpoint.parent)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """An interpreter that has the real package and the plug-in as pip installs it, the package's command, environment.

    The plug-in's files go into the package's directory, so that directory is a copy here and the rest is linked to.
    """
    assert OPTIMUM.environment is not None
    known = PEERS / OPTIMUM.environment
    found = sorted(known.glob("lib/python*/site-packages"))
    if not found or not (known / "bin" / "optimum-cli").exists():
        pytest.skip(f"{OPTIMUM.requirements[0]} is not in {known}: docs/executorch.md says how it gets there")
    overlay = tmp_path_factory.mktemp("installed") / "environment"
    subprocess.run([known / "bin" / "python", "-m", "venv", "--without-pip", overlay], check=True)
    place = next(overlay.glob("lib/python*/site-packages"))
    for entry in found[0].iterdir():
        if entry.name == "optimum":
            shutil.copytree(entry, place / entry.name, ignore=shutil.ignore_patterns("boa_edge.py"))
        elif not entry.name.startswith("boa_edge_optimum"):  # one that is installed there already stays out of this
            (place / entry.name).symlink_to(entry)
    python, source = overlay / "bin" / "python", overlay.with_name("source")
    shutil.copytree(PLUGIN, source)  # pip builds beside the sources
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-index", "--no-build-isolation", str(source)], check=True, stdin=subprocess.DEVNULL)
    own = {"BOA_EDGE_COMMAND": str(BOA_EDGE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return python, known / "bin" / "optimum-cli", {**os.environ, **own}


def test_its_own_command_writes_our_program(
    installed: tuple[Path, Path, dict[str, str]], checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    python, script, environment = installed
    command = [str(python), str(script), "export", "executorch", "--model", str(checkpoint)]
    command += ["--task", "text-generation", "--recipe", "boa-edge", "--max_seq_len", str(LENGTH)]
    command += ["--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)
    assert (tmp_path / "model.pte").read_bytes() == bundle.model.read_bytes()


def test_its_model_class_writes_as_ours(
    installed: tuple[Path, Path, dict[str, str]], checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    python, _, environment = installed
    script, told = tmp_path / "generate.py", tmp_path / "tokens.json"
    script.write_text(
        "import json\n"
        "from optimum.executorch import ExecuTorchModelForCausalLM as Model\n"
        f"model = Model.from_pretrained({str(checkpoint)!r}, task='text-generation', recipe='boa-edge', "
        f"max_seq_len={LENGTH})\n"
        "model.eos_token_ids = []\n"  # so that the text does not end
        f"found = model.generate({PROMPT}, max_seq_len={len(PROMPT) + NEW})\n"
        f"json.dump([found, model.max_cache_size], open({str(told)!r}, 'w'))\n"
    )
    subprocess.run([python, script], check=True, env=environment, stdin=subprocess.DEVNULL)
    assert json.loads(told.read_text()) == [open_decoder(bundle).greedy(PROMPT, NEW), LENGTH]
