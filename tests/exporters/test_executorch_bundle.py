"""Bundles for ExecuTorch: what is refused before any work, what stands in them, who runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from executorch.runtime import Runtime
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import exporters.executorch.program
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import sha256_file, write_json
from exporters import Bundle, export, open_decoder
from exporters.executorch.constants import bfloat16_bits, pack_int4
from exporters.executorch.decoder import pack_table
from exporters.executorch.session import ExecutorchDecoder
from runtime_tests.evaluate import evaluate
from tests.conftest import make_model, tiny_config
from tests.exporters.conftest import Tiny
from tests.exporters.test_executorch import RECIPE, TIES, check_logits, modules_of, plan_of, simulated
from tests.toolchain.families import CONFIGS, make
from toolchain.activations import ActivationFormat
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import ACTIVATIONS, KV_CACHE
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe

MakeTiny = Callable[..., Tiny]


def refused(checkpoint: Path, output: Path, match: str, monkeypatch: pytest.MonkeyPatch, **wishes: Any) -> None:
    """One line, before anything is traced, and nothing is left."""

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(exporters.executorch.program, "write_program", begun)
    with pytest.raises(BoaEdgeError, match=match) as caught:
        export(checkpoint, "executorch", output, **wishes)
    assert "\n" not in str(caught.value)
    assert not output.exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zero points": ({"symmetric": False}, r"q_proj: has zero points, and XNNPACK ignores .*symmetric weights"),
    "small groups": ({"group_size": 16}, r"q_proj: groups of 16; XNNPACK takes multiples of 32"),
    "8 bits in groups": ({"bits": 8, "embedding_bits": 4}, r"q_proj: 8-bit weights in groups of 32.*group_size: null"),
    "table": ({"embedding_group_size": 32}, r"embedding.safetensors: the head is an 8-bit table .*group_size: null"),
    "small groups of the table": (
        {"embedding_bits": 4, "embedding_group_size": 16},
        r"the head is a table in groups of 16",
    ),
    "zero points of the table": ({"embedding_symmetric": False}, r"embedding.safetensors: has zero points"),
    "untied head": (
        {"embedding_group_size": 32, "tie_word_embeddings": False},
        r"lm_head: 8-bit weights in groups of 32",
    ),
}


@pytest.mark.parametrize("formats", REFUSED)
def test_weights_refused(formats: str, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, match = REFUSED[formats]
    tiny = make_tiny(**({"embedding_group_size": None} | settings))
    refused(tiny.path, tmp_path / "bundle", match, monkeypatch)


def test_scales_refused(make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny(embedding_group_size=None)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors = load_file(tiny.path / "model.safetensors")
    tensors[name] = tensors[name].float() * 1.001
    save_file(tensors, tiny.path / "model.safetensors")
    refused(tiny.path, tmp_path / "bundle", r"up_proj: has scales that bfloat16 .*round_scales: true", monkeypatch)


WISHES: list[tuple[dict[str, Any], str]] = [
    ({"activations": "float32"}, r"q_proj: weights in groups, for which XNNPACK takes int8 inputs only"),
    ({"context_length": 129}, r"--context: a context of 129 tokens.*1 to 128"),
    ({"context_length": 0}, r"--context: a context of 0 tokens"),
    ({"context_length": 16, "prefill_length": 17}, r"--prefill: a prefill of 17 tokens.*1 to 16"),
    ({"form": "qdq"}, r"executorch has no form 'qdq'.*Known: llm"),
]


@pytest.mark.parametrize(("wishes", "match"), WISHES, ids=str)
def test_wishes_refused(
    wishes: dict[str, Any], match: str, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny(embedding_group_size=None)
    refused(tiny.path, tmp_path / "bundle", match, monkeypatch, **wishes)


def test_another_version_refused(make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny(embedding_group_size=None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.0.0")
    refused(tiny.path, tmp_path / "bundle", r"ExecuTorch 2\.0\.0 is installed; .*1\.5\.1", monkeypatch)


def test_lengths_are_not_for_onnx(make_tiny: MakeTiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"onnx takes no --context and no --prefill"):
        export(make_tiny().path, "onnx", tmp_path / "bundle", context_length=64)


def test_plans_refused(make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, output = make_tiny(embedding_group_size=None), tmp_path / "bundle"
    modules = modules_of(tiny.checkpoint)
    static = ActivationPlan(
        ActivationFormat("static_int8"), dict.fromkeys(modules, 32), ranges=dict.fromkeys(modules, (-1.0, 1.0))
    )
    write_json(tiny.path / ACTIVATIONS, static.to_document())
    refused(tiny.path, output, r"activations.json: the activations are static_int8.*per_token", monkeypatch)
    (tiny.path / ACTIVATIONS).unlink()
    cache = {"schema_version": 1, "scheme": "per_token", "bits": 8, "key_scales": [], "value_scales": []}
    write_json(tiny.path / KV_CACHE, cache)
    refused(tiny.path, output, r"kv_cache.json: .*asks for an int8 cache", monkeypatch)


def test_contents(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """The bundle is whole, every quantized linear stands in a delegate, and outside stand no operators but these."""
    tiny = make_tiny(embedding_group_size=None)
    result = export(tiny.path, "executorch", tmp_path / "bundle", context_length=64, prefill_length=16)
    bundle = Bundle.open(tmp_path / "bundle")
    files = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert files == set(bundle.manifest.files) | {"manifest.json"}
    assert {"model.pte", "runtime.json", "lowering.json", "tokenizer.json", "generation_config.json"} <= files
    assert bundle.manifest.created_by["executorch"]
    runtime = bundle.runtime
    assert (runtime.runtime, runtime.form, runtime.activations, runtime.session_config) == (
        "executorch",
        "llm",
        "int8",
        {},
    )
    assert (runtime.context_length, runtime.prefill_length, runtime.eos_token_ids) == (64, 16, (2, 3))
    lowering = json.loads((bundle.path / "lowering.json").read_text())
    layers = tiny.checkpoint.spec.layers
    assert lowering["delegates"] == layers + 1
    assert lowering["quantized_linears"] == result.quantized_linears == 7 * layers + 1
    assert lowering["outside"]["llama::custom_sdpa.out"] == layers
    assert lowering["outside"]["llama::update_cache.out"] == 2 * layers
    assert not [name for name in lowering["outside"] if "mm" in name or "linear" in name or "mean" in name]
    assert any("XNNPACK delegates" in note for note in result.notes)
    methods = Runtime.get().load_program(bundle.model)
    constant = {name: methods.load_method(name).execute(()) for name in methods.method_names - {"forward"}}
    assert constant == {
        "get_bos_id": [1],
        "get_eos_ids": [2, 3],
        "get_max_seq_len": [16],
        "get_max_context_len": [64],
        "get_vocab_size": [96],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [True],
        "enable_dynamic_shape": [True],
    }


def test_every_code_and_scale_stands_in_the_program(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Bit for bit, as XNNPACK reads them; the wiring is what the logits are for."""
    bits = {"model.layers.1.mlp.gate_proj": 3, "model.layers.0.self_attn.v_proj": 2}
    tiny = make_tiny(embedding_group_size=None, module_bits=bits)
    export(tiny.path, "executorch", tmp_path / "bundle")
    program = (tmp_path / "bundle" / "model.pte").read_bytes()
    for module in modules_of(tiny.checkpoint):
        held = tiny.checkpoint.quantized(module)
        codes = held.codes.numpy() if held.bits == 8 else pack_int4(held.codes)
        scales = held.scales.numpy() if held.group_size is None else bfloat16_bits(held.scales)
        assert codes.tobytes() in program, module
        assert scales.tobytes() in program, module


