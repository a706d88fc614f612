"""A checkpoint that lacks a file, or of which a file is damaged, is one clear error as soon as it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from boa_edge.errors import BoaEdgeError
from exporters import EXPORTERS, export
from runtime_tests.evaluate import open_subject
from tests.conftest import make_model, tiny_config
from toolchain.checkpoint import Checkpoint
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe

RECIPE: dict[str, Any] = {
    "method": "rtn",
    "weights": {"bits": 4, "group_size": 32},
    "embedding": {"bits": 8, "group_size": None},
    "activations": {"scheme": "per_token", "budget": None},
    "calibration": {"sequences": 4, "sequence_length": 32, "held_out_sequences": 1},
}
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rotated, with everything that a recipe can ask for."""
    recipe = parse_recipe({**RECIPE, "transforms": ["rotate", "smooth"], "kv_cache": {"scheme": "per_head"}}, "test")
    path = tmp_path_factory.mktemp("whole") / "checkpoint"
    quantize(str(tiny_model), path, recipe=recipe, calibration=str(text_file))
    return path


@pytest.fixture(scope="module")
def smoothed(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every runtime."""
    path = tmp_path_factory.mktemp("smoothed") / "checkpoint"
    recipe = parse_recipe({**RECIPE, "transforms": ["smooth"]}, "test")
    quantize(str(tiny_model), path, recipe=recipe, calibration=str(text_file))
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transforms.json", "config.json says that the model is rotated"),
        ("kv_cache.json", "recipe.yaml asks for kv_cache"),
        ("activations.json", "recipe.yaml asks for activations"),
        ("embedding.safetensors", "recipe.yaml asks for embedding"),
    ],
)
def test_files_that_a_checkpoint_owes(name: str, reason: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / name).unlink()
    with pytest.raises(BoaEdgeError, match=f"/checkpoint/{name}: is missing, and {reason}. Copy .*quantize"):
        Checkpoint(tmp_path / "checkpoint")


def test_transforms_that_only_the_recipe_tells_of(smoothed: Path, tmp_path: Path) -> None:
    shutil.copytree(smoothed, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "transforms.json").unlink()
    with pytest.raises(BoaEdgeError, match=r"transforms.json: is missing, and recipe.yaml asks for transforms"):
        Checkpoint(tmp_path / "checkpoint")


def changed(name: str, change: Callable[[Any], Any]) -> Damage:
    """Damage to a JSON file: `change` gives its new contents, or None where it has changed them in place."""

    def damage(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        new = change(document)
        (directory / name).write_text(json.dumps(document if new is None else new))

    return damage


def grouped(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Damage to every group of codes in config.json."""
    return changed(
        "config.json",
        lambda document: [change(each) for each in document["quantization_config"]["config_groups"].values()] and None,
    )


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any], *, metadata: bool = True) -> Damage:
    """Damage to the tensors of a file."""

    def damage(directory: Path) -> None:
        with safe_open(directory / name, framework="pt") as stream:
            told = stream.metadata()
        held = load_file(directory / name)
        change(held)
        save_file(
            {key: value.contiguous() for key, value in held.items()}, directory / name, told if metadata else None
        )

    return damage


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda held: held.update({name: make(held[name])})


