"""The block's statistics against attention written out by hand, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.toolchain.attention import Attention
from toolchain.families import DecoderSpec
from toolchain.loading import load_source
from toolchain.methods import quadratic_loss
from toolchain.statistics.block import BlockCollector, BlockStatistics, causal_mask
from toolchain.statistics.rope import position_mean

LENGTH, BATCH = 11, 3


@pytest.fixture(scope="module")
def block(tiny_model: Path) -> tuple[DecoderSpec, Attention, Tensor, BlockStatistics, dict[str, Tensor]]:
    source = load_source(str(tiny_model))
    model = source.model.double()
    layer = model.model.layers[0]
    names = source.spec.layer_names[0]
    linears = {name: model.get_submodule(name) for name in names.linears()}
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, LENGTH, source.spec.hidden_size, generator=generator, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _m, inputs, name=name: seen.__setitem__(name, inputs[0]))
    collector = BlockCollector(source.spec, names, linears, model.config, attention=True)
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad(), collector.collecting():
        for part in hidden.split(2):
            embeddings = model.model.rotary_emb(part, positions)
            layer(part, attention_mask=causal_mask(LENGTH, torch.float64), position_embeddings=embeddings)
        x = layer.input_layernorm(hidden)
    rotary = model.model.rotary_emb(hidden[:1], positions)
    return source.spec, Attention(source.spec, layer, rotary), x, collector.statistics(), seen


def test_input_hessians_are_twice_the_mean_outer_product(block) -> None:  # type: ignore[no-untyped-def]
    spec, _, x, statistics, _ = block
    flat = x.reshape(-1, spec.hidden_size)
    expected = 2 * flat.mT @ flat / flat.shape[0]
    for name in (spec.layer_names[0].q, spec.layer_names[0].k, spec.layer_names[0].v):
        assert torch.allclose(statistics.inputs[name], expected, atol=1e-9)
    assert set(statistics.inputs) == set(spec.layer_names[0].linears())


def test_query_key_and_value_statistics_equal_attention_written_out(block) -> None:  # type: ignore[no-untyped-def]
    spec, attention, x, statistics, _ = block
    q, k, _, a = attention.parts(x)
    tokens = BATCH * LENGTH
    assert torch.allclose(statistics.queries, 2 * torch.einsum("bhli,bhlj->hij", q, q) / tokens, atol=1e-9)
    assert torch.allclose(statistics.keys, 2 * torch.einsum("bhli,bhlj->hij", k, k) / tokens, atol=1e-9)
    group = spec.heads // spec.kv_heads
    per_head = attention.weights["o"].square().view(-1, spec.kv_heads, group, spec.head_dim).sum((0, 3))
    weights = per_head / per_head.mean(1, keepdim=True)
    mixed = a @ x[:, None]
    per_query = 2 * torch.einsum("bhli,bhlj->hij", mixed, mixed) / tokens
    expected = torch.einsum("gh,ghij->gij", weights / group, per_query.view(spec.kv_heads, group, *per_query.shape[1:]))
    assert torch.allclose(statistics.values, expected, atol=1e-9)
    assert statistics.positions == LENGTH
    hd, d = spec.head_dim, spec.hidden_size
    assert statistics.queries.shape == (spec.heads, hd, hd)
    assert statistics.keys.shape == (spec.kv_heads, hd, hd)
    assert statistics.values.shape == (spec.kv_heads, d, d)


def test_value_hessian_is_the_exact_output_error_of_one_head(block) -> None:  # type: ignore[no-untyped-def]
    """V is exact in the attention output, cross-head terms of the group included (algorithms.md 1.2, 1.4)."""
    spec, attention, x, _, _ = block
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
    spec, attention, x, _, _ = block
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


def test_attention_without_a_causal_mask_is_refused(block, tiny_model: Path) -> None:  # type: ignore[no-untyped-def]
    source = load_source(str(tiny_model))
    model, names = source.model, source.spec.layer_names[0]
    linears = {name: model.get_submodule(name) for name in names.linears()}
    collector = BlockCollector(source.spec, names, linears, model.config, attention=True)
    hidden = torch.randn(1, LENGTH, source.spec.hidden_size)
    embeddings = model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    with torch.no_grad(), collector.collecting(), pytest.raises(AssertionError, match="above the diagonal"):
        model.model.layers[0](hidden, attention_mask=None, position_embeddings=embeddings)


def test_collecting_leaves_the_block_as_it_was(tiny_model: Path) -> None:
    source = load_source(str(tiny_model))
    model, names = source.model, source.spec.layer_names[0]
    linears = {name: model.get_submodule(name) for name in names.linears()}
    before = model.config._attn_implementation
    with BlockCollector(source.spec, names, linears, model.config, attention=True).collecting():
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    assert not any(linear._forward_pre_hooks for linear in linears.values())


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
    spec, attention, x, _, _ = block
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
    spec, _, _, statistics, _ = block
    name = spec.layer_names[0].gate
    generator = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(spec.hidden_size, spec.hidden_size, generator=generator).double())[0]
    change = torch.randn(1, 7, spec.hidden_size, generator=generator, dtype=torch.float64)
    hessian = statistics.inputs[name][None]
    turned = rotation.mT @ hessian @ rotation
    assert quadratic_loss(change @ rotation, turned, None) == pytest.approx(quadratic_loss(change, hessian, None))
