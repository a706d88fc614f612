"""Transforms, planned activations and the guard, from the recipe to the checkpoint and into ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import read_json, write_json
from exporters import Bundle, export
from exporters.onnx.session import OnnxDecoder
from runtime_tests.evaluate import evaluate
from toolchain.activations import ActivationFormat, per_block
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import Checkpoint
from toolchain.fake_quantized import FakeQuantized
from toolchain.guard import guard
from toolchain.loading import load_source
from toolchain.loading.streamed import StreamedBlocks
from toolchain.outliers import measure_outliers, observe
from toolchain.prepare import prepare
from toolchain.quantize import quantize
from toolchain.recipe import load_recipe, parse_recipe
from toolchain.run import quantize_model
from toolchain.transforms import install_runtime

SMALL = {"sequences": 8, "sequence_length": 64, "held_out_sequences": 2}


def quantized(model: Path, output: Path, text: Path, **fields: object) -> Checkpoint:
    document = {"method": "gptq", "weights": {"bits": 4, "group_size": 32}, "calibration": SMALL} | fields
    quantize(str(model), output, recipe=parse_recipe(document, "test"), calibration=str(text))
    return Checkpoint(output)


def rebuilt(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """What anybody can make of a checkpoint: its weights, the products that its transforms owe."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaForCausalLM.config_class(**config)).eval()
    model.load_state_dict(checkpoint.dequantized_state(), strict=False)
    model.tie_weights()
    install_runtime(model, checkpoint.spec, checkpoint.transforms)
    return model


def plant(model: Path, output: Path, channels: tuple[int, ...], factor: float) -> Path:
    """The same function with a few channels of the norms' outputs, and of `up`, `factor` times larger."""
    source = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in source.model.layers:
            for channel in channels:
                layer.input_layernorm.weight[channel] *= factor
                layer.post_attention_layernorm.weight[channel] *= factor
                attention, mlp = layer.self_attn, layer.mlp
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                    linear.weight[:, channel] /= factor
                mlp.up_proj.weight[channel] *= factor
                mlp.down_proj.weight[:, channel] /= factor
    source.save_pretrained(output)
    for file in model.iterdir():
        if not (output / file.name).exists():
            (output / file.name).write_bytes(file.read_bytes())
    return output


RECIPES: dict[str, dict[str, object]] = {
    "smooth": {"transforms": ["smooth"], "activations": {}},
    "rotate": {"transforms": ["rotate"], "activations": {"scheme": "per_token"}},
    "untied": {"transforms": ["rotateuntied"], "activations": {}},
    "all": {"transforms": ["rotate", "rotatekeys", "smooth", "rotatedown"], "activations": {"budget": None}},
    "static": {"transforms": ["smooth"], "activations": {"scheme": "static_uint8", "budget": None}},
    "weights": {"transforms": ["rotate", "smooth"]},
    "table": {"transforms": ["rotate", "smooth", "rotatetable"], "activations": {}},
}


def test_the_outliers_that_smoothing_leaves_are_those_of_the_smoothed_model(tiny_model: Path, tmp_path: Path) -> None:
    """They are told while its scales are searched for, not by a second look."""
    source = load_source(str(plant(tiny_model, tmp_path / "planted", (3, 17), 64.0)))
    recipe = parse_recipe(
        {"method": "gptq", "weights": {"bits": 4, "group_size": 32}, "transforms": ["smooth"], "activations": {}},
        "test",
    )
    sequences = torch.randint(0, source.spec.vocab_size, (4, 48), generator=torch.Generator().manual_seed(0))
    told = prepare(source, recipe, sequences)
    seen = observe(told.source, sequences, lambda *_: None, "looking")
    assert [(each.layer, each.place) for each in told.after] == [(each.layer, each.place) for each in seen]
    for found, expected in zip(told.after, seen, strict=True):
        assert found.maximum == pytest.approx(expected.maximum, rel=1e-4)
        assert found.kurtosis == pytest.approx(expected.kurtosis, rel=1e-3)
    pairs = list(zip(told.before, told.after, strict=True))
    assert all(after.maximum < 0.5 * before.maximum for before, after in pairs if before.place in ("attention", "mlp"))


