"""The bundle is whole, and a broken one is named with what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import exporters.onnx
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import sha256_file, write_json
from exporters import Bundle, export, open_decoder
from exporters.onnx.session import open_session
from exporters.signing import verify
from runtime_tests.facts import open_bundle
from tests.exporters.conftest import Tiny

MakeTiny = Callable[..., Tiny]


@pytest.fixture
def bundle(make_tiny: MakeTiny, tmp_path: Path) -> Path:
    export(make_tiny(num_hidden_layers=1).path, "onnx", tmp_path / "bundle")
    return tmp_path / "bundle"


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    write_json(path, document)


def test_contents(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny()
    save_file({}, tiny.path / "reference.safetensors")
    result = export(tiny.path, "onnx", tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    files = {path.relative_to(opened.path).as_posix() for path in opened.path.rglob("*") if path.is_file()}
    assert files == set(opened.manifest.files) | {"manifest.json"}
    assert files == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "kernels.json",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "reference/provenance.json",
        "reference/recipe.yaml",
        "reference/reference.safetensors",
        "runtime.json",
        "tokenizer.json",
    }
    for name, entry in opened.manifest.files.items():
        assert entry.size == (opened.path / name).stat().st_size
        assert entry.sha256 == sha256_file(opened.path / name)
        assert entry.role == ("reference" if name.startswith("reference/") else "runtime")
    assert opened.manifest.recipe == {"bits": 4}
    assert set(opened.manifest.created_by) >= {"boa-edge", "onnx", "onnxruntime"}
    assert "quantization_config" not in json.loads((opened.path / "config.json").read_text())
    runtime = opened.runtime
    assert (runtime.eos_token_ids, runtime.bos_token_id, runtime.context_length) == ((2, 3), 1, 128)
    assert (runtime.vocab_size, runtime.layers, runtime.kv_heads, runtime.head_dim) == (96, 2, 2, 16)
    assert runtime.activations == "int8"
    assert runtime.session_config == {"session.qdq_matmulnbits_accuracy_level": "4", "mlas.disable_kleidiai": "1"}
    document = json.loads(json.dumps(result.as_dict()))
    assert document["size_bytes"] == sum(e.size for e in opened.manifest.files.values() if e.role == "runtime")
    assert document["bundle"] == str(tmp_path / "bundle")


def test_a_moved_bundle_loads(bundle: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "b"
    moved.parent.mkdir()
    shutil.move(bundle, moved)
    assert open_session(Bundle.open(moved), threads=1).get_inputs()[0].name == "input_ids"


def test_same_bytes_each_time(make_tiny: MakeTiny, bundle: Path, tmp_path: Path) -> None:
    export(tmp_path / "checkpoint", "onnx", tmp_path / "again")
    for name in ("model.onnx", "model.onnx.data", "runtime.json"):
        assert sha256_file(bundle / name) == sha256_file(tmp_path / "again" / name)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "runtime.json", "tokenizer.json"])
def test_altered_missing_and_truncated_files(name: str, bundle: Path) -> None:
    path = bundle / name
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(BoaEdgeError, match=rf"{name}: has SHA-256 [0-9a-f]{{64}}, manifest.json says .*Copy it again"):
        Bundle.open(bundle)
    path.write_bytes(whole[:-1])
    with pytest.raises(BoaEdgeError, match=rf"{name}: has {len(whole) - 1} bytes, manifest.json says {len(whole)}"):
        Bundle.open(bundle)
    path.unlink()
    with pytest.raises(BoaEdgeError, match=f"{name}: is missing"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "link"])
def test_a_manifest_cannot_leave_the_bundle(name: str, bundle: Path) -> None:
    (bundle.parent / "outside").write_text("x")
    (bundle / "link").symlink_to(bundle.parent / "outside")
    entry = {"size": 1, "sha256": "0" * 64, "role": "runtime"}
    rewrite(bundle / "manifest.json", lambda document: document["files"].update({name: entry}))
    with pytest.raises(BoaEdgeError, match="outside the bundle"):
        Bundle.open(bundle)


def test_foreign_documents(bundle: Path, tmp_path: Path) -> None:
    manifest = bundle / "manifest.json"
    good = manifest.read_text()
    rewrite(manifest, lambda document: document.update(schema_version=2))
    with pytest.raises(BoaEdgeError, match="schema version 2"):
        Bundle.open(bundle)
    manifest.write_text(good)
    rewrite(manifest, lambda document: document.update(more=1))
    with pytest.raises(BoaEdgeError, match=r"manifest.json: more: "):
        Bundle.open(bundle)
    manifest.write_text(good)
    rewrite(manifest, lambda document: document["files"].pop("runtime.json"))
    with pytest.raises(BoaEdgeError, match=r"does not list runtime.json"):
        Bundle.open(bundle)
    manifest.write_text("{")
    with pytest.raises(BoaEdgeError, match="not valid JSON"):
        Bundle.open(bundle)
    manifest.unlink()
    with pytest.raises(BoaEdgeError, match="is not a bundle"):
        Bundle.open(bundle)
    with pytest.raises(BoaEdgeError, match="no such bundle"):
        Bundle.open(tmp_path / "nothing")


def test_runtime_settings_are_checked(bundle: Path) -> None:
    path = bundle / "runtime.json"
    good = json.loads(path.read_text())

    def opened(**changes: object) -> Bundle:
        write_json(path, {**good, **changes})
        entry = {"size": path.stat().st_size, "sha256": sha256_file(path), "role": "runtime"}
        rewrite(bundle / "manifest.json", lambda document: document["files"].update({"runtime.json": entry}))
        return Bundle.open(bundle)

    with pytest.raises(BoaEdgeError, match=r"runtime.json: unknown: "):
        opened(unknown=1)
    with pytest.raises(BoaEdgeError, match=r"runtime.json: activations: "):
        opened(activations="int4")
    with pytest.raises(BoaEdgeError, match=r"model 'other.onnx'"):
        opened(model="other.onnx")
    with pytest.raises(BoaEdgeError, match=r"the form llm has a prefill_length"):
        opened(prefill_length=8)
    with pytest.raises(BoaEdgeError, match=r"prefill_length 129 exceeds context_length 128"):
        opened(form="llm", prefill_length=129)
    with pytest.raises(BoaEdgeError, match=r"is a bundle for 'executorch'"):
        open_session(opened(runtime="executorch"))


def listed(bundle: Path, name: str) -> None:
    """Have the manifest say what `name` is now."""
    path = bundle / name
    entry = {"size": path.stat().st_size, "sha256": sha256_file(path), "role": "runtime"}
    rewrite(bundle / "manifest.json", lambda document: document["files"].update({name: entry}))


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json", "reference/provenance.json"])
def test_what_the_manifest_no_longer_lists(name: str, bundle: Path) -> None:
    rewrite(bundle / "manifest.json", lambda document: document["files"].pop(name))
    for opened in (Bundle.open, verify, open_bundle):
        with pytest.raises(BoaEdgeError, match=rf"{name}: is not in manifest\.json.*Remove it"):
            opened(bundle)


def test_strangers(bundle: Path) -> None:
    for name, make in (
        ("more.json", lambda path: path.write_text("{}")),
        ("link", lambda path: path.symlink_to("/etc", target_is_directory=True)),
        ("pipe", os.mkfifo),
    ):
        make(bundle / name)
        with pytest.raises(BoaEdgeError, match=rf"{name}: is not in manifest\.json"):
            Bundle.open(bundle)
        (bundle / name).unlink()
    (bundle / "empty").mkdir()
    Bundle.open(bundle)


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "\ud800"])
def test_names_that_no_file_has(name: str, bundle: Path) -> None:
    entry = {"size": 0, "sha256": "0" * 64, "role": "runtime"}
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    document["files"][name] = entry
    path.write_text(json.dumps(document))
    with pytest.raises(BoaEdgeError, match=r"manifest\.json: lists .*, which is no file's name \("):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "runtime.json"])
def test_documents_that_are_nested_too_deeply(name: str, bundle: Path) -> None:
    (bundle / name).write_text("[" * 100_000)
    if name != "manifest.json":
        listed(bundle, name)
    with pytest.raises(BoaEdgeError, match=rf"{name}: .*nested too deeply"):
        Bundle.open(bundle)


@pytest.mark.parametrize(("field", "value"), [("layers", 3), ("form", "fused"), ("vocab_size", 10)])
def test_settings_that_contradict_the_graph(field: str, value: Any, bundle: Path) -> None:
    rewrite(bundle / "runtime.json", lambda document: document.update({field: value}))
    listed(bundle, "runtime.json")
    with pytest.raises(BoaEdgeError, match=rf"runtime\.json: {field} is '?{value}'?, but model\.onnx has"):
        open_decoder(Bundle.open(bundle))


def test_an_option_without_a_name(bundle: Path) -> None:
    rewrite(bundle / "runtime.json", lambda document: document["session_config"].update({"": "x"}))
    listed(bundle, "runtime.json")
    with pytest.raises(BoaEdgeError, match=r"runtime\.json: session_config: an option has no name"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id: is '</s>'; accepted: .*number"),
        ({"eos_token_id": [2, None]}, "eos_token_id: is .*accepted: "),
        ({"bos_token_id": "<s>"}, "bos_token_id: is '<s>'; accepted: "),
        ([1], "is not a mapping"),
    ],
)
def test_token_ids_that_are_none(settings: Any, says: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(num_hidden_layers=1)
    write_json(tiny.path / "generation_config.json", settings)
    with pytest.raises(BoaEdgeError, match=rf"generation_config\.json: {says}"):
        export(tiny.path, "onnx", tmp_path / "bundle")


def test_usage_errors(make_tiny: MakeTiny, bundle: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(UsageError, match=r"unknown runtime 'onyx'.*Did you mean 'onnx'\? Known: executorch, onnx"):
        export(checkpoint, "onyx", tmp_path / "new")
    with pytest.raises(UsageError, match="unknown activation type 'int4'"):
        export(checkpoint, "onnx", tmp_path / "new", activations="int4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="exists already"):
        export(checkpoint, "onnx", bundle)
    with pytest.raises(BoaEdgeError, match="no such quantized checkpoint"):
        export(tmp_path / "nothing", "onnx", tmp_path / "new")
    export(checkpoint, "onnx", bundle, overwrite=True)
    Bundle.open(bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_nothing_is_left_behind(make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny()

    def broken(*_: object, **__: object) -> None:
        raise BoaEdgeError("the smoke test failed")

    monkeypatch.setattr(exporters.onnx, "verify", broken)
    with pytest.raises(BoaEdgeError, match="smoke"):
        export(tiny.path, "onnx", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_damaged_checkpoint(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny()
    weights = tiny.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BoaEdgeError, match=r"model.safetensors: is truncated or damaged"):
        export(tiny.path, "onnx", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_weights_that_are_not_finite(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(num_hidden_layers=1)
    tensors = load_file(tiny.path / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, tiny.path / "model.safetensors")
    with pytest.raises(BoaEdgeError, match=r"checkpoint: the model\.onnx made of it: .*not finite.*quantize again"):
        export(tiny.path, "onnx", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
