"""Every transform leaves the function of every family's model as it is, alone and after others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig

from boa_edge.errors import BoaEdgeError, UsageError
from tests.conftest import byte_tokenizer
from tests.toolchain.families import CONFIGS
from toolchain.entry import decoder_layers, entry, own_attention
from toolchain.fake_quantized import FakeQuantized
from toolchain.families import DecoderSpec
from toolchain.loading import SourceModel, load_source
from toolchain.loading.streamed import streamed_blocks
from toolchain.statistics.attention import handled_by
from toolchain.transforms import (
    PAIRS,
    Pair,
    RotateDown,
    RotateQueryKey,
    RotateResidual,
    RotateTable,
    RotateValues,
    Smooth,
    Transform,
    apply,
    base,
    from_record,
    install_runtime,
    online_products,
    refusal,
    scale_shape,
    to_record,
    transforms_of,
)

FAMILIES = sorted(CONFIGS)
NORMED_SUBLAYERS = ("gemma2", "gemma3")
TOKENS = torch.randint(2, 264, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def wide() -> Iterator[None]:
    """The classes of `transformers` norm and turn in float32; inside, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def smooth(spec: DecoderSpec, *pairs: Pair, powers_of_two: bool = False) -> Smooth:
    """Random scales within 1/8 and 8 for these pairs of every layer, or for all."""
    generator, scales = torch.Generator().manual_seed(7), {}
    for layer, pair in itertools.product(range(spec.layers), pairs or PAIRS):
        logs = 6 * torch.rand(scale_shape(spec, layer, pair), generator=generator, dtype=torch.float64) - 3
        half = len(spec.attention[layer].rope_inv_freq)
        if pair == "q_k":
            logs[:, half : 2 * half] = logs[:, :half]
        scales[layer, pair] = torch.exp2(logs.round() if powers_of_two else logs)
    return Smooth(scales)


SINGLE: dict[str, Callable[[DecoderSpec], list[Transform]]] = {
    **{pair: lambda spec, pair=pair: [smooth(spec, pair)] for pair in PAIRS},  # type: ignore[misc]
    "r1_tied": lambda spec: [RotateResidual(seed=5)],
    "r1_untied": lambda spec: [RotateResidual(seed=5, head="untied")],
    "r2": lambda spec: [RotateValues(seed=6)],
    "r3": lambda spec: [RotateQueryKey(seed=8)],
    "r4": lambda spec: [RotateDown()],
    "r4_blocks": lambda spec: [RotateDown(block_size=16)],
    "rotate_table": lambda spec: [RotateTable(seed=9)],
}
EVERYTHING: dict[str, Callable[[DecoderSpec], list[Transform]]] = {
    "smooth_first": lambda spec: [
        smooth(spec),
        RotateResidual(1),
        RotateValues(2),
        RotateQueryKey(3),
        RotateDown(),
        RotateTable(9),
    ],
    "rotate_first": lambda spec: [
        RotateQueryKey(3),
        RotateValues(2),
        RotateResidual(1, "untied"),
        smooth(spec),
        RotateDown(16),
        smooth(spec, "attention_norm", "v_o", "q_k"),
        RotateValues(4),
        RotateTable(9),
    ],
}


def logits(model: nn.Module) -> Tensor:
    return model(TOKENS, use_cache=False).logits


def cached(model: nn.Module) -> Tensor:
    """Logits of a text of which all but the last two tokens are read at once, and those one after the other."""
    output = model(TOKENS[:, :-2], use_cache=True)
    seen = [output.logits]
    for tokens in TOKENS[:, -2:].split(1, 1):
        output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
        seen.append(output.logits)
    return torch.cat(seen, 1)


def assert_same_function(one: nn.Module, other: nn.Module) -> None:
    """Of float64 models, with and without a cache."""
    with wide():
        expected = logits(one)
        for found in (logits(other), cached(other)):
            assert float((found - expected).abs().amax()) < 1e-9
    assert float(expected.std()) > 0.1


