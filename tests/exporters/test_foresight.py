"""What an export could not hold is refused before anything is quantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from boa_edge.errors import UsageError
from boa_edge.pipeline import default_recipe, run_all
from exporters import EXPORTERS, Request
from exporters.bundle import Form
from tests.conftest import make_model, tiny_config
from tests.toolchain.families import CONFIGS
from tests.toolchain.test_gguf_families import model_of, write
from toolchain.families import describe
from toolchain.recipe import DEFAULT_RECIPE, load_recipe, parse_recipe


def recipe(**fields: Any) -> Any:
    weights = {"bits": 4, "group_size": 32, "symmetric": True} | fields.pop("weights", {})
    return parse_recipe({"method": "rtn", "weights": weights, **fields}, "test")


WITHOUT_GROUPS = ("fused-int8",)
REFUSED = {
    "executorch": [
        ({"weights": {"symmetric": False}}, "zero points"),
        ({"weights": {"group_size": 48}}, "multiples of 32"),
        ({"weights": {"bits": 8}}, "8-bit weights in groups"),
        ({"weights": {"bits": "auto", "budget_mb": 90.0}}, "8-bit weights in groups"),
        ({"round_scales": False}, "bfloat16"),
        ({"embedding": {"bits": 8, "group_size": 32}}, "8-bit table in groups"),
        ({"embedding": {"bits": 4, "group_size": 16}}, "multiples of 32"),
        ({"kv_cache": {}}, "float32"),
        ({"activations": {"scheme": "static_int8"}}, "static_int8"),
    ],
    "onnx": [
        ({"weights": {"group_size": 48}}, "groups of 48"),
        ({"embedding": {"bits": 8, "group_size": 48}}, "groups of 48"),
        ({"kv_cache": {"scheme": "per_token"}}, "no scale for each token"),
    ],
}


@pytest.mark.parametrize(
    ("runtime", "fields", "says"), [(name, *case) for name, cases in REFUSED.items() for case in cases]
)
def test_recipes_that_no_program_holds(runtime: str, fields: dict[str, Any], says: str) -> None:
    exporter = EXPORTERS[runtime]
    with pytest.raises(UsageError, match=says):
        exporter.foresee(recipe(**fields), None, Request("int8", exporter.forms[0]))


@pytest.mark.parametrize("form", [form for form in EXPORTERS["onnx"].forms if form != "qdq"])
def test_static_activations_go_into_standard_operators_alone(form: Form) -> None:
    static = recipe(weights={"group_size": None}, activations={"scheme": "static_int8"})
    with pytest.raises(UsageError, match=r"static_int8.*--form qdq"):
        EXPORTERS["onnx"].foresee(static, None, Request("int8", form))
    EXPORTERS["onnx"].foresee(static, None, Request("int8", "qdq"))


@pytest.mark.parametrize("runtime", sorted(EXPORTERS))
def test_the_default_recipe_suits_every_runtime(runtime: str) -> None:
    """And the one that a runtime has for itself has its activations."""
    exporter = EXPORTERS[runtime]
    own = load_recipe(default_recipe(runtime))
    assert own.activations is not None
    assert own.activations.scheme == {"onnx": "per_block", "executorch": "per_token"}[runtime]
    for form in exporter.forms:
        if form in WITHOUT_GROUPS:
            continue
        for name in (DEFAULT_RECIPE, own.name) + (("w4g32a8kv8-edge",) if runtime == "onnx" else ()):
            exporter.foresee(load_recipe(name), None, Request("int8", form))
    assert default_recipe("all") == DEFAULT_RECIPE


@pytest.mark.parametrize("form", WITHOUT_GROUPS)
def test_forms_for_codes_without_groups(form: str) -> None:
    foresee = EXPORTERS["onnx"].foresee
    foresee(load_recipe("w4a8-edge-smooth"), None, Request("int8", form))
    with pytest.raises(UsageError, match=r"one scale per output channel.*--form fused"):
        foresee(load_recipe(DEFAULT_RECIPE), None, Request("int8", form))


def test_models_that_no_program_holds() -> None:
    foresee = EXPORTERS["executorch"].foresee
    opt = describe(CONFIGS["opt"]().to_dict() | {"architectures": ["OPTForCausalLM"]}, "test")
    foresee(recipe(), opt, Request("int8", "llm"))
    with pytest.raises(UsageError, match=r"no activation 'swish2'.*relu"):
        foresee(recipe(), replace(opt, activation="swish2"), Request("int8", "llm"))
    with pytest.raises(UsageError, match=r"--context.*1 to 128"):
        foresee(recipe(), opt, Request("int8", "llm", context_length=129))


@pytest.mark.parametrize("form", EXPORTERS["onnx"].forms)
def test_models_that_no_graph_holds(form: str) -> None:
    foresee = EXPORTERS["onnx"].foresee
    chosen = recipe(weights={"group_size": None}) if form in WITHOUT_GROUPS else recipe()
    opt = describe(CONFIGS["opt"]().to_dict() | {"architectures": ["OPTForCausalLM"]}, "test")
    foresee(chosen, opt, Request("int8", form))
    with pytest.raises(UsageError, match=r"for want of: activation 'swish2'.*relu"):
        foresee(chosen, replace(opt, activation="swish2"), Request("int8", form))
    narrow = replace(opt, head_dim=12)
    if form == "qdq":
        foresee(chosen, narrow, Request("int8", form))
    else:
        with pytest.raises(UsageError, match=r"heads of 12 channels.*--form qdq"):
            foresee(chosen, narrow, Request("int8", form))


@pytest.mark.parametrize(
    ("runtime", "name", "says"),
    [("executorch", "w3asym-rtn", "zero points"), ("all", "w4g48-rtn", "48"), ("tflite", "w4g32-rtn", "all")],
)
def test_the_pipeline_asks_before_it_works(tmp_path: Path, runtime: str, name: str, says: str) -> None:
    model = make_model(tmp_path / "model", tiny_config())
    with pytest.raises(UsageError, match=says):
        run_all(
            tmp_path / "out",
            model=str(model),
            recipe=name,
            runtime=runtime,
            device="host",
            calibration=None,
            compare=(),
            activations=None,
        )
    assert not (tmp_path / "out").exists()


def test_a_context_that_a_gguf_model_does_not_read_is_refused_before_it_is_quantized(tmp_path: Path) -> None:
    model = write(tmp_path / "m.gguf", "qwen2", model_of("qwen2"))
    with pytest.raises(UsageError, match=r"--context: a context of 9000 tokens.*1 to 128"):
        run_all(
            tmp_path / "out",
            model=str(model),
            recipe="w4g32-rtn",
            runtime="executorch",
            device="host",
            calibration=None,
            compare=(),
            activations=None,
            context_length=9000,
        )
    assert not (tmp_path / "out").exists()


def test_the_pipeline_says_at_once_that_the_device_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class StoppedError(Exception):
        pass

    def stop(*arguments: object, **choices: object) -> None:
        raise StoppedError

    monkeypatch.setattr("boa_edge.pipeline.quantize", stop)
    model = make_model(tmp_path / "model", tiny_config())
    for device, noted in (("ssh", True), ("host", False)):
        with pytest.raises(StoppedError):
            run_all(
                tmp_path / device,
                model=str(model),
                recipe="w4g32-rtn",
                runtime="onnx",
                device=device,
                calibration=None,
                compare=(),
                activations=None,
            )
        assert ("--device ssh:USER@HOST" in capsys.readouterr().err) == noted