@pytest.mark.parametrize("bits", [8, 4, None])
def test_a_tied_table_stands_once(bits: int | None, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Lookup and head read the same bytes of the file; `test_formats` is about what they make of them."""
    tiny = make_tiny(embedding_bits=bits, embedding_group_size=None, num_hidden_layers=1)
    result = export(tiny.path, "executorch", tmp_path / "bundle")
    program = (tmp_path / "bundle" / "model.pte").read_bytes()
    module = tiny.checkpoint.spec.embedding
    if bits is None:
        table = tiny.checkpoint.tensor(f"{module}.weight").float().numpy().tobytes()
    else:
        codes = tiny.checkpoint.quantized(module).codes
        table = codes.numpy().tobytes() if bits == 8 else pack_table(codes).numpy().tobytes()
        assert bits == 8 or pack_int4(codes).tobytes() not in program
    assert program.count(table) == 1
    assert result.weight_bytes <= len(program)


def test_an_untied_head_is_its_own(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(embedding_bits=4, embedding_group_size=None, num_hidden_layers=1, tie_word_embeddings=False)
    export(tiny.path, "executorch", tmp_path / "bundle")
    program = (tmp_path / "bundle" / "model.pte").read_bytes()
    spec = tiny.checkpoint.spec
    assert pack_table(tiny.checkpoint.quantized(spec.embedding).codes).numpy().tobytes() in program
    assert pack_int4(tiny.checkpoint.quantized(spec.head).codes).tobytes() in program


def test_same_bytes_each_time(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(embedding_group_size=None, num_hidden_layers=1)
    for name in ("one", "two"):
        export(tiny.path, "executorch", tmp_path / name)
    assert sha256_file(tmp_path / "one" / "model.pte") == sha256_file(tmp_path / "two" / "model.pte")


def test_kept_linears(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Linears whose inputs the checkpoint keeps in floating point, the head among them, compute with float32 inputs."""
    tiny = make_tiny(embedding_group_size=None, num_hidden_layers=1)
    kept = frozenset({"model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "lm_head"})
    plan = plan_of(tiny.checkpoint, kept)
    write_json(tiny.path / ACTIVATIONS, plan.to_document())
    result = export(tiny.path, "executorch", tmp_path / "bundle", prefill_length=8)
    # The head has one scale per row: float inputs meet its codes.
    assert result.quantized_linears == 6
    assert any("2 linears keep float32 inputs" in note for note in result.notes)
    check_logits(tiny.path, ExecutorchDecoder.open(Bundle.open(tmp_path / "bundle")), 30, plan)


def test_float_activations(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Codes with one scale per output channel meet float32 inputs: no ties, all logits agree to float rounding."""
    tiny = make_tiny(group_size=None, module_bits={"model.layers.0.mlp.up_proj": 8})
    result = export(tiny.path, "executorch", tmp_path / "bundle", activations="float32", prefill_length=8)
    assert result.quantized_linears == 15
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.runtime.activations == "float32"
    plan = plan_of(tiny.checkpoint, frozenset(modules_of(tiny.checkpoint)))
    check_logits(tiny.path, ExecutorchDecoder.open(bundle), 30, plan, exact=True)


def test_one_token_at_a_time(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A program of fixed shape; and what a decoder is not asked for."""
    tiny = make_tiny(embedding_group_size=None, num_hidden_layers=1)
    export(tiny.path, "executorch", tmp_path / "bundle", context_length=12, prefill_length=1)
    decoder = ExecutorchDecoder.open(Bundle.open(tmp_path / "bundle"))
    check_logits(tiny.path, decoder, 12)
    for tokens, position, match in [([1, 2], 0, "1 to 1"), ([1], 12, "the context holds 12"), ([96], 0, "0 to 95")]:
        with pytest.raises(ValueError, match=match):
            decoder.step(tokens, position)
    decoder.step([1], 0)
    with pytest.raises(ValueError, match="position 3 after 1"):
        decoder.step([1], 3)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("window", [None, 1])
def test_short_contexts(
    window: int | None, lengths: tuple[int, int], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens at once into a cache of two: the second call began at position 0, whatever it was told."""
    context, prefill = lengths
    config = CONFIGS["gemma3" if window else "llama"]()
    if window:
        config.sliding_window = window
    monkeypatch.setitem(CONFIGS, "gemma-short" if window else "short", lambda: config)
    model = make(tmp_path / "model", "gemma-short" if window else "short")
    recipe = parse_recipe(RECIPE, "test")
    quantize(str(model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    export(tmp_path / "checkpoint", "executorch", tmp_path / "bundle", context_length=context, prefill_length=prefill)
    decoder = ExecutorchDecoder.open(Bundle.open(tmp_path / "bundle"))
    tokens = torch.tensor([[5, 9, 7][:context]])
    expected = simulated(tmp_path / "checkpoint", tokens)
    row = tokens[0].tolist()
    found = [decoder.logits(tokens.numpy())[0], np.stack([decoder.prefill(row[: end + 1]) for end in range(context)])]
    for logits in found:
        assert np.abs(logits - expected).max() < TIES * np.abs(expected).max()


def test_broken_checkpoints_and_programs(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(embedding_group_size=None, num_hidden_layers=1)
    export(tiny.path, "executorch", tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    for broken in (b"", b"no program", bundle.model.read_bytes()[:3000]):
        path = tmp_path / "broken.pte"
        path.write_bytes(broken)
        with pytest.raises(BoaEdgeError, match=r"broken.pte: ExecuTorch cannot load it") as caught:
            ExecutorchDecoder(path, bundle.runtime)
        assert "\n" not in str(caught.value)
    tensors = load_file(tiny.path / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tiny.path / "model.safetensors")
    with pytest.raises(BoaEdgeError, match=r"model.norm.weight: has values that are not finite.*Quantize"):
        export(tiny.path, "executorch", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def ascii_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """264 tokens of printable text: ends, letters, and pairs of letters."""
    letters = [chr(code) for code in range(33, 127)]
    pairs = [(one, other) for one in letters[:14] for other in letters[:12]]
    names = ["<s>", "</s>", *letters, *(one + other for one, other in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return fast


@pytest.fixture(params=["llama", "gemma2", "gemma3", "opt"])
def readable(request: pytest.FixtureRequest, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with a tokenizer whose every token is text: of plain attention, with a cap on the scores, with a cache
    that goes around, with learned positions. The last three would say one token for ever if their head was their table.
    """
    if request.param == "llama":
        model = make_model(tmp_path / "model", tiny_config())
    else:
        config = CONFIGS[request.param]()
        config.tie_word_embeddings = False
        monkeypatch.setitem(CONFIGS, request.param, lambda: config)
        model = make(tmp_path / "model", request.param)
    assert len(ascii_tokenizer(model)) == 264
    recipe = parse_recipe(RECIPE, "test")
    quantize(str(model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    export(tmp_path / "checkpoint", "executorch", tmp_path / "bundle", prefill_length=8)
    return tmp_path / "bundle"


def test_the_official_runner(readable: Path) -> None:
    """ExecuTorch's own text runner, with the bundle's tokenizer, generates what our evaluation does."""
    bundle = Bundle.open(readable)
    tokenizer = Tokenizer.from_file(str(readable / "tokenizer.json"))
    prompt = "stones+light,seven%bridges"  # longer than a prefill
    ids = tokenizer.encode(prompt).ids
    assert len(ids) > bundle.runtime.prefill_length
    greedy = open_decoder(bundle).greedy(ids, 24)
    ends = [i for i, token in enumerate(greedy) if token in bundle.runtime.eos_token_ids]
    expected = greedy[: ends[0]] if ends else greedy
    assert len(set(expected)) > 1
    pieces: list[str] = []
    runner = TextLLMRunner(str(bundle.model), str(readable / "tokenizer.json"))
    settings = GenerationConfig(echo=False, max_new_tokens=24, temperature=0.0, num_bos=0, num_eos=0)
    runner.generate(prompt, settings, pieces.append)
    assert pieces[: len(expected)] == [tokenizer.id_to_token(token) for token in expected]


@pytest.mark.parametrize("readable", ["llama"], indirect=True)
def test_evaluation(readable: Path, text_file: Path) -> None:
    """The evaluator takes the bundle: its output is the checkpoint's up to ties; too long a text is one clear line."""
    checkpoint = readable.parent / "checkpoint"
    result = evaluate(str(readable), text_file, reference=str(checkpoint), tokens=96, sequence_length=48)
    assert result.kind == "bundle"
    assert result.kl is not None
    assert result.kl < 2e-3
    assert result.perplexity == pytest.approx(result.reference_perplexity, rel=0.02)
    with pytest.raises(UsageError, match=r"200 tokens; the context holds 128.*--seq-len.*--context"):
        evaluate(str(readable), text_file, tokens=200, sequence_length=200)