def left_out(family: str, transforms: list[Transform]) -> list[str]:
    """The kinds that this family's structure forbids."""
    return [each.kind for each in transforms if each.kind == "r1" and family in NORMED_SUBLAYERS]


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_transform_leaves_the_function(source: Callable[[str], SourceModel], family: str, name: str) -> None:
    before = source(family)
    originals = {key: value.clone() for key, value in before.model.state_dict().items()}
    transforms = SINGLE[name](before.spec)
    after, notes = apply(before, transforms)
    assert [note.partition(":")[0] for note in notes] == left_out(family, transforms)
    assert_same_function(before.model, after.model)
    # The original is untouched, and the transform did something wherever it was not left out.
    assert all(torch.equal(value, originals[key]) for key, value in before.model.state_dict().items())
    assert transforms_of(before.model) == ()
    changed = [key for key, value in after.model.state_dict().items() if not torch.equal(value, originals[key])]
    assert bool(changed) == (name != "r3" and not notes)
    owing = name in ("r1_tied", "r3", "r4", "r4_blocks", "rotate_table")
    assert bool(online_products(after.spec, transforms)) == (owing and not notes)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("family", FAMILIES)
def test_transforms_after_each_other_leave_the_function(
    source: Callable[[str], SourceModel], family: str, name: str
) -> None:
    before = source(family)
    transforms = EVERYTHING[name](before.spec)
    after, notes = apply(before, transforms)
    assert [note.partition(":")[0] for note in notes] == left_out(family, transforms)
    assert_same_function(before.model, after.model)
    # One at a time comes to the same.
    stepwise = before
    for transform in transforms:
        stepwise, _ = apply(stepwise, [transform])
    assert_same_function(before.model, stepwise.model)
    assert transforms_of(stepwise.model) == tuple(transforms)
    assert stepwise.spec == after.spec


def test_rotations_and_scales_may_come_in_any_order(source: Callable[[str], SourceModel]) -> None:
    before = source("phi4")
    parts: list[Transform] = [
        smooth(before.spec, "attention_norm", "mlp_norm", "v_o", "q_k"),
        RotateResidual(1),
        RotateValues(2),
        RotateDown(),
    ]
    for order in itertools.permutations(parts):
        after, _ = apply(before, order)
        assert_same_function(before.model, after.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_head_is_said_to_be_one(source: Callable[[str], SourceModel], family: str) -> None:
    before = source(family)
    for mode in ("tied", "untied"):
        after, _ = apply(before, [RotateResidual(1, mode)])  # type: ignore[arg-type]
        tied = mode == "tied" or family in NORMED_SUBLAYERS
        assert after.spec == replace(before.spec, tied_embeddings=tied)
        assert after.config == before.config | {"tie_word_embeddings": tied}
        assert after.model.config.tie_word_embeddings == tied  # type: ignore[union-attr]
        table, head = (after.model.get_parameter(f"{name}.weight") for name in (after.spec.embedding, after.spec.head))
        assert (table is head) == tied
        assert (table is before.model.get_parameter(f"{before.spec.embedding}.weight")) == tied
    assert before.model.config.tie_word_embeddings  # type: ignore[union-attr]


@pytest.mark.parametrize("parts", [(RotateResidual(1, "untied"), RotateTable(1)), (RotateTable(1),)])
def test_tables_are_the_same_a_few_tokens_at_a_time(
    source: Callable[[str], SourceModel], parts: tuple[Transform, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source("opt")  # which has positions and biases too
    whole, _ = apply(before, parts)
    monkeypatch.setattr(base, "_TOKENS", 100)
    few, _ = apply(before, parts)
    assert whole.model.state_dict().keys() == few.model.state_dict().keys()
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(few.model.state_dict()[name], tensor, rtol=0, atol=1e-12), name
    assert_same_function(before.model, few.model)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NORMED_SUBLAYERS)))
