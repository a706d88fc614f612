"""The block's statistics against attention written out by hand, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.toolchain.attention import Attention
from toolchain.block import BlockRunner, Stream
from toolchain.entry import entry, own_attention
from toolchain.families import DecoderSpec
from toolchain.loading import SourceModel, load_source
from toolchain.solvers.refine import losses
from toolchain.statistics.block import BlockStatistics, Wanted, collect
from toolchain.statistics.rope import position_mean

LENGTH, BATCH = 11, 3


@pytest.fixture(scope="module")
def block(tiny_model: Path) -> tuple[DecoderSpec, Attention, Tensor, BlockStatistics]:
    source = load_source(str(tiny_model))
    model = source.model.double()
    layer = model.model.layers[0]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, LENGTH, source.spec.hidden_size, generator=generator, dtype=torch.float64)
    runner = open_block(source)
    with torch.no_grad(), own_attention(model):
        stage = tuple(runner.parts)
        statistics, _ = collect(runner, source.spec, stage, Stream(list(hidden.split(2))), None, Wanted(attention=True))
        x = layer.input_layernorm(hidden)
    rotary = model.model.rotary_emb(hidden[:1], torch.arange(LENGTH)[None])
    return source.spec, Attention(source.spec, layer, rotary), x, statistics


def open_block(source: SourceModel) -> BlockRunner:
    """The first block of a model, ready to run on texts of LENGTH tokens."""
    model, names = source.model, source.spec.layer_names[0]
    arguments, _ = entry(model, LENGTH)
    modules = {name: model.get_submodule(name) for name in names.linears()}
    return BlockRunner(model.model.layers[0], names.parts(), modules, arguments[0])


def test_input_hessians_are_twice_the_mean_outer_product(block) -> None:  # type: ignore[no-untyped-def]
    spec, _, x, statistics = block
    flat = x.reshape(-1, spec.hidden_size)
    expected = 2 * flat.mT @ flat / flat.shape[0]
    for role in ("q", "k", "v"):
        assert torch.allclose(statistics.inputs[role], expected, atol=1e-9)
    assert set(statistics.inputs) == set(spec.layer_names[0].parts())


def test_query_key_and_value_statistics_equal_attention_written_out(block) -> None:  # type: ignore[no-untyped-def]
    spec, attention, x, statistics = block
    q, k, _, a = attention.parts(x)
    tokens = BATCH * LENGTH
    assert torch.allclose(statistics.queries, 2 * torch.einsum("bhli,bhlj->hij", q, q) / tokens, atol=1e-9)
    assert torch.allclose(statistics.keys, 2 * torch.einsum("bhli,bhlj->hij", k, k) / tokens, atol=1e-9)
    group = spec.heads // spec.kv_heads
    output = attention.weights["o"].view(-1, spec.kv_heads, group, spec.head_dim)
    overlap = torch.einsum("dghi,dgki->ghk", output, output)
    overlap = overlap / overlap.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    mixed = (a @ x[:, None]).unflatten(1, (spec.kv_heads, group))
    expected = 2 / group * torch.einsum("ghk,bghli,bgklj->gij", overlap, mixed, mixed) / tokens
    assert torch.allclose(statistics.values, expected, atol=1e-9)
    assert statistics.positions == LENGTH
    hd, d = spec.head_dim, spec.hidden_size
    assert statistics.queries.shape == (spec.heads, hd, hd)
    assert statistics.keys.shape == (spec.kv_heads, hd, hd)
    assert statistics.values.shape == (spec.kv_heads, d, d)


def test_value_hessian_is_the_exact_output_error_of_one_head(block) -> None:  # type: ignore[no-untyped-def]
    """V is exact in the attention output, cross-head terms of the group included (algorithms.md 1.2, 1.4)."""
    spec, attention, x, _ = block
    group, hd = spec.heads // spec.kv_heads, spec.head_dim
    change = torch.randn(hd, spec.hidden_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _, _, _, a = attention.parts(x)
    measured = attention.error(x, "v", slice(hd, 2 * hd), change)
    output = attention.weights["o"].view(-1, spec.heads, hd)
    predicted = torch.zeros((), dtype=torch.float64)
    for h in range(group, 2 * group):
        for other in range(group, 2 * group):
            row = output[:, h].mT @ output[:, other]
            left, right = (torch.einsum("blm,bmd->bld", a[:, i], x) for i in (h, other))
            column = torch.einsum("bli,blj->ij", left, right)
            predicted += (row * (change @ column @ change.mT)).sum()
    assert measured == pytest.approx(float(predicted), rel=1e-9)


@pytest.mark.parametrize("projection", ["q", "k"])
def test_row_hessians_of_q_and_k_predict_the_logit_error(block, projection: str) -> None:  # type: ignore[no-untyped-def]
    """BoA's relaxation is the error of the unmasked attention logits; for one position it is exact."""
    spec, attention, x, _ = block
    hd, group = spec.head_dim, spec.heads // spec.kv_heads
    change = torch.randn(hd, spec.hidden_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q, k, _, _ = attention.parts(x)
    inv_freq = torch.tensor(spec.rope_inv_freq, dtype=torch.float64)
    # Sum over l, m of (k_m^T R_l D x_l)^2, position by position, against tr(mean_l R_l^T C R_l D E[xx^T] D^T) with the
    # position's own rotation: the mean over positions is the only approximation that is left.
    moved = attention.rotate(x @ change.mT)
    if projection == "q":
        exact = torch.einsum("bmi,bli->blm", k[:, 0], moved).square().sum()
        partner = torch.einsum("bmi,bmj->bij", k[:, 0], k[:, 0])
    else:
        group_queries = q[:, :group].reshape(BATCH, -1, hd)
        exact = torch.einsum("bmi,bli->blm", group_queries, moved).square().sum()
        partner = torch.einsum("bmi,bmj->bij", group_queries, group_queries)
    written_out = torch.zeros((), dtype=torch.float64)
    for position in range(LENGTH):
        cos, sin = (torch.diag(f(position * inv_freq)) for f in (torch.cos, torch.sin))
        rotation = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0)
        for row in range(BATCH):
            response = change @ x[row, position]
            written_out += response @ (rotation.mT @ partner[row] @ rotation) @ response
    assert torch.allclose(exact, written_out, rtol=1e-5)  # the model's RoPE table is float32
    mean = position_mean(partner.sum(0), inv_freq, LENGTH)
    kronecker = (
        mean * (change @ (x.reshape(-1, spec.hidden_size).mT @ x.reshape(-1, spec.hidden_size)) @ change.mT)
    ).sum()
    assert 0.3 < float(kronecker / BATCH / exact) < 3.0


