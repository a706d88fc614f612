"""Rotations learned on what int8 activations cost: SpinQuant (arXiv 2405.16406, equation 2 and section 3.2).

    R1, R2 = argmin over orthogonal matrices of KL(original || the rotated model with quantized activations)

with weights at full precision, which the paper recommends where a method such as GPTQ solves for them afterwards. The
only part of this toolchain that backpropagates through a model; nothing else needs it.

The model itself is not rotated while it learns. A rotated model's linear reads Q(x R) and has W R for W, and
Q(x R) (W R)^T = (Q(x R) R^T) W^T, so that it is enough to put Q(x R) R^T in the place of what a linear reads. For R1, x
is what a norm puts out before its weight and bias, which are absorbed behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from boa_edge.errors import UsageError
from boa_edge.progress import track
from toolchain.activations import ActivationFormat, simulate
from toolchain.activations.plan import ActivationPlan
from toolchain.loading import SourceModel
from toolchain.loading.streamed import streamed_blocks
from toolchain.transforms.base import Transform, norm_gain
from toolchain.transforms.learned import LearnedResidual, LearnedValues
from toolchain.transforms.rotate import HeadMode, RotateResidual, RotateValues
from toolchain.transforms.stiefel import CayleyDescent, nearest_orthogonal

_TEXTS, _TOKENS = 8, 128  # pieces of the calibration text that are learned from
_JUDGED_EVERY = 8  # steps
_ROUNDING = {"per_row": ActivationFormat("per_token")}  # the one goes through integers, which have no gradient


@dataclass(frozen=True)
class Learning:
    """How rotations are learned.

    Attributes:
        steps: each on one piece of text.
        angle: by which a step turns at first, in radians, root of the mean square; it goes to 0 as a cosine does.
        head: as for `RotateResidual`.
        largest_model: in parameters; a larger one is refused.
    """

    steps: int
    angle: float
    head: HeadMode
    largest_model: int


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes:
        before, after: mean KL in nats per token on the text that was learned from, of the random start and of
            `transforms`; never more than at the start.
    """

    transforms: list[Transform]
    before: float
    after: float


def learn_rotations(source: SourceModel, plan: ActivationPlan, sequences: Tensor, how: Learning, seed: int) -> Learned:
    """Learn R1 (where the model takes one) and R2 of every key-value head, from random Hadamard matrices.

    Args:
        source: not rotated by R1 yet; it stays as it is.
        plan: which inputs are quantized, and how; static ranges are those of each text.
        sequences: tokens int64 [n, length].

    Raises:
        UsageError: the model is too large, or on disk.
    """
    _check(source, how)
    spec, model = source.spec, source.model
    texts = [row[None, :_TOKENS] for row in sequences[:_TEXTS]]
    r1_start, r2_start = RotateResidual(seed, how.head), RotateValues(seed)
    values = CayleyDescent(torch.stack([r2_start.matrices(spec, layer) for layer in range(spec.layers)]))
    moving = [values]
    if spec.residual_is_plain:
        moving.append(CayleyDescent(r1_start.matrix(spec), keep_ones=spec.norm == "layer"))

    def loss(text: Tensor, rotations: list[Tensor]) -> Tensor:
        with torch.no_grad():
            expected = torch.log_softmax(model(text, use_cache=False).logits, -1)
        r2, *r1 = rotations
        with _computing(source, plan, r1[0] if r1 else None, r2, how.head):
            found = torch.log_softmax(model(text, use_cache=False).logits, -1)
        return (expected.exp() * (expected - found)).sum(-1).mean()

    @torch.no_grad()
    def judged(rotations: list[Tensor]) -> float:
        return sum(float(loss(text, rotations)) for text in texts) / len(texts)

    best = [each.rotation for each in moving]
    before = after = judged(best)
    with _frozen(model):
        for step in track(range(how.steps), "learning rotations"):
            leaves = [each.rotation.clone().requires_grad_() for each in moving]
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(texts[step % len(texts)], leaves), leaves)
            angle = how.angle * (1 + math.cos(math.pi * step / how.steps)) / 2
            for each, gradient in zip(moving, gradients, strict=True):
                each.step(gradient, angle)
            if (step + 1) % _JUDGED_EVERY == 0 or step + 1 == how.steps:
                rotations = [nearest_orthogonal(each.rotation) for each in moving]
                now = judged(rotations)
                if now < after:
                    best, after = rotations, now
    r2, *r1 = best
    residual: Transform = LearnedResidual(r1[0], how.head) if r1 else r1_start  # which says why it is left out
    return Learned([residual, LearnedValues(r2)], before, after)