def test_powers_of_two_change_no_bit(directory: Callable[[str], Path], family: str) -> None:
    """In float32, as the model is loaded."""
    before = load_source(str(directory(family)))
    after, _ = apply(before, [smooth(before.spec, powers_of_two=True)])
    assert torch.equal(logits(after.model), logits(before.model))
    bfloat = {key: value.to(torch.bfloat16) for key, value in before.model.state_dict().items()}
    before.model.load_state_dict(bfloat)
    after, _ = apply(before, [smooth(before.spec, powers_of_two=True)])
    assert all(torch.equal(value, value.to(torch.bfloat16).float()) for value in after.model.state_dict().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_and_resident_models_become_the_same(directory: Callable[[str], Path], family: str) -> None:
    for name in EVERYTHING:
        whole, streamed = (load_source(str(directory(family)), stream=stream) for stream in (False, True))
        transforms = EVERYTHING[name](whole.spec)
        one, notes = apply(whole, transforms)
        other, others = apply(streamed, transforms)
        assert notes == others
        assert one.spec == other.spec
        assert one.config == other.config
        assert streamed_blocks(other.model) is not None
        for key, value in one.model.state_dict().items():
            assert torch.equal(value, other.parameter(key)), key
        assert torch.allclose(logits(one.model), logits(other.model), atol=1e-5)
        with other.at_hand(1):
            held = other.model.get_parameter(f"{other.spec.layer_names[1].down}.weight")
            assert torch.equal(held, one.model.get_parameter(f"{one.spec.layer_names[1].down}.weight"))
        blocks = decoder_layers(other.model)
        assert all(parameter.is_meta for block in blocks for parameter in block.parameters())
        greedy = [FakeQuantized(each.model, each.spec, {}).greedy(TOKENS[0], 3) for each in (one, other)]
        assert torch.equal(*greedy)


class _Doubled:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def dequantize(self) -> Tensor:
        return 2 * self.weight


def test_replaced_weights_of_a_streamed_model_are_not_transformed_again(directory: Callable[[str], Path]) -> None:
    whole, streamed = (load_source(str(directory("llama")), stream=stream) for stream in (False, True))
    transforms = EVERYTHING["smooth_first"](whole.spec)
    one, other = (apply(each, transforms)[0] for each in (whole, streamed))
    blocks = streamed_blocks(other.model)
    assert blocks is not None
    names = [module for names in one.spec.layer_names for module in names.linears()]
    weights = {name: _Doubled(one.model.get_parameter(f"{name}.weight").clone()) for name in names}
    for name in names:
        one.model.get_parameter(f"{name}.weight").mul_(2)
    for _ in range(2):  # with and without the vectors at hand
        with blocks.replaced(weights):
            assert torch.allclose(logits(one.model), logits(other.model), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_rebuilds_what_the_model_computes_besides(
    source: Callable[[str], SourceModel], directory: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    before = source(family)
    transforms = EVERYTHING["smooth_first"](before.spec)
    after, _ = apply(before, transforms)
    document, tensors = to_record(transforms)
    document, tensors = json.loads(json.dumps(document)), load(save(tensors))
    rebuilt = from_record(document, tensors, after.spec)
    again = to_record(rebuilt)
    assert again[0] == document
    assert again[1].keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in again[1].items())
    # A fresh model of the class, with the transformed weights and nothing else.
    fresh = load_source(str(directory(family))).model.double()
    fresh.load_state_dict(after.model.state_dict())
    bare = logits(fresh)
    assert float((bare - logits(before.model)).abs().amax()) > 1e-3
    runtime = install_runtime(fresh, after.spec, rebuilt)
    assert_same_function(before.model, fresh)
    runtime.remove()
    runtime.remove()
    assert torch.equal(logits(fresh), bare)
    assert transforms_of(fresh) == ()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_first_block_takes_in_the_rotated_stream(source: Callable[[str], SourceModel], family: str) -> None:
    """Also where the toolchain enters by itself; and the rotation takes an outlier apart."""
    before = source(family)
    transform = RotateResidual(1)
    after, _ = apply(before, [transform])
    (_, embed), (_, embed_rotated) = (entry(each.model, TOKENS.shape[1]) for each in (before, after))
    matrix = transform.matrix(before.spec)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(len(matrix), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(embed_rotated(TOKENS), embed(TOKENS) @ matrix, atol=1e-12)
    assert float(matrix[0].abs().amax()) < 0.5


def test_products_say_where_they_stand(source: Callable[[str], SourceModel]) -> None:
    """A model that multiplies by hand what the products name computes the same."""
    before = source("opt")
    transforms: list[Transform] = [RotateResidual(1), RotateQueryKey(2), RotateDown()]
    products = online_products(before.spec, transforms)
    tables = [before.spec.embedding, before.spec.position_table]
    assert [(each.kind, each.module) for each in products if each.place == "output"] == [("r1", t) for t in tables]
    inputs = [(each.kind, each.module, each.layer) for each in products if each.place == "input"]
    downs = [("r4", names.down, layer) for layer, names in enumerate(before.spec.layer_names)]
    assert inputs == [("r1_inverse", before.spec.final_norm, None), *downs]
    assert [(each.kind, each.layer) for each in products if each.place == "query_key"] == [("r3", 0), ("r3", 1)]
    for product in products:
        one = torch.eye(product.size, dtype=torch.float64)
        matrix = product(one)
        assert torch.allclose(matrix @ matrix.mT, one, atol=1e-12)
        dense = product.factors[0]
        for factor in product.factors[1:]:
            dense = torch.kron(dense, factor)
        assert torch.allclose(matrix, torch.block_diag(*[dense] * (product.size // len(dense))))
    there, back = (next(each for each in products if each.kind == kind) for kind in ("r1", "r1_inverse"))
    one = torch.eye(before.spec.hidden_size, dtype=torch.float64)
    assert torch.allclose(back(there(one)), one, atol=1e-12)


def attended(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys that each layer's attention compares."""
    seen: list[tuple[Tensor, Tensor]] = []
    with handled_by(lambda query, key, *_: seen.append((query, key))):
        logits(model)
    return seen


def test_queries_and_keys_are_turned_where_attention_is_computed(source: Callable[[str], SourceModel]) -> None:
    """And left as they are where the toolchain looks at them."""
    before, transform = source("qwen3"), RotateQueryKey(4)
    after, _ = apply(before, [transform])
    with own_attention(before.model), own_attention(after.model):
        original, looked_at = attended(before.model), attended(after.model)
    turned = attended(after.model)
    matrix = online_products(before.spec, [transform])[0].factors[0]
    assert len(original) == len(turned) == len(looked_at) == 2
    for one, other, same in zip(original, turned, looked_at, strict=True):
        for plain, rotated, left in zip(one, other, same, strict=True):
            assert torch.allclose(rotated, plain @ matrix, atol=1e-9)
            assert torch.equal(left, plain)
            assert not torch.allclose(rotated, plain, atol=1e-2)


def test_an_opt_without_biases_or_norm_weights(directory: Callable[[str], Path], tmp_path: Path) -> None:
    base = json.loads((directory("opt") / "config.json").read_text())
    for name, changes in {"plain": {"enable_bias": False}, "bare": {"layer_norm_elementwise_affine": False}}.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(OPTConfig(**{**base, **changes}))
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.2)
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        before = load_source(str(tmp_path / name))
        before.model.double()
        for mode in ("tied", "untied"):
            transforms: list[Transform] = [RotateResidual(1, mode), RotateValues(2), RotateDown()]  # type: ignore[arg-type]
            after, _ = apply(before, transforms)
            assert_same_function(before.model, after.model)
    with pytest.raises(BoaEdgeError, match="self_attn_layer_norm: the norm has no weight that could take up a scale"):
        apply(before, [smooth(before.spec, "attention_norm")])
    plain = load_source(str(tmp_path / "plain"))
    plain.model.model.decoder.layers[1].final_layer_norm.weight[3] = 0.0
    with pytest.raises(BoaEdgeError, match=r"layers\.1\.final_layer_norm: a weight of zero stands beside a bias"):
        apply(plain, [RotateResidual(1)])


def test_a_scale_does_not_go_through_a_bent_activation(source: Callable[[str], SourceModel]) -> None:
    opt = source("opt")
    model = apply(opt, [])[0].model
    for block in decoder_layers(model):
        block.activation_fn = nn.GELU()
    before = replace(opt, model=model, spec=replace(opt.spec, activation="gelu"))
    assert [pair for pair in PAIRS if refusal(before.spec, pair)] == ["up_down"]
    after, notes = apply(before, [smooth(before.spec)])
    assert notes == [
        "smooth up_down: left out, no scale goes through the activation 'gelu', which stands between up and down"
    ]
    assert_same_function(before.model, after.model)


def test_what_does_not_go_together_is_refused(source: Callable[[str], SourceModel]) -> None:
    before = source("qwen2")
    spec = before.spec
    ones = torch.ones(spec.kv_heads, spec.head_dim, dtype=torch.float64)
    unpaired = ones.clone()
    unpaired[0, 1] = 2
    refused: dict[str, list[Transform]] = {
        "smooth up_down comes after r4": [RotateDown(), smooth(spec, "up_down")],
        "r1 comes twice": [RotateResidual(1), RotateResidual(2)],
        "r4 comes twice": [RotateDown(), RotateDown()],
        "rotate_table comes twice": [RotateTable(), RotateTable(1)],
        "r1 comes after rotate_table": [RotateTable(), RotateResidual(1)],
        "smooth: 0.q_k: RoPE turns channels a and a": [Smooth({(0, "q_k"): unpaired})],
        "smooth: 1.v_o: scales must be positive": [Smooth({(1, "v_o"): ones * 0})],
        "smooth: 1.v_o: scales of shape": [Smooth({(1, "v_o"): ones[0]})],
        "smooth: 2.v_o: there is no such pair": [Smooth({(2, "v_o"): ones})],
        "r4: block_size: blocks of 36 do not divide the 96": [RotateDown(36)],
        "r1: head: is 'loose'": [RotateResidual(1, "loose")],  # type: ignore[arg-type]
    }
    for message, transforms in refused.items():
        with pytest.raises(BoaEdgeError, match=message):
            apply(before, transforms)
    with pytest.raises(UsageError, match="no Hadamard matrix of size 92"):
        RotateResidual(1).check(replace(spec, hidden_size=92))
    after, _ = apply(before, [RotateDown()])
    with pytest.raises(BoaEdgeError, match="r4 comes twice"):
        apply(after, [RotateDown()])


def test_a_damaged_record_is_refused_by_name(source: Callable[[str], SourceModel]) -> None:
    spec = source("llama").spec
    document, tensors = to_record([smooth(spec, "v_o"), RotateResidual(1), RotateDown()])

    def changed(index: int, **fields: object) -> list[dict[str, object]]:
        return [entry | fields if i == index else entry for i, entry in enumerate(document)]

    def without(index: int, name: str) -> list[dict[str, object]]:
        return [{k: v for k, v in e.items() if i != index or k != name} for i, e in enumerate(document)]

    short = tensors | {"0.1.v_o": tensors["0.1.v_o"][:, :3]}
    cases: list[tuple[str, Any, dict[str, Tensor]]] = [
        (r"t\.json: is no list of transforms", {}, {}),
        (r"t\.json: \[0\]: is 3", [3], {}),
        (r"t\.json: \[1\]\.kind: is 'r9'\. Expected: smooth, r1, r2, r3, r4", changed(1, kind="r9"), tensors),
        (r"t\.json: \[1\]\.seed: is 'a'", changed(1, seed="a"), tensors),
        (r"t\.json: \[1\]\.seed: the field is missing", without(1, "seed"), tensors),
        (r"t\.json: \[1\]\.head: is 'loose'", changed(1, head="loose"), tensors),
        (r"t\.json: \[2\]\.extra: is a field that is not known", changed(2, extra=1), tensors),
        (r"t\.json: \[2\]\.block_size: is True", changed(2, block_size=True), tensors),
        (r"t\.json: \[2\]: r4: block_size: blocks of 36", changed(2, block_size=36), tensors),
        (r"t\.json: \[0\]\.scales: '1\.gate' is no pair", changed(0, scales=["1.gate"]), tensors),
        (r"t\.json: \[0\]\.scales: the tensor of '1\.v_o' is missing", document, {"0.0.v_o": tensors["0.0.v_o"]}),
        (r"t\.json: \[0\]: smooth: 1\.v_o: scales of shape \[2, 3\]\. Expected: \[2, 32\]", document, short),
        (r"t\.json: holds a tensor that no entry names: 7\.x", document, tensors | {"7.x": torch.ones(1)}),
        (r"t\.json: transforms: r4 comes twice", [*document, document[2]], tensors),
    ]
    for message, entries, held in cases:
        with pytest.raises(BoaEdgeError, match=message):
            from_record(entries, held, spec, "t.json")
    assert len(from_record(document, tensors, spec, "t.json")) == 3
