"""Instructions that a token and a prompt cost on emulated ARM: our bundles and onnxruntime-genai's own exports.

    python -m benchmarks.instructions PROGRAM... [--device arm64,arm64-i8mm] [--prompt 33] [--kleidiai as-is,on,off]

A PROGRAM is a bundle for ONNX Runtime or a directory that onnxruntime-genai's model builder wrote. One JSON object per
line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json, sha256_file, write_json
from devices import GenerateRequest, open_device
from runtime_tests.cost import cost

KLEIDIAI = "mlas.disable_kleidiai"
NEW_TOKENS = 5
_END = 2**63 - 1


def prepared(program: Path, directory: Path, kleidiai: str) -> Path:
    """`program` once more in `directory`, as the runner takes it, with KleidiAI `as-is`, `on` or `off`.

    Raises:
        BoaEdgeError: it is neither a bundle for ONNX Runtime nor a directory of the builder's.
    """
    if (program / "runtime.json").is_file():
        runtime = read_json(program / "runtime.json", "the bundle's runtime.json")
        model = onnx.load(str(program / runtime["model"]), load_external_data=False)
    elif (program / "genai_config.json").is_file():
        settings = read_json(program / "genai_config.json", "the client's settings")["model"]
        model = onnx.load(str(program / settings["decoder"]["filename"]), load_external_data=False)
        runtime = _of_builder(model, settings)
    else:
        problem = "is neither a bundle nor a directory for onnxruntime-genai"
        raise BoaEdgeError(problem, where=program, fix="Name one that `boa-edge export` or the builder wrote")
    if runtime["runtime"] != "onnx":
        raise BoaEdgeError(f"is a bundle for {runtime['runtime']}", where=program, fix="Name one for ONNX Runtime")
    config = {key: value for key, value in runtime["session_config"].items() if key != KLEIDIAI or kleidiai == "as-is"}
    if kleidiai == "off":
        config[KLEIDIAI] = "1"
    directory.mkdir()
    onnx.save(model, str(directory / "model.onnx"))
    places = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    for place in places:
        (directory / place).symlink_to((program / place).resolve())
    names = ["model.onnx", *sorted(places)]
    files = {name: (directory / name).resolve() for name in names}
    entries = {name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for name, path in files.items()}
    write_json(directory / "runtime.json", runtime | {"model": "model.onnx", "session_config": config})
    write_json(directory / "manifest.json", {"files": entries})
    return directory


def _of_builder(model: onnx.ModelProto, settings: dict[str, Any]) -> dict[str, Any]:
    """Put the builder's graph behind the contract of the fused form: the last position's logits, others on request, and
    caches of a stated shape. Two slices of logits more, which no count shows.
    """
    graph, decoder = model.graph, settings["decoder"]
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == "logits":
                node.output[index] = "logits_as_built"
    given = {"slice/last": -1, "slice/end": _END, "slice/axis": 1, "logits_start": _END}
    graph.initializer.extend(numpy_helper.from_array(np.asarray([at], np.int64), name) for name, at in given.items())
    graph.input.append(helper.make_tensor_value_info("logits_start", TensorProto.INT64, [1]))
    for start, name in (("slice/last", "logits"), ("logits_start", "all_logits")):
        graph.node.append(helper.make_node("Slice", ["logits_as_built", start, "slice/end", "slice/axis"], [name]))
    for value in (*graph.input, *graph.output):
        shape = value.type.tensor_type.shape
        if value.name == "logits":
            shape.dim[1].dim_value = 1
        elif value.name.startswith(("past_key_values.", "present.")):
            shape.dim[3].dim_value = decoder["head_size"]
    shape = ["batch", "positions", settings["vocab_size"]]
    graph.output.append(helper.make_tensor_value_info("all_logits", TensorProto.FLOAT, shape))
    return {
        "runtime": "onnx",
        "form": "fused",
        "session_config": {},
        "context_length": settings["context_length"],
        "vocab_size": settings["vocab_size"],
    }


def counted(program: Path, device: str, prompt: int) -> dict[str, float] | None:
    """Million instructions of a prompt and of one token after it; None where this emulator counts none."""
    vocabulary = read_json(program / "runtime.json", "runtime.json")["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, prompt).tolist()
    found = cost([open_device(device).run(program, GenerateRequest(tuple(tokens), NEW_TOKENS, warmup=0, repeats=1))])
    if found is None:
        return None
    values = {"prompt": found.instructions_prompt.number, "token": found.instructions_per_token.number}
    return {name: round(value / 1e6, 1) for name, value in values.items() if value is not None}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="+", type=Path, metavar="PROGRAM")
    parser.add_argument("--device", default="arm64,arm64-i8mm")
    parser.add_argument("--prompt", type=int, default=33, help="tokens")
    parser.add_argument("--kleidiai", default="as-is", help="as-is, on, off; several with commas")
    chosen = parser.parse_args(arguments)
    for program in chosen.programs:
        for kleidiai in chosen.kleidiai.split(","):
            with tempfile.TemporaryDirectory(prefix="boa-edge-") as scratch:
                ready = prepared(program, Path(scratch) / "program", kleidiai)
                for device in chosen.device.split(","):
                    told = {"program": str(program), "kleidiai": kleidiai, "device": device, "prompt": chosen.prompt}
                    print(
                        json.dumps({**told, "million_instructions": counted(ready, device, chosen.prompt)}), flush=True
                    )


if __name__ == "__main__":
    main()