@pytest.mark.parametrize("names", [["rotatetable"], ["rotate", "smooth", "rotatetable"]])
def test_the_head_s_outliers_are_those_of_what_it_takes_in(names: list[str], tiny_model: Path) -> None:
    source = load_source(str(tiny_model))
    recipe = parse_recipe({"method": "gptq", "weights": {"bits": 4, "group_size": 32}, "transforms": names}, "test")
    sequences = torch.randint(0, source.spec.vocab_size, (4, 48), generator=torch.Generator().manual_seed(0))
    told = prepare(source, recipe, sequences)
    seen: list[Tensor] = []
    head = told.source.model.get_submodule(told.source.spec.head)
    hook = head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        told.source.model(sequences)
    hook.remove()
    expected = measure_outliers(-1, "head", seen[0].flatten(0, 1))
    assert told.after[-1].place == "head"
    assert told.after[-1].maximum == pytest.approx(expected.maximum, rel=1e-4)
    assert told.after[-1].maximum != pytest.approx(told.before[-1].maximum, rel=1e-2)


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_holds_all_that_its_logits_depend_on(
    name: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """Codes, transforms and the activation plan, read from disk, give the logits that the quantizer measured."""
    checkpoint = quantized(tiny_model, tmp_path / "ckpt", text_file, **RECIPES[name])
    model, plan = rebuilt(checkpoint), checkpoint.activations
    reference = load_file(tmp_path / "ckpt" / "reference.safetensors")
    fake = FakeQuantized(model, checkpoint.spec, {}, plan)
    with torch.no_grad():
        logits = fake.logits(reference["tokens"][None])[0]
    assert torch.allclose(logits, reference["quantized_logits"], atol=2e-3)
    assert (plan is None) == (name == "weights")
    plain = quantized(tiny_model, tmp_path / "plain", text_file)
    changed = torch.equal(checkpoint.quantized("model.layers.0.mlp.down_proj").codes, _codes(plain))
    assert not changed
    outliers = checkpoint.provenance["outliers"]
    assert len(outliers["before"]) == len(outliers["after"]) == 4 * 2 + 1


def test_other_tools_load_what_they_can_compute_and_refuse_the_rest(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    for name, refused in (("smooth", False), ("untied", False), ("rotate", True)):
        fields = {**RECIPES[name], "activations": None}
        checkpoint = quantized(tiny_model, tmp_path / name, text_file, **fields)
        if refused:
            with pytest.raises(ValueError, match="boa_edge_rotated"):
                AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
            continue
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        reference = load_file(checkpoint.path / "reference.safetensors")
        with torch.no_grad():
            logits = loaded(reference["tokens"][None]).logits[0]
        assert torch.allclose(logits, reference["quantized_logits"], atol=2e-3)


@pytest.mark.parametrize("name", ["all", "smooth"])
def test_a_checkpoint_is_evaluated_as_it_was_scored(
    name: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    checkpoint = quantized(tiny_model, tmp_path / "ckpt", text_file, **RECIPES[name])
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text()[:600])
    found = evaluate(str(checkpoint.path), text, reference=str(tiny_model))
    plain = quantized(tiny_model, tmp_path / "plain", text_file)
    beside = evaluate(str(plain.path), text, reference=str(tiny_model))
    assert found.as_dict()["kl"] < 3 * beside.as_dict()["kl"]


def _codes(checkpoint: Checkpoint) -> Tensor:
    return checkpoint.quantized("model.layers.0.mlp.down_proj").codes


@pytest.mark.parametrize("name", ["smooth", "all", "weights", "table", "static"])
def test_onnx_runtime_computes_what_was_planned(name: str, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Online products and int8 activations included. One block: in deeper models ties of int8 rounding fall apart."""
    source = LlamaForCausalLM.from_pretrained(tiny_model)
    source.model.layers = source.model.layers[:1]
    source.config.num_hidden_layers = 1
    source.config.layer_types = None
    one = tmp_path / "one"
    source.save_pretrained(one)
    for file in tiny_model.iterdir():
        if not (one / file.name).exists():
            (one / file.name).write_bytes(file.read_bytes())
    checkpoint = quantized(one, tmp_path / "ckpt", text_file, **RECIPES[name])
    reference = load_file(tmp_path / "ckpt" / "reference.safetensors")
    export(tmp_path / "ckpt", "onnx", tmp_path / "bundle", activations=None if checkpoint.activations else "float32")
    decoder = OnnxDecoder.open(Bundle.open(tmp_path / "bundle"), threads=1)
    logits = torch.from_numpy(decoder.logits(reference["tokens"][None].numpy()))[0]
    expected = reference["quantized_logits"]
    spread = float(expected.std())
    assert float((logits - expected).abs().mean()) < 2e-4 * spread
    # In two steps through the cache, as a device decodes.
    first, cache = decoder.step(reference["tokens"][None, :20].numpy(), decoder.empty_cache(1))
    second, _ = decoder.step(reference["tokens"][None, 20:].numpy(), cache)
    stepped = torch.from_numpy(np.concatenate([first, second], 1))[0]
    assert float((stepped - logits).abs().mean()) < 2e-4 * spread


def test_smoothing_takes_planted_outliers_out_again(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    planted = plant(tiny_model, tmp_path / "planted", (3, 17), 256.0)
    kl = {}
    for name, model, fields in (
        ("original", tiny_model, {"activations": {"budget": None}, "transforms": ["smooth"]}),
        ("plain", planted, {"activations": {"budget": None}}),
        ("smooth", planted, {"activations": {"budget": None}, "transforms": ["smooth"]}),
    ):
        checkpoint = quantized(model, tmp_path / name, text_file, **fields)
        kl[name] = checkpoint.provenance["comparison"][-1]["kl"]
    assert kl["plain"] > 3 * kl["original"]
    assert kl["smooth"] - kl["original"] < 0.05 * (kl["plain"] - kl["original"])
    before, after = (checkpoint.provenance["outliers"][key] for key in ("before", "after"))
    for was, now in zip(before, after, strict=True):
        if was["place"] in ("attention", "mlp"):
            assert now["kurtosis"] < 0.2 * was["kurtosis"]


def test_the_guard_keeps_the_fewest_linears_that_meet_the_budget(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    planted = plant(tiny_model, tmp_path / "planted", (3, 17), 256.0)
    source = load_source(str(planted))
    recipe = parse_recipe({"method": "rtn", "weights": {"bits": 8, "group_size": 32}}, "test")
    weights = quantize_model(source, recipe, None)
    plan = ActivationPlan(ActivationFormat("per_block"), dict.fromkeys(source.spec.linear_inputs(), 32))
    rows = torch.randint(264, (4, 96), generator=torch.Generator().manual_seed(0))
    free = guard(source, weights, plan, rows, None)
    assert free.plan.kept == frozenset()
    assert not free.costs
    held = guard(source, weights, plan, rows, 1.0)
    assert held.all_kl > 2 * held.weights_kl
    assert held.kl <= 2 * held.weights_kl
    assert 0 < len(held.plan.kept) < len(plan.group_sizes)
    assert list(held.costs.values()) == sorted(held.costs.values(), reverse=True)
    assert held.plan.kept == set(list(held.costs)[: len(held.plan.kept)])
    assert "o_proj" not in next(iter(held.costs))  # which alone reads no planted channel


@pytest.mark.parametrize("together", [1, 3, 1000])
def test_the_guard_measures_every_linear_by_itself(
    tiny_model: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolchain.guard._LOGITS", (together + 1) * 96 * 264)
    loads: list[int] = []
    values = StreamedBlocks._values
    monkeypatch.setattr(StreamedBlocks, "_values", lambda self, index: loads.append(index) or values(self, index))
    source = load_source(str(tiny_model), stream=True)
    weights = quantize_model(source, parse_recipe({"method": "rtn", "weights": {"bits": 8}}, "test"), None)
    plan = ActivationPlan(ActivationFormat("per_token"), dict.fromkeys(source.spec.linear_inputs(), None))
    rows = torch.randint(264, (2, 96), generator=torch.Generator().manual_seed(0))
    model = FakeQuantized(source.model, source.spec, weights.weights)
    loads.clear()
    costs = guard(source, weights, plan, rows, 0.0).costs
    passes = -(-len(plan.group_sizes) // together)
    assert costs.keys() == plan.group_sizes.keys()
    assert len(loads) <= (passes + 40) * source.spec.layers  # 40: the bisection's
    with torch.inference_mode():
        plain = torch.log_softmax(model.logits(rows[:1]), -1)
        for name in plan.group_sizes:
            found = torch.log_softmax(model.with_activations(plan.of([name])).logits(rows[:1]), -1)
            alone = float((plain.exp() * (plain - found)).sum(-1).mean(dtype=torch.float64))
            assert costs[name] == pytest.approx(alone, rel=1e-2, abs=1e-7)


def test_kept_linears_run_in_float32_in_onnx_runtime(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    for symmetric, group in ((True, 32), (False, 32), (False, None)):
        name = f"{symmetric}-{group}"
        weights = {"bits": 4, "group_size": group, "symmetric": symmetric}
        checkpoint = quantized(
            tiny_model, tmp_path / name, text_file, weights=weights, activations={"budget": None}, embedding=None
        )
        plan = checkpoint.activations
        assert plan is not None
        every = plan.keeping(plan.group_sizes)
        write_json(tmp_path / name / "activations.json", every.to_document())
        export(tmp_path / name, "onnx", tmp_path / f"{name}-kept")
        export(tmp_path / name, "onnx", tmp_path / f"{name}-float", activations="float32")
        tokens = np.arange(24)[None] % 264
        kept, plain = (
            OnnxDecoder.open(Bundle.open(tmp_path / f"{name}-{kind}"), threads=1).logits(tokens)
            for kind in ("kept", "float")
        )
        assert np.allclose(kept, plain, atol=2e-5 * np.abs(plain).max())


def test_a_plan_quantizes_what_it_names_and_nothing_else(tiny_model: Path) -> None:
    source = load_source(str(tiny_model))
    module = "model.layers.1.mlp.down_proj"
    plan = ActivationPlan(ActivationFormat("per_block"), {module: 32, "model.layers.0.self_attn.o_proj": 32})
    tokens = torch.arange(30)[None]
    plain = FakeQuantized(source.model, source.spec, {}).logits(tokens)
    one = plan.keeping(["model.layers.0.self_attn.o_proj"])
    got = FakeQuantized(source.model, source.spec, {}, one).logits(tokens)
    hook = source.model.get_submodule(module).register_forward_pre_hook(
        lambda _, inputs: (per_block.fake_quantize(inputs[0], 32),)
    )
    expected = source.model(tokens).logits
    hook.remove()
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)
    assert torch.equal(FakeQuantized(source.model, source.spec, {}).logits(tokens), plain)


def test_a_plan_on_disk_is_checked(tmp_path: Path) -> None:
    good = ActivationPlan(ActivationFormat("static_int8"), {"a": 32, "b": None}, frozenset({"b"}), {"a": (-1.0, 2.0)})
    document = good.to_document()
    assert ActivationPlan.from_document(document, "here") == good
    for change, message in (
        ({"scheme": "per_tensor"}, "per_tensor"),
        ({"kept": ["c"]}, "'c' is no module"),
        ({"ranges": {}}, "none for 'a'"),
        ({"bits": 7}, "8 bits"),
        ({"group_sizes": [1]}, "activation plan"),
    ):
        with pytest.raises(BoaEdgeError, match=message):
            ActivationPlan.from_document({**document, **change}, "here")
    write_json(tmp_path / "plan.json", document)
    assert ActivationPlan.from_document(read_json(tmp_path / "plan.json", "it"), "here") == good


def test_recipes_spell_activations_and_transforms() -> None:
    recipe = load_recipe("w4g32a8-edge-rotate-smooth")
    assert recipe.activations is not None
    assert recipe.transforms == ("rotate", "smooth")
    assert recipe.name == "w4g32a8-edge-rotate-smooth"
    for letter, scheme in (("", "per_block"), ("t", "per_token"), ("r", "per_row"), ("s", "static_int8")):
        named = load_recipe(f"w4g32a8{letter}-edge")
        assert named.activations is not None
        assert (named.activations.scheme, named.name) == (scheme, f"w4g32a8{letter}-edge")
    for name, message in (
        ("w4g32a8q-edge", r"there is no 'a8q'\. There are: a8 \(per_block\), a8t \(per_token\)"),
        ("w4g32a8-edge-smoth", "transform 'smoth' is unknown; accepted: smooth"),
        ("w4g32-edge-smooth-smooth", "comes twice"),
    ):
        with pytest.raises(UsageError, match=message):
            load_recipe(name)


def test_kurtosis_is_that_of_the_textbook() -> None:
    normal = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    found = measure_outliers(0, "o", normal)
    assert found.kurtosis == pytest.approx(3, abs=0.05)
    assert found.maximum == float(normal.abs().max())
    two = torch.tensor([[1.0, -1.0]])
    assert measure_outliers(0, "o", two).kurtosis == pytest.approx(1)


def test_a_model_without_outliers_is_left_alone_by_the_guard(
    tiny_model: Path, text_file: Path, tmp_path: Path, model_factory: Callable[..., Path]
) -> None:
    checkpoint = quantized(tiny_model, tmp_path / "ckpt", text_file, activations={})
    assert checkpoint.activations is not None
    told = checkpoint.provenance["activations"]
    assert told["kept"] == sorted(checkpoint.activations.kept)
    assert told["kl"] <= 1.1 * told["weights_kl"]
