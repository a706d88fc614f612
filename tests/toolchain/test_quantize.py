"""The first stage from end to end on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from boa_edge.errors import BoaEdgeError, UsageError
from tests.conftest import make_model, tiny_config
from toolchain.calibration import Calibration, load_calibration
from toolchain.checkpoint import Checkpoint
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import load_source
from toolchain.quantize import quantize
from toolchain.recipe import CalibrationSize, Recipe, load_recipe, parse_recipe
from toolchain.resume import ResumeFile
from toolchain.run import quantize_model

SMALL = {"sequences": 12, "sequence_length": 64, "held_out_sequences": 3}


def recipe(method: str = "boa", **weights: object) -> Recipe:
    settings = {"bits": 4, "group_size": 32, "symmetric": True} | weights
    return parse_recipe({"method": method, "weights": settings, "calibration": SMALL}, "test")


def codes(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "embedding.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def check_against_the_decompressor(directory: Path, checkpoint: Checkpoint, names: list[str]) -> None:
    stored = codes(directory)
    group = checkpoint.config["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(group)
    for name in names:
        parts = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(f"{name}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.equal(theirs.float(), checkpoint.quantized(name).dequantize())


@pytest.mark.parametrize(
    "chosen",
    [
        recipe("boa"),
        recipe("boa", bits=3, group_size=None, symmetric=False),
        recipe("gptq", bits=2, group_size=16, symmetric=False),
        recipe("rtn", bits=8, group_size=None),
    ],
    ids=lambda chosen: chosen.name,
)
@pytest.mark.parametrize("tied", [True, False])
def test_other_tools_load_the_checkpoint_and_get_the_same_logits(
    chosen: Recipe, tied: bool, model_factory: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = model_factory(tie_word_embeddings=tied)
    quantize(str(model), tmp_path / "ckpt", recipe=chosen, calibration=str(text_file))
    checkpoint = Checkpoint(tmp_path / "ckpt")
    source = load_source(str(model))
    names = [name for layer in source.spec.layer_names for name in layer.linears()]
    assert all(checkpoint.is_quantized(name) for name in [*names, "model.embed_tokens", "lm_head"])
    weights = {name: checkpoint.quantized(name) for name in [*names, "model.embed_tokens"]}
    if not tied:
        weights["lm_head"] = checkpoint.quantized("lm_head")
    tokens = torch.arange(40)[None] % 264
    expected = FakeQuantized(source.model, source.spec, weights).logits(tokens)
    if chosen.weights.symmetric:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt", dtype=torch.float32).eval()
        with torch.no_grad():
            assert torch.allclose(loaded(tokens).logits, expected, atol=2e-4)
            reference = load_file(tmp_path / "ckpt" / "reference.safetensors")
            again = loaded(reference["tokens"][None]).logits[0]
        assert torch.allclose(again, reference["quantized_logits"], atol=2e-4)
    else:
        # compressed-tensors 0.20 under transformers 5.23 expects unpacked zero points while it loads, against its own
        # layout; what its decompressor makes of our tensors is checked instead.
        check_against_the_decompressor(tmp_path / "ckpt", checkpoint, names)
    assert AutoTokenizer.from_pretrained(tmp_path / "ckpt")("abc")["input_ids"] == source.tokenizer("abc")["input_ids"]


def test_boa_beats_gptq_beats_rounding_on_what_each_block_puts_out(tiny_model: Path, text_file: Path) -> None:
    source = load_source(str(tiny_model))
    text = load_calibration(str(text_file), source, CalibrationSize(**SMALL), 0)
    errors = {}
    for method in ("rtn", "gptq", "boa"):
        chosen = recipe(method, bits=2, group_size=None, symmetric=False)
        quantized = quantize_model(source, chosen, text.sequences)
        fake = FakeQuantized(source.model, source.spec, quantized.weights)
        plain = FakeQuantized(source.model, source.spec, {})
        with torch.no_grad():
            rows = text.sequences
            errors[method] = float((fake.logits(rows) - plain.logits(rows)).square().mean())
    assert errors["boa"] < errors["gptq"] < errors["rtn"]


def test_quantizing_leaves_the_model_untouched_and_repeats_itself(tiny_model: Path, text_file: Path) -> None:
    source = load_source(str(tiny_model))
    text = load_calibration(str(text_file), source, CalibrationSize(**SMALL), 0)
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    first = quantize_model(source, recipe(), text.sequences)
    second = quantize_model(source, recipe(), text.sequences)
    assert same(before, dict(source.model.state_dict()))
    for name, weight in first.weights.items():
        assert torch.equal(weight.codes, second.weights[name].codes)


def test_a_stopped_run_resumes_to_the_same_codes(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(str(tiny_model), tmp_path / "whole", recipe=recipe(), calibration=str(text_file))
    real_save = ResumeFile.save

    def stop_after_one(self: ResumeFile, index: int, *block: object) -> None:
        real_save(self, index, *block)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumeFile, "save", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(tiny_model), tmp_path / "stopped", recipe=recipe(), calibration=str(text_file))
    assert not (tmp_path / "stopped").exists()
    solved: list[int] = []

    def note(self: ResumeFile, index: int, *block: object) -> None:
        solved.append(index)
        real_save(self, index, *block)  # type: ignore[arg-type]

    monkeypatch.setattr(ResumeFile, "save", note)
    quantize(str(tiny_model), tmp_path / "stopped", recipe=recipe(), calibration=str(text_file))
    assert solved == [1]
    assert same(codes(tmp_path / "whole"), codes(tmp_path / "stopped"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_runs_blocks_are_refused_by_name(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_save, blocks = ResumeFile.save, 0

    def stop(self: ResumeFile, index: int, *block: object) -> None:
        if blocks:
            real_save(self, index, *block)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumeFile, "save", stop)
    for bits in (4, 3):  # the first run has finished no block: nothing is lost when the second begins
        with pytest.raises(KeyboardInterrupt):
            quantize(str(tiny_model), tmp_path / "out", recipe=recipe(bits=bits), calibration=str(text_file))
        blocks += 1
    with pytest.raises(BoaEdgeError, match="differs from this one in: recipe"):
        quantize(str(tiny_model), tmp_path / "out", recipe=recipe(), calibration=str(text_file))


def test_two_runs_to_one_output_do_not_share_finished_blocks(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_save, refusals = ResumeFile.save, []

    def save(self: ResumeFile, index: int, *block: object) -> None:
        real_save(self, index, *block)  # type: ignore[arg-type]
        with pytest.raises(BoaEdgeError, match=r"another process works on the same output.*another -o") as caught:
            quantize(str(tiny_model), tmp_path / "out", recipe=recipe(), calibration=str(text_file))
        refusals.append(caught)

    monkeypatch.setattr(ResumeFile, "save", save)
    quantize(str(tiny_model), tmp_path / "out", recipe=recipe(), calibration=str(text_file))
    assert len(refusals) == 2
    assert (tmp_path / "out" / "provenance.json").exists()


def test_a_resumed_run_counts_the_time_before(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_save = ResumeFile.save

    def stop(self: ResumeFile, index: int, *block: object) -> None:
        self._start -= 1000  # as if it had worked so long
        real_save(self, index, *block)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ResumeFile, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(tiny_model), tmp_path / "out", recipe=recipe(), calibration=str(text_file))
    quantize(str(tiny_model), tmp_path / "out", recipe=recipe(), calibration=str(text_file))
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert 1000 < provenance["comparison"][-1]["seconds"] < 1100
    assert 1000 < provenance["seconds"] < 1100


def test_text_that_the_model_writes_itself_is_seeded(tiny_model: Path) -> None:
    source = load_source(str(tiny_model))
    size = CalibrationSize(sequences=4, sequence_length=24, held_out_sequences=1)
    first, again, other = (load_calibration("self", source, size, seed) for seed in (0, 0, 1))
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    assert first.sequences.shape == (4, 24)
    assert first.held_out.shape == (1, 24)
    assert not first.overlap
    assert bool((first.sequences[:, 0] == source.tokenizer.bos_token_id).all())
    assert len({tuple(row) for row in first.sequences.tolist()}) == 4


def test_held_out_text_is_not_calibrated_on(tiny_model: Path, text_file: Path) -> None:
    source = load_source(str(tiny_model))
    text = load_calibration(str(text_file), source, CalibrationSize(**SMALL), 0)
    assert text.sequences.shape == (12, 64)
    assert text.held_out.shape == (3, 64)
    seen = {tuple(row) for row in text.sequences.tolist()}
    assert not any(tuple(row) in seen for row in text.held_out.tolist())


@pytest.mark.parametrize(("held", "judged", "scored"), [(1, 1, 1), (2, 2, 2), (3, 1, 2), (8, 2, 6), (12, 4, 8)])
def test_the_guard_does_not_choose_by_what_is_scored(held: int, judged: int, scored: int) -> None:
    rows = torch.arange(held).reshape(-1, 1)
    text = Calibration(rows, rows, False, {})
    assert (text.judged.numel(), text.scored.numel()) == (judged, scored)
    shared = set(text.judged.flatten().tolist()) & set(text.scored.flatten().tolist())
    assert bool(shared) == text.judges_scored == (held < 3)
    assert set(torch.cat([text.judged, text.scored]).flatten().tolist()) == set(range(held))


def test_provenance_names_source_calibration_and_losses(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    result = quantize(
        str(tiny_model), tmp_path / "ckpt", recipe=recipe(), calibration=str(text_file), compare=("rtn", "gptq")
    )
    provenance = json.loads((tmp_path / "ckpt" / "provenance.json").read_text())
    assert set(provenance["source"]["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert provenance["calibration"]["tokens"] == 12 * 64
    assert provenance["evaluation"]["tokens"] == 2 * 64  # of three held-out sequences one is the guard's
    assert len(provenance["layers"]) == 14
    assert all(layer["loss"] >= 0 and 0 <= layer["relative_loss"] < 1 for layer in provenance["layers"])
    assert [row["method"] for row in provenance["comparison"]] == ["rtn", "gptq", "boa"]
    assert result.as_dict()["kl"] == round(provenance["comparison"][-1]["kl"], 5)
    assert load_recipe(str(tmp_path / "ckpt" / "recipe.yaml")) == recipe()


def test_a_method_is_compared_with_itself_changed(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Both keep their finished blocks, and the rows of the report can be told apart."""
    changed = parse_recipe({**recipe().model_dump(), "solver": {"refits": 1}}, "test")
    quantize(str(tiny_model), tmp_path / "ckpt", recipe=changed, calibration=str(text_file), compare=("boa",))
    rows = json.loads((tmp_path / "ckpt" / "provenance.json").read_text())["comparison"]
    assert [row["recipe"] for row in rows] == ["w4g32-boa", "w4g32-boa+solver"]
    assert rows[0]["kl"] != rows[1]["kl"]
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_mistral_and_rope_scaling_and_biases_are_served(tmp_path: Path, text_file: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    llama = make_model(tmp_path / "llama", tiny_config(rope_parameters=scaling, attention_bias=True, mlp_bias=True))
    settings = {key: getattr(tiny_config(), key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    mistral = MistralConfig(
        **settings, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=264, sliding_window=64
    )
    for model in (llama, make_model(tmp_path / "mistral", mistral)):
        quantize(str(model), tmp_path / f"{model.name}-ckpt", recipe=recipe(), calibration=str(text_file))
        inv_freq = load_source(str(model)).model.model.rotary_emb.inv_freq
        spec = Checkpoint(tmp_path / f"{model.name}-ckpt").spec
        assert torch.allclose(torch.tensor(spec.rope_inv_freq), inv_freq)


def test_a_group_that_does_not_divide_is_refused_with_those_that_do(tmp_path: Path, text_file: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(intermediate_size=96))
    with pytest.raises(UsageError) as caught:
        quantize(str(model), tmp_path / "ckpt", recipe=recipe(group_size=64), calibration=str(text_file))
    assert "group size 64 does not divide the 96 inputs of model.layers.0.mlp.down_proj" in str(caught.value)
    assert "16, 32 (or none: per output channel)" in str(caught.value)
    assert not (tmp_path / "ckpt").exists()


def test_an_existing_output_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "precious").write_text("x")
    with pytest.raises(UsageError, match="exists already"):
        quantize(str(tiny_model), tmp_path / "ckpt", recipe=recipe())
    assert (tmp_path / "ckpt" / "precious").read_text() == "x"
