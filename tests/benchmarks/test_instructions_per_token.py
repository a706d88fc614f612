"""Programs of ours and of onnxruntime-genai's builder behind one runner."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime_genai as genai
import pytest

from benchmarks.instructions import KLEIDIAI, prepared
from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json
from devices import GenerateRequest, open_device
from exporters import export
from tests.exporters.conftest import Tiny, make_tiny  # noqa: F401 (a fixture)

REQUEST = GenerateRequest((5, 17, 42), 6, warmup=0, repeats=1)


def ids(program: Path) -> list[int]:
    return [event["id"] for event in open_device("host").run(program, REQUEST).events if event["event"] == "token"]


def test_a_bundle_with_and_without_kleidiai(make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:  # noqa: F811
    export(make_tiny(num_hidden_layers=1).path, "onnx", tmp_path / "bundle", form="fused")
    wanted = ids(tmp_path / "bundle")
    for kleidiai, off in (("as-is", True), ("on", False), ("off", True)):
        ready = prepared(tmp_path / "bundle", tmp_path / kleidiai, kleidiai)
        assert (KLEIDIAI in read_json(ready / "runtime.json", "it")["session_config"]) == off
        assert ids(ready) == wanted
    with pytest.raises(BoaEdgeError, match="neither a bundle nor"):
        prepared(tmp_path, tmp_path / "nothing", "on")


def test_what_the_builder_wrote(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(tiny_model), "-o"]
    command += [str(tmp_path / "built"), "-p", "int4", "-e", "cpu", "-c", str(tmp_path / "cache")]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    ready = prepared(tmp_path / "built", tmp_path / "ready", "as-is")
    assert read_json(ready / "runtime.json", "it")["session_config"] == {}
    parameters = genai.GeneratorParams(model := genai.Model(str(tmp_path / "built")))
    parameters.set_search_options(max_length=len(REQUEST.prompt) + REQUEST.new_tokens, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(list(REQUEST.prompt))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert ids(ready)[: len(found)] == found
