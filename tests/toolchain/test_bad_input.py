"""Every input from outside that is wrong gets one line that says what, where and what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import output_directory
from toolchain.calibration import load_calibration
from toolchain.checkpoint import Checkpoint
from toolchain.loading import load_source
from toolchain.quantize import quantize
from toolchain.recipe import CalibrationSize, parse_recipe


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def to_pickle(model: Path) -> None:
    torch.save({}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def lose_a_tensor(model: Path) -> None:
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def name_a_lost_shard(model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


CASES: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda m: (m / "config.json").unlink(), "config.json: the model configuration is missing"),
    ("bad json", lambda m: (m / "config.json").write_text("{"), "is not valid JSON"),
    ("truncated", lambda m: truncate(m / "model.safetensors"), "is truncated or no safetensors file"),
    ("no weights", lambda m: (m / "model.safetensors").unlink(), "the weights are missing"),
    ("pickle", to_pickle, "only pickle weights found (pytorch_model.bin)"),
    ("lost tensor", lose_a_tensor, "missing keys model.layers.1.mlp.up_proj.weight"),
    ("lost shard", name_a_lost_shard, "model-00001-of-00002.safetensors: the weights are missing"),
    ("own code", lambda m: edit_config(m, auto_map={"AutoModelForCausalLM": "x.Y"}), "code of its own directory"),
    ("architecture", lambda m: edit_config(m, architectures=["MambaForCausalLM"]), "no adapter for model_type"),
    ("model type", lambda m: edit_config(m, model_type="nothing"), "Accepted architectures: Gemma2ForCausalLM"),
    ("quantized", lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}), "is quantized already"),
    ("activation", lambda m: edit_config(m, hidden_act="gelu"), "activation 'gelu'"),
    ("shape", lambda m: edit_config(m, intermediate_size=128), "mismatched keys"),
    ("heads", lambda m: edit_config(m, num_attention_heads=3), "config.json: num_key_value_heads: 2 does not divide"),
    ("head size", lambda m: edit_config(m, num_attention_heads=6, head_dim=None), "not a multiple of the number of"),
    (
        "width",
        lambda m: edit_config(m, hidden_size="64"),
        'config.json: hidden_size: "64" is not a whole number',
    ),
    ("layers null", lambda m: edit_config(m, num_hidden_layers=None), "config.json: num_hidden_layers: null is not"),
    ("layers 0", lambda m: edit_config(m, num_hidden_layers=0), "config.json: num_hidden_layers: 0 is not"),
    ("eps", lambda m: edit_config(m, rms_norm_eps="1e-5"), 'config.json: rms_norm_eps: "1e-5" is not a number above 0'),
    ("rope", lambda m: edit_config(m, rope_parameters="x"), 'config.json: rope_parameters: "x" is not a mapping'),
    (
        "rope's base",
        lambda m: edit_config(m, rope_parameters={"rope_type": "default", "rope_theta": None}),
        "config.json: rope_parameters.rope_theta: null is not a number above 0",
    ),
    (
        "rope's kind",
        lambda m: edit_config(m, rope_parameters={"rope_type": "foo", "rope_theta": 1e4}),
        "broken/config.json: rope_scaling: unknown RoPE type 'foo'",
    ),
    ("no activation", lambda m: edit_config(m, hidden_act=None), "Field 'hidden_act' expected str, got NoneType"),
    ("flag", lambda m: edit_config(m, tie_word_embeddings="yes"), "Field 'tie_word_embeddings' expected bool"),
    ("architectures", lambda m: edit_config(m, architectures=3), "config.json: architectures: 3 is not a list"),
    ("dtype", lambda m: edit_config(m, dtype="float99"), 'config.json: dtype: "float99" is not one of float32'),
    ("padding", lambda m: edit_config(m, pad_token_id=9999), "cannot be loaded by `transformers` (Padding_idx"),
    ("no mapping", lambda m: (m / "config.json").write_text("[1]"), "must be a JSON object, and here is [1]"),
    ("settings", lambda m: (m / "generation_config.json").write_text('"x"'), 'and here is "x". Download the file'),
    ("tokenizer", lambda m: (m / "tokenizer.json").write_text("nonsense"), "no usable tokenizer"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_broken_model_directory(model: Path, change: Callable[[Path], object], message: str) -> None:
    change(model)
    with pytest.raises(BoaEdgeError) as caught:
        load_source(str(model))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "relu", 3])
def test_the_activation_of_another_family(directory: Callable[[str], Path], value: object, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(directory("gemma2"), tmp_path / "gemma2"))
    edit_config(broken, hidden_activation=value)
    with pytest.raises(BoaEdgeError, match=r"gemma2/config\.json: .*activation"):
        load_source(str(broken))


def test_what_configurations_may_leave_out(model: Path) -> None:
    edit_config(model, rope_parameters=None, rope_theta=10000.0, sliding_window=None)
    assert load_source(str(model)).spec.layers == 2


def write_gguf(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_of_another_family(tmp_path: Path) -> None:
    with pytest.raises(BoaEdgeError, match=r"GGUF of architecture 'mamba'\. Accepted: gemma2"):
        load_source(str(write_gguf(tmp_path / "m.gguf", "mamba")))


def test_a_truncated_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama")
    truncate(path)
    with pytest.raises(BoaEdgeError, match=r"m\.gguf: is truncated or no GGUF file"):
        load_source(str(path))
    path.write_bytes(b"not a gguf at all")
    with pytest.raises(BoaEdgeError, match=r"m\.gguf: is truncated or no GGUF file"):
        load_source(str(path))


def test_names_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model"):
        load_source(str(tmp_path / "nowhere"))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(BoaEdgeError, match="is a pickle checkpoint"):
        load_source(str(tmp_path / "weights.bin"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="is no model"):
        load_source(str(tmp_path / "notes.txt"))


def test_a_hub_id_offline_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BoaEdgeError, match="hub model 'nobody/no-such-model-anywhere'"):
        load_source("nobody/no-such-model-anywhere")


def test_calibration_text(tiny_model: Path, tmp_path: Path) -> None:
    source = load_source(str(tiny_model))
    size = CalibrationSize(sequences=4, sequence_length=64)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(BoaEdgeError, match=r"short\.txt: 9 tokens are less than one sequence of 64"):
        load_calibration(str(short), source, size, 0)
    short.write_text("")
    with pytest.raises(BoaEdgeError, match="the text file is empty"):
        load_calibration(str(short), source, size, 0)
    short.write_bytes(b"abc\xff\xfe")
    with pytest.raises(BoaEdgeError, match="is not UTF-8 text"):
        load_calibration(str(short), source, size, 0)
    with pytest.raises(UsageError, match="Accepted: a text file, self, or one of wikitext2"):
        load_calibration("wikitxt", source, size, 0)
    with pytest.raises(BoaEdgeError, match="data set wikitext2: cannot be loaded"):
        load_calibration("wikitext2", source, size, 0)


def test_less_text_than_asked_for_is_said(
    tiny_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load_source(str(tiny_model))
    sizes = [
        (CalibrationSize(sequences=8, sequence_length=64, held_out_sequences=2), ""),
        (
            CalibrationSize(sequences=4, sequence_length=1 << 20, held_out_sequences=1 << 20),
            "calibration: sequence_length 128 in place of 1048576 (the longest that the model reads), "
            "held_out_sequences 14 in place of 1048576 (at most a fifth of the text)",
        ),
        (
            CalibrationSize(sequences=1 << 20, sequence_length=64),
            "calibration: sequences 135 in place of 1048576 (all that the text",
        ),
    ]
    for size, message in sizes:
        text = load_calibration(str(text_file), source, size, 0)
        said = capsys.readouterr().err
        assert said[: len(message)] == message
        assert bool(said) == bool(message)
        assert (text.sequences.shape[0], text.held_out.shape[0]) == (
            text.source["sequences"],
            text.source["held_out_sequences"],
        )


def test_one_sequence_of_text_serves_for_both_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    source = load_source(str(tiny_model))
    (tmp_path / "one.txt").write_text("a" * 70)
    text = load_calibration(str(tmp_path / "one.txt"), source, CalibrationSize(sequences=4, sequence_length=64), 0)
    assert text.overlap
    assert text.source["held_out_overlaps"] is True


@pytest.mark.parametrize("missing", ["model.safetensors", "recipe.yaml", "config.json"])
def test_a_broken_checkpoint(tiny_model: Path, text_file: Path, tmp_path: Path, missing: str) -> None:
    recipe = parse_recipe({"method": "rtn", "weights": {"bits": 4, "group_size": 32}}, "test")
    quantize(str(tiny_model), tmp_path / "ckpt", recipe=recipe, calibration=str(text_file))
    (tmp_path / "ckpt" / missing).unlink()
    with pytest.raises(BoaEdgeError, match=f"{missing}.* is missing"):
        _ = Checkpoint(tmp_path / "ckpt").recipe


def test_a_model_directory_is_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BoaEdgeError, match="is not a quantized checkpoint"):
        Checkpoint(tiny_model)
    with pytest.raises(BoaEdgeError, match="no such quantized checkpoint"):
        Checkpoint(tmp_path / "nowhere")


def fill_the_disk(target: Path) -> None:
    with output_directory(target) as directory:
        (directory / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(BoaEdgeError, match="the disk is full"):
        fill_the_disk(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