def test_attention_without_a_causal_mask_is_refused(tiny_model: Path) -> None:
    source = load_source(str(tiny_model))
    runner = open_block(source)
    runner._arguments = {**runner._arguments, "attention_mask": None}
    text = Stream([torch.randn(1, LENGTH, source.spec.hidden_size)])
    with torch.no_grad(), own_attention(source.model), pytest.raises(AssertionError, match="above the diagonal"):
        collect(runner, source.spec, ("q", "k", "v"), text, None, Wanted(attention=True))


def test_a_block_run_in_stages_puts_out_what_it_puts_out_at_once(tiny_model: Path) -> None:
    """Stored outputs, empty tensors before them and passes that end early change nothing."""
    source = load_source(str(tiny_model))
    generator = torch.Generator().manual_seed(6)
    hidden = list(torch.randn(BATCH, LENGTH, source.spec.hidden_size, generator=generator).split(2))
    with torch.no_grad(), own_attention(source.model):
        runner = open_block(source)
        text, reference = Stream(list(hidden)), Stream(list(hidden))
        changed = {role: runner.original(role) * 1.1 for role in runner.parts}
        expected_reference = [runner.run(reference, batch, final=False).hidden for batch in range(2)]
        for stage in (("q", "k"), ("v",), ("o",), ("gate", "up"), ("down",)):
            _, kept = collect(runner, source.spec, stage, text, reference, Wanted(attention=True, residual=1.0))
            for role in stage:
                runner.settle(role, changed[role])
            for role, inputs in kept.items():
                text.outputs[role] = [runner.output(role, x) for x in inputs]
        staged = [runner.run(text, batch, final=True).hidden for batch in range(2)]
        at_once = [runner.run(Stream(list(hidden)), batch, final=True).hidden for batch in range(2)]
    for one, other in zip(staged, at_once, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    for one, other in zip(reference.following, expected_reference, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(staged[0], expected_reference[0], atol=1e-2)


def test_running_a_block_leaves_it_as_it_was(tiny_model: Path) -> None:
    source = load_source(str(tiny_model))
    before = source.model.config._attn_implementation
    originals = {name: value.clone() for name, value in source.model.state_dict().items()}
    runner = open_block(source)
    text = Stream([torch.randn(1, LENGTH, source.spec.hidden_size)])
    with torch.no_grad(), own_attention(source.model):
        runner.settle("q", runner.original("q") * 2)
        collect(runner, source.spec, ("v",), text, None, Wanted(attention=True))
    assert source.model.config._attn_implementation == before
    for name, value in source.model.state_dict().items():
        assert torch.equal(value, originals[name])
    for module in source.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in module.__dict__


def test_targets_are_what_the_original_puts_out_for_the_changed_inputs(tiny_model: Path) -> None:
    """W + E[(y - W x) x^T] H^-1 is the least-squares map from the changed inputs to the original outputs."""
    source = load_source(str(tiny_model))
    source.model.double()
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(16, LENGTH, source.spec.hidden_size, generator=generator, dtype=torch.float64)
    other = hidden + 0.1 * torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad(), own_attention(source.model):
        runner = open_block(source)
        text, reference = Stream(list(other.split(4))), Stream(list(hidden.split(4)))
        statistics, _ = collect(runner, source.spec, tuple(runner.parts), text, reference, Wanted(attention=False))
        seen = [
            runner.run(stream, batch, final=False, inputs=("gate", "down"), outputs=("gate", "down"))
            for stream in (text, reference)
            for batch in range(4)
        ]
    for role in ("gate", "down"):
        x = torch.cat([taps.inputs[role] for taps in seen[:4]]).flatten(0, 1)
        y = torch.cat([taps.outputs[role] for taps in seen[4:]]).flatten(0, 1)
        weight, hessian = runner.original(role), statistics.inputs[role]
        ridge = 1e-9 * torch.eye(hessian.shape[0], dtype=torch.float64) * hessian.diagonal().mean()
        fitted = weight + statistics.lacking[role] @ torch.linalg.inv(hessian + ridge)
        expected = torch.linalg.lstsq(x, y).solution.mT
        assert torch.allclose(fitted, expected, atol=1e-4)


def test_token_weights_weigh_the_tokens(tiny_model: Path) -> None:
    """A sequence of weight two counts as if it were there twice."""
    source = load_source(str(tiny_model))
    source.model.double()
    hidden = torch.randn(2, LENGTH, source.spec.hidden_size, dtype=torch.float64)
    twice = torch.cat([hidden, hidden[1:]])
    weights = [torch.ones(1, LENGTH, dtype=torch.float64), torch.full((1, LENGTH), 2.0, dtype=torch.float64)]
    stage = ("q", "k", "v", "o", "gate", "up", "down")
    with torch.no_grad(), own_attention(source.model):
        runner = open_block(source)
        wanted = Wanted(attention=True)
        weighted, _ = collect(runner, source.spec, stage, Stream(list(hidden.split(1))), None, wanted, weights)
        plain, _ = collect(runner, source.spec, stage, Stream(list(twice.split(1))), None, wanted)
    for role in stage:
        assert torch.allclose(weighted.inputs[role], plain.inputs[role], atol=1e-9)
    for part in ("keys", "queries", "values"):
        assert torch.allclose(getattr(weighted, part), getattr(plain, part), atol=1e-9)


def covariances(attention: Attention, x: Tensor, head: int) -> Tensor:
    """C_l = W_O,h Cov_{a_l}(v, k) / sqrt(hd), [B, L, d, hd]: how the output at l answers to its query (1.9)."""
    hd = attention.spec.head_dim
    _, k, v, a = attention.parts(x)
    k, v, a = k[:, head // attention.group], v[:, head // attention.group], a[:, head]
    mean = a @ v
    moment = torch.einsum("blm,bmi,bmj->blij", a, v, k) - torch.einsum("bli,blj->blij", mean, a @ k)
    return attention.weights["o"][:, head * hd : (head + 1) * hd] @ moment / hd**0.5


@pytest.mark.parametrize("projection", ["q", "k"])
def test_the_attention_error_tends_to_its_quadratic_form(block, projection: str) -> None:  # type: ignore[no-untyped-def]
    """Softmax, causal mask, RoPE and grouped queries included; the ratio tends to 1 linearly (algorithms.md 1.10)."""
    spec, attention, x, _ = block
    hd, head = spec.head_dim, 3
    change = torch.randn(hd, spec.hidden_size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    moved = attention.rotate(x @ change.mT)
    if projection == "q":
        rows = slice(head * hd, (head + 1) * hd)
        answer = torch.einsum("bldi,bli->bld", covariances(attention, x, head), moved)
    else:
        key_head = head // attention.group
        rows = slice(key_head * hd, (key_head + 1) * hd)
        q, _, v, a = attention.parts(x)
        answer = torch.zeros_like(x)
        for each in range(key_head * attention.group, (key_head + 1) * attention.group):
            mean = a[:, each] @ v[:, key_head]
            spread = v[:, key_head][:, None] - mean[:, :, None]  # v_m - o_l, [B, L, M, hd]
            logits = torch.einsum("bli,bmi->blm", q[:, each], moved) / hd**0.5
            mixed = torch.einsum("blm,blm,blmi->bli", a[:, each], logits, spread)
            answer += mixed @ attention.weights["o"][:, each * hd : (each + 1) * hd].mT
    quadratic = float(answer.square().sum())
    deviations = []
    for step in (1e-3, 1e-4):
        ratio = attention.error(x, projection, rows, step * change) / step**2 / quadratic
        deviations.append(abs(ratio - 1))
    assert deviations[1] < 1e-3
    assert deviations[1] < 0.2 * deviations[0] + 1e-6


def test_the_loss_does_not_see_a_rotation_of_the_inputs(block) -> None:  # type: ignore[no-untyped-def]
    spec, _, _, statistics = block
    generator = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(spec.hidden_size, spec.hidden_size, generator=generator).double())[0]
    change = torch.randn(1, 7, spec.hidden_size, generator=generator, dtype=torch.float64)
    hessian = statistics.inputs["gate"][None]
    turned = rotation.mT @ hessian @ rotation
    assert torch.allclose(losses(change @ rotation, turned, None), losses(change, hessian, None))
