"""Mixed precision: the allocation against brute force, predictions against real errors, and a run under a budget."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from boa_edge.errors import UsageError
from tests.conftest import byte_tokenizer, make_model, tiny_config
from toolchain.allocation import Item, allocate, check_budget, fixed_bytes, module_bytes
from toolchain.block import BlockRunner, Stream
from toolchain.calibration import load_calibration
from toolchain.checkpoint import Checkpoint
from toolchain.entry import decoder_layers, entry, own_attention
from toolchain.grids import find_grid
from toolchain.loading import SourceModel, load_source
from toolchain.quantize import quantize
from toolchain.quantized import SUPPORTED_BITS, payload_size
from toolchain.recipe import CalibrationSize, Recipe, load_recipe, parse_recipe
from toolchain.resume import ResumeFile
from toolchain.sensitivity import predict_errors
from toolchain.solvers import gptq
from toolchain.solvers.linear_algebra import inverse_factor
from toolchain.transforms import RotateResidual, apply

SMALL = {"sequences": 6, "sequence_length": 48, "held_out_sequences": 1}
FORMAT = load_recipe("w4g32-gptq").grid_format


def mixed(budget: float, method: str = "gptq") -> Recipe:
    weights = {"bits": "auto", "budget_mb": budget, "group_size": 32}
    return parse_recipe({"method": method, "weights": weights, "calibration": SMALL}, "test")


def items(seed: int, count: int = 6, *, coarse: bool = True) -> list[Item]:
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        size = int(generator.integers(1, 9)) * (96 if coarse else 97 + index)
        errors = np.sort(generator.random(4))[::-1] * generator.random()
        sizes = {bits: size * bits + 13 for bits in SUPPORTED_BITS}
        made.append(Item(f"m{index}", sizes, dict(zip(SUPPORTED_BITS, errors.tolist(), strict=True))))
    return made


def total(chosen: dict[str, int], of: list[Item], what: str) -> float:
    return sum(getattr(item, what)[chosen[item.name]] for item in of)


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_no_allocation_within_the_budget_has_a_smaller_error(seed: int, coarse: bool) -> None:
    every = items(seed, coarse=coarse)
    least = sum(item.bytes[2] for item in every)
    most = sum(item.bytes[8] for item in every)
    choices = [
        (
            sum(i.bytes[b] for i, b in zip(every, bits, strict=True)),
            sum(i.errors[b] for i, b in zip(every, bits, strict=True)),
        )
        for bits in itertools.product(SUPPORTED_BITS, repeat=len(every))
    ]
    before = math.inf
    for budget in np.linspace(least, most + 50, 23).astype(int).tolist():
        chosen = allocate(every, budget)
        assert total(chosen, every, "bytes") <= budget
        error = total(chosen, every, "errors")
        assert error == pytest.approx(min(error for size, error in choices if size <= budget))
        assert error <= before + 1e-12
        before = error
    assert set(chosen.values()) == {8}


def test_a_budget_below_two_bits_is_refused() -> None:
    every = items(0)
    with pytest.raises(ValueError, match="lacks 1 bytes"):
        allocate(every, sum(item.bytes[2] for item in every) - 1)


def test_prices_without_a_common_divisor_are_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.allocation._TABLE", 50)
    every = items(3, 12, coarse=False)
    budget = sum(item.bytes[3] for item in every)
    before = math.inf
    for spare in range(0, budget, budget // 40):
        chosen = allocate(every, budget + spare)
        assert total(chosen, every, "bytes") <= budget + spare
        assert total(chosen, every, "errors") <= before + 1e-12
        before = total(chosen, every, "errors")


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().to(torch.float64)


def test_predicted_errors_follow_the_errors_that_are_made(tiny_model: Path, text_file: Path) -> None:
    source = load_source(str(tiny_model))
    text = load_calibration(str(text_file), source, CalibrationSize(**SMALL), 0)
    predicted, real = [], []
    with torch.inference_mode(), own_attention(source.model):
        arguments, embed = entry(source.model, text.sequences.shape[1])
        stream = Stream([embed(batch) for batch in text.sequences.split(2)])
        for index, names in enumerate(source.spec.layer_names):
            modules = {name: source.model.get_submodule(name) for name in names.linears()}
            runner = BlockRunner(
                decoder_layers(source.model)[index], names.parts(), modules, arguments[index], index=index
            )
            errors = predict_errors(runner, source.spec, stream, None, {}, FORMAT, 0.01)
            inputs = [runner.run(stream, b, final=False, inputs=tuple(names.parts())) for b in range(3)]
            for role, by_bits in errors.items():
                assert list(by_bits) == sorted(by_bits)
                assert sorted(by_bits.values(), reverse=True) == list(by_bits.values())
                x = torch.cat([taps.inputs[role].reshape(-1, taps.inputs[role].shape[-1]) for taps in inputs])
                hessian = (2 / len(x) * x.mT @ x)[None]
                weight = runner.original(role)[None]
                upper = inverse_factor(hessian, 0.01).upper
                for bits, error in by_bits.items():
                    grid = find_grid(weight, replace(FORMAT, bits=bits), "hessian", hessian)
                    changed = BlockRunner(
                        decoder_layers(source.model)[index], names.parts(), modules, arguments[index], index=index
                    )
                    changed.settle(role, grid.quantized(gptq.solve(weight, upper, grid)).dequantize())
                    relative = []
                    for b in range(3):
                        y = stream.following[b]
                        e = changed.run(stream, b, final=True).hidden - y
                        relative.append(e.square().sum(-1) / y.square().sum(-1))
                    predicted.append(error)
                    real.append(float(torch.cat(relative).mean()))
            stream.advance()
    p, r = torch.tensor(predicted), torch.tensor(real)
    correlation = torch.corrcoef(torch.stack([ranks(p), ranks(r)]))[0, 1]
    print(f"rank correlation {float(correlation):.3f}", (p / r).log().view(2, -1, 4).exp())
    assert correlation > 0.9
    assert float((p / r).log().abs().median()) < 0.7


def uniform_bytes(source: SourceModel, recipe: Recipe, bits: int) -> int:
    return fixed_bytes(source, recipe) + sum(s[bits] for s in module_bytes(source, recipe).values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_keeps_to_its_budget_and_reloads(tied: bool, tmp_path: Path, text_file: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(tie_word_embeddings=tied))
    source = load_source(str(model))
    some = mixed(1.0)
    budget = (uniform_bytes(source, some, 3) + 1000) / 1e6
    result = quantize(str(model), tmp_path / "ckpt", recipe=mixed(budget, "boa"), calibration=str(text_file))
    assert budget * 0.97 < result.as_dict()["payload_bytes"] / 1e6 <= budget
    checkpoint = Checkpoint(tmp_path / "ckpt")
    names = list(source.spec.linear_inputs())
    bits = {name: checkpoint.quantized(name).bits for name in names}
    assert len(set(bits.values())) > 1
    provenance = json.loads((tmp_path / "ckpt" / "provenance.json").read_text())
    assert {layer["name"]: layer["bits"] for layer in provenance["layers"]} == bits
    assert load_recipe(str(tmp_path / "ckpt" / "recipe.yaml")) == mixed(budget, "boa")
    groups = checkpoint.config["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == set(bits.values()) | (set() if tied else {8})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt", dtype=torch.float32).eval()
    plain = load_source(str(model)).model
    plain.load_state_dict(checkpoint.dequantized_state(), strict=False)
    tokens = torch.arange(40)[None] % 264
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, plain(tokens).logits, atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        ("bfloat16", {}),
        ("bfloat16", {"round_scales": False}),
        ("float32", {"embedding": None}),
        ("bfloat16", {"transforms": ["rotateuntied"]}),
    ],
)
def test_the_payload_is_what_the_files_hold(
    dtype: str, change: dict[str, object], tmp_path: Path, text_file: Path
) -> None:
    """But for the quantized table in floating point, which other loaders want."""
    config = tiny_config(dtype=dtype, attention_bias=True)
    model = make_model(tmp_path / "model", config)
    document = json.loads((model / "config.json").read_text()) | {"dtype": dtype}
    (model / "config.json").write_text(json.dumps(document))
    source = load_source(str(model))
    weights = {"bits": "auto", "budget_mb": 1.0, "group_size": 16}
    some = parse_recipe({"method": "rtn", "weights": weights, "calibration": SMALL, **change}, "test")
    budget = (uniform_bytes(source, some, 3) + 1000) / 1e6
    own = parse_recipe({**some.model_dump(), "weights": weights | {"budget_mb": budget}}, "test")
    result = quantize(str(model), tmp_path / "ckpt", recipe=own, calibration=str(text_file))
    stored = load_file(tmp_path / "ckpt" / "model.safetensors")
    if own.embedding is not None:
        del stored[f"{source.spec.embedding}.weight"]
        stored |= {f"table {k}": v for k, v in load_file(tmp_path / "ckpt" / "embedding.safetensors").items()}
    size = sum(value.numel() * value.element_size() for name, value in stored.items() if not name.endswith("_shape"))
    payload = result.as_dict()["payload_bytes"]
    assert payload <= budget * 1e6
    # Codes of 3 bits and zero points are filled up to whole words.
    assert payload <= size <= payload * 1.02


def test_plenty_is_eight_bits_and_too_little_names_the_least(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    source = load_source(str(tiny_model))
    least = uniform_bytes(source, mixed(1.0), 2)
    assert check_budget(source, mixed(10.0)) == 10_000_000 - fixed_bytes(source, mixed(1.0))
    assert check_budget(source, load_recipe("w4g32-boa")) is None
    with pytest.raises(UsageError) as caught:
        quantize(str(tiny_model), tmp_path / "ckpt", recipe=mixed(0.01), calibration=str(text_file))
    named = f"{math.ceil(least / 1e3) / 1e3:.3f}"
    assert f"at 2 bits everywhere the payload is {named} MB" in str(caught.value)
    check_budget(source, mixed(float(named)))
    quantize(str(tiny_model), tmp_path / "least", recipe=mixed(least / 1e6, "rtn"), calibration=str(text_file))
    quantize(str(tiny_model), tmp_path / "most", recipe=mixed(10.0, "rtn"), calibration=str(text_file))
    for directory, bits in (("least", 2), ("most", 8)):
        checkpoint = Checkpoint(tmp_path / directory)
        assert {checkpoint.quantized(name).bits for name in source.spec.linear_inputs()} == {bits}


def test_a_head_that_will_be_untied_is_paid_for_before_any_work(tiny_model: Path) -> None:
    source = load_source(str(tiny_model))
    document = {"method": "gptq", "weights": {"bits": "auto", "budget_mb": 1.0}, "transforms": ["rotateuntied"]}
    recipe = parse_recipe(document, "test")
    tied = parse_recipe(document | {"transforms": []}, "test")
    table = payload_size(264, 64, 1, 8, True, 16)
    assert fixed_bytes(source, recipe) == fixed_bytes(source, tied) + table
    untied, _ = apply(source, [RotateResidual(0, "untied")])
    assert fixed_bytes(source, recipe) == fixed_bytes(untied, recipe)


def test_a_stopped_run_goes_on_with_the_bits_it_has_chosen(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_source(str(tiny_model))
    recipe = mixed((uniform_bytes(source, mixed(1.0), 3) + 1000) / 1e6)
    real_save = ResumeFile.save

    def stop(self: ResumeFile, index: int, *block: object) -> None:
        real_save(self, index, *block)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumeFile, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(tiny_model), tmp_path / "ckpt", recipe=recipe, calibration=str(text_file))
    kept = json.loads((tmp_path / ".ckpt.gptq.unfinished" / "bits.json").read_text())
    monkeypatch.setattr(ResumeFile, "save", real_save)
    monkeypatch.setattr("toolchain.walk.predict_errors", lambda *_: pytest.fail("bits are chosen twice"))
    quantize(str(tiny_model), tmp_path / "ckpt", recipe=recipe, calibration=str(text_file))
    checkpoint = Checkpoint(tmp_path / "ckpt")
    assert {name: checkpoint.quantized(name).bits for name in kept} == kept
    assert not (tmp_path / ".ckpt.gptq.unfinished").exists()


def test_projections_that_share_a_module_share_their_bits(tmp_path: Path, text_file: Path) -> None:
    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=264,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    source = load_source(str(tmp_path / "model"))
    budget = (uniform_bytes(source, mixed(1.0), 3) + 2000) / 1e6
    quantize(str(tmp_path / "model"), tmp_path / "ckpt", recipe=mixed(budget), calibration=str(text_file))
    layers = json.loads((tmp_path / "ckpt" / "provenance.json").read_text())["layers"]
    shared = [layer for layer in layers if ":" in layer["name"]]
    assert len(shared) == 10
    by_module = {layer["name"].partition(":")[0]: set() for layer in shared}
    for layer in shared:
        by_module[layer["name"].partition(":")[0]].add(layer["bits"])
    assert all(len(bits) == 1 for bits in by_module.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: auto", "weights: bits 'auto' need a budget_mb"),
        ("bits: 4, budget_mb: 80", "weights: budget_mb is for bits 'auto', not for 4 bits"),
        ("bits: auto, budget_mb: -1", "weights.budget_mb: Input should be greater than 0"),
        ("bits: auto, budget_mb: much", "weights.budget_mb"),
        ("bits: some, budget_mb: 8", "weights.bits: Input should be 2, 3, 4, 8 or 'auto'"),
    ],
)
def test_a_bad_budget_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"method: boa\nweights: {{{text}}}")
    with pytest.raises(UsageError) as caught:
        load_recipe(str(tmp_path / "r.yaml"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["wmix83mb-edge", "wmix83.5mbg32-boa", "wmix1200mbg64asym-gptq"])
def test_a_budget_is_part_of_the_name(name: str) -> None:
    assert load_recipe(name).name == name
    assert load_recipe(name).weights.bits == "auto"
