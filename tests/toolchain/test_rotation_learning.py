"""Learned rotations: orthogonal, of no effect in floating point, and never worse than where they start."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from boa_edge.errors import BoaEdgeError, UsageError
from tests.toolchain.families import make
from tests.toolchain.test_w4a8 import quantized, rebuilt
from tests.toolchain.transformed import NORMED_SUBLAYERS, TOKENS, assert_same_function, logits, wide
from toolchain.activations import ActivationFormat, per_block
from toolchain.activations.plan import ActivationPlan
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import SourceModel, load_source
from toolchain.recipe import LearningChoice, load_recipe, parse_recipe
from toolchain.rotation_learning import Learned, Learning, _computing, learn_rotations, straight_through
from toolchain.transforms import (
    LearnedResidual,
    LearnedValues,
    RotateResidual,
    RotateValues,
    apply,
    from_record,
    to_record,
)
from toolchain.transforms.hadamard import random_rotation
from toolchain.transforms.stiefel import CayleyDescent, nearest_orthogonal

HOW = Learning(steps=16, angle=0.05, head="tied", largest_model=10**7)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("learned")

    def get(family: str) -> Path:
        path = root / family
        return path if path.exists() else make(path, family)

    return get


def whole_plan(source: SourceModel, scheme: str = "per_token") -> ActivationPlan:
    sizes: dict[str, int | None] = dict.fromkeys([*source.spec.linear_inputs(), source.spec.head], 16)
    return ActivationPlan(ActivationFormat(scheme), sizes)


def off(matrix: Tensor) -> float:
    return float((matrix @ matrix.mT - torch.eye(matrix.shape[-1], dtype=matrix.dtype)).abs().max())


def test_cayley_steps_stay_orthogonal_and_find_the_least() -> None:
    """The least of |R - A|^2 over rotations is A itself, here a rotation not too far away; for two at once."""
    start = torch.stack([random_rotation(12, 1), random_rotation(12, 2)])
    skew = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    aim = torch.matrix_exp(skew - skew.mT) @ start
    descent = CayleyDescent(start, momentum=0.0)
    for step in range(200):
        descent.step(2 * (descent.rotation - aim), 0.2 * 0.95**step)
    assert off(descent.rotation) < 1e-12
    assert float((start - aim).abs().max()) > 0.1
    assert float((descent.rotation - aim).abs().max()) < 1e-3


def test_a_step_turns_by_its_angle_against_the_gradient() -> None:
    start, gradient = random_rotation(16, 3), torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    descent = CayleyDescent(start)
    descent.step(gradient, 1e-3)
    moved = descent.rotation - start
    assert float(moved.square().sum(0).mean().sqrt()) == pytest.approx(1e-3, rel=1e-3)
    wide_gradient = gradient.double()
    along = wide_gradient - start @ wide_gradient.mT @ start  # the gradient's part along the manifold, times 2
    cosine = float((moved * along).sum() / (moved.norm() * along.norm()))
    assert cosine == pytest.approx(-1, abs=1e-3)
    still = CayleyDescent(start)
    still.step(torch.zeros(16, 16), 1e-3)
    assert torch.equal(still.rotation, torch.linalg.solve(torch.eye(16, dtype=torch.float64), start))


def test_the_vector_of_ones_can_be_kept() -> None:
    ones = torch.ones(8, dtype=torch.float64)
    gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    for keep in (True, False):
        descent = CayleyDescent(torch.eye(8, dtype=torch.float64), keep_ones=keep)
        for _ in range(5):
            descent.step(gradient, 0.1)
        kept = float((descent.rotation @ ones - ones).abs().max())
        assert (kept < 1e-12) == keep
        assert off(descent.rotation) < 1e-12


def test_the_nearest_orthogonal_matrix_is_nearest() -> None:
    matrix = random_rotation(12, 1) + 0.01 * torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    found = nearest_orthogonal(matrix)
    assert off(found) < 1e-12
    for seed in range(20):
        skew = torch.randn(12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 100
        assert float((found - matrix).norm()) < float((torch.matrix_exp(skew - skew.mT) @ found - matrix).norm())


def test_gradients_go_through_rounding_and_not_past_scales() -> None:
    """d(s c) = dx + (c - x / s) ds, with s = max|x| / 127 of the block; a block of zeros has gradients too."""
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    x[1, :16] = 0
    x.requires_grad_()
    found = straight_through(x, ActivationFormat("per_block"), 16)
    assert torch.equal(found, per_block.fake_quantize(x.detach(), 16))
    towards = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found * towards).sum(), x)
    blocks, wanted = x.detach().view(3, 2, 16), towards.view(3, 2, 16).clone()
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    rest = torch.where(scale > 0, torch.round(blocks / scale) - blocks / scale, 0)
    largest = blocks.abs() == blocks.abs().amax(-1, keepdim=True)
    expected = wanted + (rest * wanted).sum(-1, keepdim=True) / 127 * torch.where(largest, blocks.sign(), 0)
    expected[1, 0] = 0
    assert torch.isfinite(gradient).all()
    assert torch.allclose(gradient.view(3, 2, 16), expected, atol=1e-4)
    for scheme in ("per_token", "per_row", "static_int8", "static_uint8"):
        found = straight_through(x, ActivationFormat(scheme), 16)
        (gradient,) = torch.autograd.grad((found * towards).sum(), x)
        assert float((gradient - towards).abs().mean()) < 0.1 * float(towards.abs().mean())


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "opt"])
def test_it_learns_on_what_the_rotated_model_computes(directory: Callable[[str], Path], family: str, head: Any) -> None:
    """To the last code of every activation."""
    source = load_source(str(directory(family)))
    source.model.double()
    spec, plan = source.spec, whole_plan(source, "per_block")
    r1, r2 = RotateResidual(3, head), RotateValues(4)
    after, _ = apply(source, [r1, r2])
    values = torch.stack([r2.matrices(spec, layer) for layer in range(spec.layers)])
    matrix = r1.matrix(spec) if family not in NORMED_SUBLAYERS else None
    with torch.no_grad(), wide():
        expected = FakeQuantized(after.model, after.spec, {}, plan).logits(TOKENS)
        with _computing(source, plan, matrix, values, head):
            found = logits(source.model)
        plain = logits(source.model)
    assert float((found - expected).abs().max()) < 1e-9
    assert float((plain - expected).abs().max()) > 1e-4


def learned(source: SourceModel, how: Learning = HOW, seed: int = 0, scheme: str = "per_token") -> Learned:
    return learn_rotations(source, whole_plan(source, scheme), TOKENS, how, seed)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi4", "opt"])
def test_a_learned_rotation_is_one_and_leaves_the_function(directory: Callable[[str], Path], family: str) -> None:
    source = load_source(str(directory(family)))
    originals = {key: value.clone() for key, value in source.model.state_dict().items()}
    with torch.no_grad():
        plain = logits(source.model)
    found = learned(source)
    assert all(torch.equal(value, originals[key]) for key, value in source.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(logits(source.model), plain)
    assert found.after < found.before
    residual, values = found.transforms
    assert isinstance(values, LearnedValues)
    assert off(values.rotations) < 1e-12
    start = torch.stack([RotateValues(0).matrices(source.spec, layer) for layer in range(source.spec.layers)])
    assert float((values.rotations - start).abs().max()) > 1e-3
    if family in NORMED_SUBLAYERS:
        assert residual == RotateResidual(0)
        assert [note.partition(":")[0] for note in apply(source, found.transforms)[1]] == ["r1"]
    else:
        assert isinstance(residual, LearnedResidual)
        assert off(residual.rotation) < 1e-12
    # The record holds it to the bit.
    document, tensors = to_record(found.transforms)
    again = from_record(json.loads(json.dumps(document)), load(save(tensors)), source.spec)
    assert to_record(again)[0] == document
    assert all(torch.equal(value, tensors[name]) for name, value in to_record(again)[1].items())
    # What it says is the loss of the transformed model.
    with torch.no_grad():
        after, _ = apply(source, again)
        fake = FakeQuantized(after.model, after.spec, {}, whole_plan(source))
        one, other = (torch.log_softmax(x, -1) for x in (plain, fake.logits(TOKENS)))
        assert float((one.exp() * (one - other)).sum(-1).mean()) == pytest.approx(found.after, rel=0.05)
        source.model.double()
        for head in ("tied", "untied"):
            turned = [replace(each, head=head) if isinstance(each, LearnedResidual) else each for each in again]
            assert_same_function(source.model, apply(source, turned)[0].model)


def test_the_seed_tells_all(directory: Callable[[str], Path]) -> None:
    source = load_source(str(directory("llama")))
    first, second, other = (to_record(learned(source, seed=seed).transforms)[1] for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.allclose(first["0.rotation"], other["0.rotation"], atol=0.01)


def test_steps_that_do_harm_are_not_kept(directory: Callable[[str], Path]) -> None:
    source = load_source(str(directory("llama")))
    found = learned(source, replace(HOW, steps=1, angle=1.0))
    assert found.after <= found.before
    if found.after == found.before:
        residual = found.transforms[0]
        assert isinstance(residual, LearnedResidual)
        assert torch.equal(residual.rotation, RotateResidual(0).matrix(source.spec))


@pytest.mark.parametrize("scheme", ["per_token", "per_row", "per_block", "static_int8"])
def test_learning_pays(tiny_model: Path, scheme: str) -> None:
    """On the text learned from, and with steps that go the other way it does not."""
    source = load_source(str(tiny_model))
    found = learned(source, replace(HOW, steps=48), scheme=scheme)
    assert found.after < 0.88 * found.before
    against = learned(source, replace(HOW, steps=48, angle=-0.05), scheme=scheme)
    assert against.after > 1.1 * found.after


def test_what_cannot_be_learned_is_refused(directory: Callable[[str], Path]) -> None:
    path = str(directory("llama"))
    with pytest.raises(UsageError, match="learning needs the whole model in memory, and this one is streamed"):
        learned(load_source(path, stream=True))
    with pytest.raises(UsageError, match=r"million parameters.* raise learning\.largest_model above 10"):
        learned(load_source(path), replace(HOW, largest_model=10))
    with pytest.raises(UsageError, match="learns what suits int8 activations: set activations"):
        load_recipe("w4g32-edge-learnedrotation")
    chosen = load_recipe("w4g32a8-edge-learnedrotation-smooth")
    assert chosen.learning == LearningChoice()
    with pytest.raises(UsageError, match=r"unknown key 'learning\.step', did you mean 'steps'"):
        parse_recipe({"method": "rtn", "weights": {"bits": 4}, "learning": {"step": 3}}, "test")


def test_a_damaged_rotation_is_refused(directory: Callable[[str], Path]) -> None:
    llama, opt = (load_source(str(directory(family))).spec for family in ("llama", "opt"))
    matrix = RotateResidual(1).matrix(llama)
    with pytest.raises(BoaEdgeError, match=r"r1_learned: is no rotation: R R\^T is off by"):
        LearnedResidual(matrix * 1.001).check(llama)
    with pytest.raises(BoaEdgeError, match=r"r1_learned: a rotation of torch.float32.* Expected: torch.float64"):
        LearnedResidual(matrix.float()).check(llama)
    with pytest.raises(BoaEdgeError, match="r1_learned: turns the vector of ones"):
        LearnedResidual(matrix).check(opt)
    with pytest.raises(BoaEdgeError, match=r"r2_learned: a rotation of .* shape \[1, 32, 32\]"):
        LearnedValues(torch.eye(32, dtype=torch.float64)[None]).check(llama)
    with pytest.raises(BoaEdgeError, match="r1 comes twice"):
        apply(load_source(str(directory("llama"))), [RotateResidual(1), LearnedResidual(matrix)])
    document, tensors = to_record([LearnedResidual(matrix)])
    with pytest.raises(BoaEdgeError, match=r"\[0\]\.rotation: the tensor is missing"):
        from_record(document, {}, llama)
    with pytest.raises(BoaEdgeError, match=r"\[0\]\.head: is 'loose'"):
        from_record([{**document[0], "head": "loose"}], tensors, llama)


def test_a_checkpoint_holds_what_was_learned(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    fields = {"transforms": ["learnedrotation", "smooth"], "activations": {}, "learning": {"steps": 8}}
    checkpoint = quantized(tiny_model, tmp_path / "ckpt", text_file, **fields)
    assert [each.kind for each in checkpoint.transforms] == ["r1_learned", "r2_learned", "smooth"]
    assert checkpoint.provenance["transforms"]["notes"][0].startswith("learnedrotation: KL on the text learned from")
    reference = load_file(tmp_path / "ckpt" / "reference.safetensors")
    fake = FakeQuantized(rebuilt(checkpoint), checkpoint.spec, {}, checkpoint.activations)
    with torch.no_grad():
        found = fake.logits(reference["tokens"][None])[0]
    assert torch.allclose(found, reference["quantized_logits"], atol=2e-3)
