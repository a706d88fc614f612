"""Text that the model writes itself: its distribution, its conventions, its repeatability, its resumption."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.conftest import byte_tokenizer, tiny_config
from toolchain.calibration import kept_text, load_calibration, pool
from toolchain.calibration.chat import ChatFrame, chat_frame
from toolchain.calibration.kept import KeptBatches
from toolchain.calibration.pool import Writer, find_conventions
from toolchain.calibration.script import Conventions, Script, start_token
from toolchain.calibration.sketches import SketchCollector
from toolchain.calibration.stepping import stepping, steps_fast
from toolchain.calibration.writing import draw, write_batch
from toolchain.loading import SourceModel, load_source
from toolchain.quantize import quantize
from toolchain.recipe import CalibrationSize, load_recipe, parse_recipe

_SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
_WINDOWED = _SHAPE | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(tiny_config(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_WINDOWED, query_pre_attn_scalar=16)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_WINDOWED)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SHAPE)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=264,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
        )
    ),
}
# A template in the manner of ChatML, with tokens that the byte tokenizer has.
_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.mark.parametrize("name", _MODELS)
@torch.inference_mode()
def test_stepping_gives_the_logits_of_a_full_forward(name: str) -> None:
    torch.manual_seed(0)
    model = _MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.mul_(3 if parameter.dim() > 1 else 1)
    tokens = torch.randint(264, (3, 24))
    own = model(tokens, use_cache=False).logits
    before = model.config._attn_implementation
    for fast in (True, False):
        with stepping(model, 24, fast=fast) as step:
            logits = torch.stack([step(tokens[:, place : place + 1]) for place in range(24)], 1)
        assert torch.allclose(logits, own, atol=1e-4 * float(own.abs().amax()))
    assert model.config._attn_implementation == before
    assert steps_fast(model)


def test_a_model_that_the_fast_way_does_not_fit_is_written_with_the_ordinary_one(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load_source(str(tiny_model))
    expected = Writer(source, 16, 0).write(2).tokens

    def misfit(*_: object) -> None:
        raise TypeError

    monkeypatch.setattr("toolchain.calibration.stepping.filled_cache", misfit)
    assert torch.equal(Writer(source, 16, 0).write(2).tokens, expected)
    assert "ordinary" in capsys.readouterr().err


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, -1)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    for temperature in (1.0, 2.0):
        drawn, nll = draw(logits, torch.full((4000,), temperature), uniforms)
        shares = torch.bincount(drawn, minlength=4) / 4000
        assert torch.allclose(shares, torch.softmax(logits[0] / temperature, -1), atol=1e-3)
        assert torch.allclose(nll, -torch.log_softmax(logits[0], -1)[drawn], atol=1e-5)
    assert bool((draw(logits, torch.zeros(4000), uniforms)[0] == 2).all())
    last, _ = draw(logits[:1], torch.ones(1), torch.tensor([1.0]))
    assert int(last) == 3


def _conventions(start: int | None = 0, frame: ChatFrame | None = None) -> Conventions:
    prior = np.linspace(1 / 264, 1, 264)
    return Conventions(start, frozenset({1}), prior, frame)


def test_the_start_token_takes_the_place_of_an_end() -> None:
    script = Script(_conventions(), 0, 2, 64)
    assert script.schedule == "plain"
    assert script.first() == 0
    assert [script.take(token) for token in (7, 8, 1, 9)] == [(7, True), (8, True), (0, False), (9, True)]


def test_without_a_start_token_texts_start_with_a_draw_from_the_prior() -> None:
    firsts = {Script(_conventions(start=None), 0, index, 64).first() for index in range(40)}
    assert len(firsts) > 20
    script = Script(_conventions(start=None), 0, 2, 64)
    script.first()
    token, own = script.take(1)
    assert token != 1
    assert not own


def test_schedules_take_turns() -> None:
    hot, greedy, plain = (Script(_conventions(), 0, index, 64) for index in range(3))
    for script in (hot, greedy, plain):
        script.first()
    assert [hot.schedule, greedy.schedule, plain.schedule] == ["hot", "greedy", "plain"]
    heats = []
    for _ in range(20):
        heats.append(hot.temperature())
        hot.take(5)
    assert heats[0] == 2
    assert heats == sorted(heats, reverse=True)
    assert set(heats[16:]) == {1}
    assert greedy.take(5)[1] is False  # drawn from the prior
    cold = 0
    while greedy.temperature() == 0:
        cold += 1
        greedy.take(5)
    assert 3 <= cold <= 5
    assert plain.temperature() == 1


def test_conversations_follow_the_template() -> None:
    tokenizer = byte_tokenizer()
    assert chat_frame(tokenizer) is None
    tokenizer.chat_template = _TEMPLATE
    frame = chat_frame(tokenizer)
    assert frame is not None
    shown = [tokenizer.decode(part) for part in (frame.opening, frame.answer, frame.follow_up)]
    assert shown == ["<s>user:", "</s><s>assistant:", "</s><s>user:"]
    assert start_token(tokenizer, None) == 0
    assert start_token(tokenizer, frame) is None  # it opens turns, not texts
    script = Script(_conventions(frame=frame), 0, 1 + 2 * 2, 400)
    assert script.chat
    assert not Script(_conventions(frame=frame), 0, 0, 400).chat
    written = [script.first()]
    for place in range(150):  # the first turn is cut after 96 tokens, the others end by themselves
        written.append(script.take(1 if place in (120, 135) else 40)[0])
    text = tokenizer.decode(written)
    assert text.startswith("<s>user:")
    assert text.count("</s><s>assistant:") == 2
    assert text.count("</s><s>user:") == 1


def test_a_template_that_cannot_be_taken_apart_is_no_template() -> None:
    tokenizer = byte_tokenizer()
    for template in (
        "{{ raise_exception('no') }}",
        "nothing of the conversation",
        "{{ messages[0]['content'] }}",
        "{%",
    ):
        tokenizer.chat_template = template
        assert chat_frame(tokenizer) is None


def test_half_of_the_pool_is_written_inside_the_template(tiny_model: Path) -> None:
    source = load_source(str(tiny_model))
    source.tokenizer.chat_template = _TEMPLATE
    tokens = Writer(source, 48, 0).write(6).tokens.tolist()
    chats = [source.tokenizer.decode(row).startswith("<s>user:") for row in tokens]
    assert chats == [False, True] * 3
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    bare = dataclasses.replace(source, tokenizer=tokenizer)
    assert find_conventions(bare, 0).start is None
    rows = Writer(bare, 24, 0).write(6).tokens
    assert len(set(rows[:, 0].tolist())) > 1


@torch.inference_mode()
def test_statistics_on_the_way_are_those_of_a_full_forward(tiny_model: Path) -> None:
    source = load_source(str(tiny_model))
    conventions = find_conventions(source, 0)
    scripts = [Script(conventions, 0, index, 20) for index in range(3)]
    written = write_batch(source, scripts, 20, iter(()), fast=True)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        source.model.get_submodule(name).register_forward_pre_hook(lambda _m, x, name=name: seen.update({name: x[0]}))
        for names in source.spec.layer_names
        for name in names.linears()
    ]
    logits = source.model(written.tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    down = source.spec.layer_names[1].down
    inside = seen[down][:, 1:-1]  # not the sink, and not the last token, whose successor nobody asked for
    assert torch.allclose(written.statistics[f"{down}/mean"], inside.mean(1), atol=1e-4)
    assert torch.allclose(written.statistics[f"{down}/square"], inside.square().mean(1), rtol=1e-3, atol=1e-4)
    projection = SketchCollector(source.model, source.spec, 1)._projection(inside.shape[2])
    projected = inside @ projection
    whole = (projected.mT @ projected / inside.shape[1]).square().sum((1, 2))
    assert torch.allclose(written.statistics[f"{down}/sketch"].square().sum(1), whole, rtol=1e-3)
    kinds = {name.rpartition("/")[0].rpartition(".")[2] for name in written.statistics}
    assert kinds == {"q_proj", "o_proj", "gate_proj", "down_proj"}  # the others read the same tensors
    scores = torch.log_softmax(logits[:, :-1], -1).gather(2, written.tokens[:, 1:, None])[..., 0]
    plain = scripts.index(next(script for script in scripts if script.schedule == "plain"))
    if bool((written.tokens[plain, 1:] != 0).all()):  # nothing but its own tokens
        assert float(written.nll[plain]) == pytest.approx(-float(scores[plain].mean()), rel=1e-3)


def _small(tiny_model: Path, **size: Any) -> tuple[SourceModel, CalibrationSize]:
    return load_source(str(tiny_model)), CalibrationSize(sequence_length=24, held_out_sequences=2, **size)


def test_the_same_seed_gives_the_same_text_and_weights(tiny_model: Path) -> None:
    source, size = _small(tiny_model, sequences=6, pool=2)
    first, again, other = (load_calibration("self", source, size, seed) for seed in (0, 0, 1))
    assert torch.equal(first.sequences, again.sequences)
    assert first.weights is not None
    assert again.weights is not None
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.sequences, other.sequences)
    assert first.sequences.shape == (6, 24)
    assert first.weights.dtype == torch.float64
    assert float(first.weights.mean()) == pytest.approx(1)
    assert bool(((first.weights >= 0.25) & (first.weights <= 4)).all())
    held = {tuple(row) for row in first.held_out.tolist()}
    assert held.isdisjoint(tuple(row) for row in first.sequences.tolist())
    assert first.source["written"] >= 2 * 6 + 2
    assert first.source["mismatch"] <= first.source["mismatch_unselected"]


def test_without_a_surplus_nothing_is_weighted(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, size = _small(tiny_model, sequences=4, pool=1)
    monkeypatch.setattr(pool, "in_band", lambda _nll, fit: fit)
    monkeypatch.setattr(pool, "is_loop", lambda *_: False)
    text = load_calibration("self", source, size, 0)
    assert text.weights is None
    assert text.source["written"] == 7  # one in seven may be unfit
    assert text.sequences.shape == (4, 24)
    rows = [tuple(row) for row in (*text.sequences.tolist(), *text.held_out.tolist())]
    assert len(set(rows)) == 6
    assert "mismatch" not in text.source


def test_a_model_that_only_loops_is_no_endless_loop(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, size = _small(tiny_model, sequences=3)
    monkeypatch.setattr(pool, "is_loop", lambda *_: True)
    text = load_calibration("self", source, size, 0)
    assert text.sequences.shape == (3, 24)
    assert text.source["rounds"] == 4
    assert text.source["dropped_loops"] == text.source["written"]
    assert text.source["unfit_used"] == 5
    assert "too little" in capsys.readouterr().err


def test_an_interrupted_pool_goes_on_after_its_last_batch(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, size = _small(tiny_model, sequences=6, pool=2)
    monkeypatch.setattr(pool, "_LARGEST_BATCH", 4)
    expected = load_calibration("self", source, size, 0)
    original, written = pool.write_batch, []

    def stop_at_the_third(*arguments: Any, **options: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(0)
        return original(*arguments, **options)

    keep = tmp_path / "kept"
    monkeypatch.setattr(pool, "write_batch", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        load_calibration("self", source, size, 0, keep)
    assert len(list(keep.glob("batch-*.safetensors"))) == 2
    (keep / "batch-0001.safetensors").write_bytes(b"half")
    calls = []
    monkeypatch.setattr(pool, "write_batch", lambda *a, **k: calls.append(0) or original(*a, **k))
    resumed = load_calibration("self", source, size, 0, keep)
    total = len(list(keep.glob("batch-*.safetensors")))
    assert len(calls) == total - 1  # the first batch was read back, the damaged one written again
    assert torch.equal(resumed.sequences, expected.sequences)
    assert torch.equal(resumed.held_out, expected.held_out)
    assert resumed.weights is not None
    assert expected.weights is not None
    assert torch.equal(resumed.weights, expected.weights)  # bit for bit: the resumed run is known by them
    calls.clear()
    load_calibration("self", source, size, 0, keep)
    assert not calls
    load_calibration("self", source, size, 1, keep)
    assert calls  # another seed's text is not used


@pytest.mark.parametrize("file", ["chat_template.jinja", "generation_config.json"])
def test_kept_text_is_not_used_when_the_model_writes_otherwise(tiny_model: Path, tmp_path: Path, file: str) -> None:
    """A chat template makes half of the text conversations, another end token ends texts elsewhere."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    size = CalibrationSize(sequences=4, sequence_length=24, held_out_sequences=2)
    before = load_source(str(model))
    load_calibration("self", before, size, 0, tmp_path / "kept")
    if file == "chat_template.jinja":
        turns = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        (model / file).write_text(turns + "{% if add_generation_prompt %}<assistant>{% endif %}")
    else:
        (model / file).write_text('{"eos_token_id": [70, 71, 72, 73, 74, 75]}')
    source = load_source(str(model))
    assert before.files != source.files
    resumed = load_calibration("self", source, size, 0, tmp_path / "kept")
    fresh = load_calibration("self", source, size, 0, tmp_path / "other")
    assert torch.equal(resumed.sequences, fresh.sequences)
    assert resumed.source == fresh.source


def test_kept_text_of_another_run_is_removed(tmp_path: Path) -> None:
    KeptBatches(tmp_path / "kept", {"seed": 0})
    (tmp_path / "kept" / "batch-0000.safetensors").write_bytes(b"old")
    KeptBatches(tmp_path / "kept", {"seed": 0})
    assert (tmp_path / "kept" / "batch-0000.safetensors").exists()
    KeptBatches(tmp_path / "kept", {"seed": 1})
    assert not (tmp_path / "kept" / "batch-0000.safetensors").exists()


def test_a_finished_checkpoint_leaves_no_text_beside_it(tiny_model: Path, tmp_path: Path) -> None:
    calibration = {"sequences": 3, "sequence_length": 24, "held_out_sequences": 1}
    recipe = parse_recipe({**load_recipe("w4g32-gptq").model_dump(), "calibration": calibration}, "test")
    quantize(str(tiny_model), tmp_path / "out", recipe=recipe)
    assert (tmp_path / "out").is_dir()
    assert not kept_text(tmp_path / "out").exists()
