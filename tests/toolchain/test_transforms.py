"""Every transform leaves the function of every family's model as it is, alone and after others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.toolchain.transformed import (
    EVERYTHING,
    FAMILIES,
    NORMED_SUBLAYERS,
    SINGLE,
    TOKENS,
    assert_same_function,
    left_out,
    logits,
    smooth,
)
from toolchain.entry import decoder_layers, entry, own_attention
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import SourceModel, load_source
from toolchain.loading.streamed import streamed_blocks
from toolchain.statistics.attention import handled_by
from toolchain.transforms import (
    RotateDown,
    RotateQueryKey,
    RotateResidual,
    RotateTable,
    RotateValues,
    Transform,
    apply,
    base,
    online_products,
    transforms_of,
)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


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