def _check(source: SourceModel, how: Learning) -> None:
    where = "transform learnedrotation"
    if streamed_blocks(source.model) is not None:
        fix = "Take the transform `rotate`, or quantize without streaming"
        raise UsageError("learning needs the whole model in memory, and this one is streamed", where=where, fix=fix)
    count = sum(parameter.numel() for parameter in source.model.parameters())
    if count > how.largest_model:
        problem = f"the model has {count / 1e6:.0f} million parameters, and learning is for small ones"
        fix = f"Take the transform `rotate`, or raise learning.largest_model above {how.largest_model}"
        raise UsageError(problem, where=where, fix=fix)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for gradients."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


class _Rounded(torch.autograd.Function):
    """Rounds, and hands gradients on as they come (the straight-through estimator, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        return how(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class _StraightThrough(TorchFunctionMode):
    """Inside, `round` is `_Rounded`; scales have the gradients that they have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.round, torch.Tensor.round):
            return _Rounded.apply(args[0], func)
        return func(*args, **(kwargs or {}))


def straight_through(x: Tensor, form: ActivationFormat, group_size: int | None) -> Tensor:
    """x float32 [..., in] quantized and dequantized; a static range is that of x; `per_row` rounds ties as `per_token`.

    Gradients go straight through rounding alone: with s a scale and c a code, d(s c) = dx + (c - x / s) ds.
    """
    if x.requires_grad:
        x = x * 1
        # What is 0 throughout divides by 0 on a branch that is not taken; its gradient there is 0 * inf.
        x.register_hook(lambda gradient: torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
    form = _ROUNDING.get(form.scheme, form)
    if not form.needs_range:
        with _StraightThrough():
            return simulate(x, form, group_size=group_size)
    low, high = x.min(), x.max()
    with _StraightThrough():
        found = simulate(x, form, group_size=group_size, static_range=(float(low.detach()), float(high.detach())))
    # The range is a number to `simulate`, but a wider one makes every error of rounding larger.
    width = high - low if form.scheme == "static_uint8" else torch.maximum(-low, high)
    return found + (found - x).detach() * (width / width.detach().clamp_min(1e-30) - 1)


@contextmanager
def _computing(
    source: SourceModel, plan: ActivationPlan, r1: Tensor | None, r2: Tensor, head: HeadMode
) -> Iterator[None]:
    """Inside, the model computes what the rotated one with quantized activations does.

    Args:
        r1: [hidden, hidden], rows are multiplied by it; None for no rotation.
        r2: [layers, kv heads, head size, head size], columns are multiplied by it.
    """
    spec, model = source.spec, source.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    group = spec.heads // spec.kv_heads
    handles: list[Any] = []

    def quantized(module: str, x: Tensor) -> Tensor:
        return straight_through(x, plan.format, plan.group_sizes[module]) if plan.applies_to(module) else x

    def before(module: str, change: Callable[[Tensor], Tensor]) -> None:
        hook = model.get_submodule(module).register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
        handles.append(hook)

    def after_norm(norm: str, *readers: str) -> None:
        gain, reader = norm_gain(spec, parameters, norm), readers[0]
        # Otherwise the norm keeps it, and it is turned with the rest.
        absorbed = all(f"{module}.bias" in parameters for module in readers)
        bias = parameters.get(f"{norm}.bias") if absorbed else None

        def change(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if r1 is None:
                return quantized(reader, output)
            plain = output if bias is None else output - bias
            # A weight of 0 lets nothing through: what stands before it does not matter.
            plain = plain / torch.where(gain == 0, torch.ones_like(gain), gain)
            turn = r1.to(output)
            back = quantized(reader, plain @ turn) @ turn.mT * gain
            return back if bias is None else back + bias

        handles.append(model.get_submodule(norm).register_forward_hook(change))

    def at_output(module: str, rotations: Tensor) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            turn = rotations.to(x).repeat_interleave(group, 0)  # [H, hd, hd]
            heads = x.unflatten(-1, (spec.heads, spec.head_dim))
            turned = torch.einsum("blhi,hji->blhj", heads, turn).flatten(-2)
            kept = quantized(module, turned).unflatten(-1, (spec.heads, spec.head_dim))
            return torch.einsum("blhj,hji->blhi", kept, turn).flatten(-2)

        return change

    try:
        for layer, names in enumerate(spec.layer_names):
            after_norm(names.attention_norm, names.q, names.k, names.v)
            after_norm(names.mlp_norm, *(name for name in (names.up, names.gate) if name))
            before(names.o, at_output(names.o, r2[layer]))
            before(names.down, lambda x, down=names.down: quantized(down, x))  # type: ignore[misc]
        if head == "untied" and r1 is not None:
            after_norm(spec.final_norm, spec.head)
        else:
            before(spec.head, lambda x: quantized(spec.head, x))
        yield
    finally:
        for handle in handles:
            handle.remove()