def zeroed(scales: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(scales)


TABLE, MODEL, CONFIG, ENDS = "embedding.safetensors", "model.safetensors", "config.json", "generation_config.json"
Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm.weight"
GROUPS = r"config.json: quantization_config.config_groups"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "zero scales of the table": (
        tensors(TABLE, put("weight_scale", zeroed)),
        r"embedding.safetensors: broken codes \(scales must be positive",
    ),
    "rows of the table": (
        tensors(TABLE, put("weight_packed", lambda codes: codes[:-1])),
        r"embedding.safetensors: broken codes \(packed codes of shape \(263",
    ),
    "a part of the table": (
        tensors(TABLE, lambda held: held.pop("weight_scale")),
        r"embedding.safetensors: broken codes \('weight_scale' is missing\)",
    ),
    "metadata of the table": (
        tensors(TABLE, lambda held: None, metadata=False),
        r"embedding.safetensors: its metadata do not tell bits and group size",
    ),
    "settings that are a list": (changed(ENDS, lambda _: [1]), r"generation_config.json: is not a mapping"),
    "an end that is text": (
        changed(ENDS, lambda held: held | {"eos_token_id": "</s>"}),
        r"generation_config.json: eos_token_id: is '</s>'; accepted: a token's number, a list",
    ),
    "an end among ids": (
        changed(ENDS, lambda held: held | {"eos_token_id": [1, "x"]}),
        r"generation_config.json: eos_token_id",
    ),
    "several beginnings": (
        changed(ENDS, lambda held: held | {"bos_token_id": [0]}),
        r"generation_config.json: bos_token_id: is '\[0\]'; accepted: a token's number or null",
    ),
    "an end in config.json": (
        changed(CONFIG, lambda held: held | {"eos_token_id": {"id": 1}}),
        r"config.json: eos_token_id",
    ),
    "no groups": (
        changed(CONFIG, lambda held: held["quantization_config"].pop("config_groups") and None),
        rf"{GROUPS}: is missing",
    ),
    "a group that is none": (
        changed(CONFIG, lambda held: held["quantization_config"]["config_groups"].update(group_0=4)),
        rf"{GROUPS}.group_0: is '4'",
    ),
    "no group size": (
        grouped(lambda group: group["weights"].pop("group_size")),
        rf"{GROUPS}.group_0.weights.group_size: is missing",
    ),
    "bits": (grouped(lambda group: group["weights"].update(num_bits=5)), r"num_bits: is '5'; accepted: 2, 3, 4, 8"),
    "a target too few": (grouped(lambda group: group["targets"].pop(0)), rf"{GROUPS}: no group has the target {Q}"),
    "a target that is no pattern": (grouped(lambda group: group["targets"].append("re:(")), r"targets: is 'a pattern"),
    "a norm of length 1": (
        tensors(MODEL, put(NORM, lambda norm: norm[:1])),
        rf"model.safetensors: {NORM}: has shape \[1\], and config.json gives it \[64\]",
    ),
    "a norm less": (tensors(MODEL, lambda held: held.pop(NORM)), rf"model.safetensors: has no tensor '{NORM}'"),
    "codes of another shape": (
        tensors(MODEL, put(f"{Q}.weight_shape", lambda shape: shape + 1)),
        rf"{Q}.weight: has shape \[129, 65\], and config.json gives it \[128, 64\]",
    ),
    "a recipe of bytes": (lambda d: (d / "recipe.yaml").write_bytes(b"\xff\xfe"), r"recipe.yaml: is not valid YAML"),
    "a recipe that is a list": (lambda d: (d / "recipe.yaml").write_text("- 1\n"), r"recipe.yaml: is not a recipe"),
    "config that is a list": (lambda d: (d / CONFIG).write_text("[]"), r"config.json: is not a quantized checkpoint"),
}


@pytest.mark.parametrize("runtime", sorted(EXPORTERS))
@pytest.mark.parametrize("damage", DAMAGES)
def test_damages(damage: str, runtime: str, smoothed: Path, tmp_path: Path) -> None:
    do, match = DAMAGES[damage]
    shutil.copytree(smoothed, tmp_path / "checkpoint")
    do(tmp_path / "checkpoint")
    with pytest.raises(BoaEdgeError, match=match) as caught:
        export(tmp_path / "checkpoint", runtime, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "checkpoint"))
    assert not (tmp_path / "bundle").exists()


def test_what_is_stored_is_what_the_reference_is_of(tmp_path: Path, text_file: Path) -> None:
    """Biases that a rotation has changed are no bfloat16 numbers any more."""
    path = make_model(tmp_path / "model", tiny_config(attention_bias=True, dtype="bfloat16"))
    tensors = {name: value.bfloat16() for name, value in load_file(path / "model.safetensors").items()}
    for name, value in tensors.items():
        if name.endswith(".bias"):
            tensors[name] = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    recipe = parse_recipe({**RECIPE, "transforms": ["rotateuntied"]}, "test")
    quantize(str(path), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert {value.dtype for name, value in stored.items() if name.endswith(".bias")} == {torch.float32}
    reference = load_file(tmp_path / "checkpoint" / "reference.safetensors")
    logits = open_subject(str(tmp_path / "checkpoint")).logits(reference["tokens"][None])[0]
    assert torch.allclose(logits, reference["quantized_logits"], atol=2e-4)
