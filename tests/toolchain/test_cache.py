"""The int8 cache: its codes, its plan, what it costs, and what takes that cost back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import read_json, write_json
from tests.toolchain.families import CONFIGS
from tests.toolchain.test_w4a8 import quantized, rebuilt
from tests.toolchain.transformed import TOKENS, logits, wide
from toolchain.activations.cache import (
    CachePlan,
    quantize_per_head,
    quantize_per_token,
    through_cache,
)
from toolchain.block import BlockRunner, Stream
from toolchain.cache_search import head_errors, head_scales, key_metric, search_key_smoothing, value_metric
from toolchain.entry import decoder_layers, entry, own_attention
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import SourceModel
from toolchain.prepare import Prepared, prepare
from toolchain.recipe import Recipe, load_recipe, parse_recipe
from toolchain.run import quantize_model
from toolchain.transforms import Smooth, apply, scale_shape, turns_of

FAMILIES = sorted(CONFIGS)
KV8 = ("per_token", "per_head")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def recipe(scheme: str, *transforms: str) -> Recipe:
    document = {"method": "rtn", "weights": {"bits": 8}, "kv_cache": {"scheme": scheme}, "transforms": list(transforms)}
    return parse_recipe(document, "test")


def fake(prepared: Prepared) -> FakeQuantized:
    return FakeQuantized(prepared.source.model, prepared.source.spec, {}, None, prepared.cache)


def stepwise(model: FakeQuantized, first: int) -> Tensor:
    """Logits of TOKENS, of which the first ones are read at once and the others one after the other."""
    output = model._call(TOKENS[:, :first], use_cache=True)
    seen = [output.logits]
    for tokens in TOKENS[:, first:].split(1, 1):
        output = model._call(tokens, past_key_values=output.past_key_values, use_cache=True)
        seen.append(output.logits)
    return torch.cat(seen, 1)


@pytest.mark.parametrize("scheme", KV8)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_read_at_once_sees_what_one_read_token_by_token_does(
    source: Callable[[str], SourceModel], family: str, scheme: str
) -> None:
    """With R3 and without; and what it sees is not the keys and values in floating point."""
    original = source(family)
    for transforms in ((), ("rotatekeys",)):
        with wide():
            prepared = prepare(original, recipe(scheme, *transforms), TOKENS)
            expected = fake(prepared).logits(TOKENS)
            for first in (1, 6, 15):
                assert float((stepwise(fake(prepared), first) - expected).abs().amax()) < 1e-9
            plain = logits(original.model)
            away = float((expected - plain).abs().amax())
            assert 1e-4 < away < 0.3 * float(plain.std())
            # And the model is left as it was.
            assert float((logits(prepared.source.model) - plain).abs().amax()) < 1e-9


def _last_hidden(prepared: Prepared) -> Tensor:
    seen: list[Any] = []
    last = decoder_layers(prepared.source.model)[-1]
    hook = last.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    fake(prepared).logits(TOKENS)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("scheme", KV8)
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_of_what_attention_sees_through_the_cache(
    source: Callable[[str], SourceModel], family: str, scheme: str
) -> None:
    """Block by block on settled weights, as the quantizer goes, the text comes out where the simulation has it."""
    for transforms in ((), ("rotatekeys",)):
        with wide():
            prepared = prepare(source(family), recipe(scheme, *transforms), TOKENS)
            model, spec, plan = prepared.source.model, prepared.source.spec, prepared.cache
            assert plan is not None
            output = _last_hidden(prepared)
            arguments, embed = entry(model, TOKENS.shape[1])
            hidden = {True: embed(TOKENS), False: embed(TOKENS)}
            for index, names in enumerate(spec.layer_names):
                modules: Any = {name: model.get_submodule(name) for name in names.linears()}
                kept = plan.seen_by(index, turns_of(model, spec).get(index))
                block = decoder_layers(model)[index]
                runner = BlockRunner(block, names.parts(), modules, arguments[index], index=index, kept=kept)
                with own_attention(model):
                    for final in hidden:
                        found = runner.run(Stream([hidden[final]]), 0, final=final).hidden
                        assert found is not None
                        hidden[final] = found
            assert float((hidden[True] - output).abs().amax()) < 1e-9
            # The original's text, which the quantizer compares with, goes by no cache.
            assert float((hidden[False] - output).abs().amax()) > 1e-6


def test_a_solver_knows_of_the_cache(source: Callable[[str], SourceModel]) -> None:
    document = {"method": "gptq", "weights": {"bits": 4}, "embedding": None, "kv_cache": {}}
    prepared = prepare(source("llama"), parse_recipe(document, "test"), TOKENS)
    chosen = parse_recipe(document, "test")
    codes = {
        cache: quantize_model(prepared.source, chosen, TOKENS.repeat(4, 1), cache=cache).weights
        for cache in (None, prepared.cache)
    }
    names = prepared.source.spec.layer_names[0]
    same = {name: torch.equal(codes[None][name].codes, codes[prepared.cache][name].codes) for name in codes[None]}
    assert same[names.q], "nothing before the first attention goes by a cache"
    assert not all(same.values())


def test_without_a_plan_nothing_changes(source: Callable[[str], SourceModel]) -> None:
    llama = source("llama")
    prepared = prepare(llama, parse_recipe({"method": "rtn", "weights": {"bits": 8}}, "test"), TOKENS)
    assert (prepared.cache, prepared.cache_statistics) == (None, None)
    assert torch.equal(fake(prepared).logits(TOKENS), logits(llama.model))


def _heads(*shape: int, outlier: float = 1.0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[..., 3] *= outlier
    return x


def test_codes_stay_in_range_and_are_the_nearest() -> None:
    x = _heads(2, 3, 40, 16, outlier=30.0)
    x[0, 1, 5] = 0
    codes, scales = quantize_per_token(x)
    assert codes.dtype == torch.int8
    assert scales.shape == (2, 3, 40, 1)
    assert int(codes.min()) >= -127
    assert torch.equal(codes.abs().amax(-1) == 127, x.abs().amax(-1) > 0)
    assert bool(((codes * scales - x).abs() <= scales / 2 * (1 + 1e-9)).all())
    assert torch.equal(through_cache(x, None), codes * scales)
    fixed = torch.tensor([0.02, 0.5, 1.0])
    codes, scales = quantize_per_head(x, fixed)
    assert (int(codes.min()), int(codes.max())) == (-128, 127)  # the first head is clipped
    inside = (x / fixed.double()[:, None, None]).abs() <= 127
    assert int((~inside).sum()) > 0
    assert bool((((codes * scales - x).abs() <= scales / 2 * (1 + 1e-9)) | ~inside).all())
    assert torch.equal(through_cache(x, fixed), codes * scales)


def test_the_scale_of_a_head_has_the_least_error_under_its_metric() -> None:
    """A channel that no query looks at is clipped without regret."""
    x = _heads(2, 300, 16, outlier=50.0)
    metric = torch.eye(16, dtype=torch.float64).repeat(2, 1, 1)
    metric[1, 3, 3] = 0
    scales = head_scales(x, metric)
    assert float(scales[0]) > 0.6 * float(x[0].abs().max()) / 127
    assert float(scales[1]) < 0.25 * float(x[1].abs().max()) / 127
    widest = through_cache(x, x.abs().amax((1, 2)) / 127) - x
    found = through_cache(x, scales) - x
    assert bool((head_errors(found, metric) <= head_errors(widest, metric)).all())
    assert float(head_errors(found, metric)[1]) < 0.1 * float(head_errors(widest, metric)[1])


def test_metrics_are_the_errors_of_logits_and_outputs() -> None:
    """Written out: E|q^T dk|^2 over all queries and keys, and |W_o dv|^2, both over the heads of a group."""
    query, change, output = _heads(4, 30, 8), _heads(2, 20, 8), _heads(12, 32)
    scores = query @ change.repeat_interleave(2, 0).mT
    expected = scores.square().mean((1, 2)).view(2, 2).sum(1)
    assert torch.allclose(head_errors(change, key_metric(query, 2)), expected)
    columns = output.view(12, 4, 8)
    written = torch.einsum("dhi,hni->hnd", columns, change.repeat_interleave(2, 0))
    expected = written.square().sum(2).mean(1).view(2, 2).sum(1)
    assert torch.allclose(head_errors(change, value_metric(output, 4, 2)), expected)


@pytest.mark.parametrize("scheme", KV8)
@pytest.mark.parametrize("joint", [False, True])
def test_keys_are_smoothed_where_that_pays(scheme: Any, joint: bool) -> None:
    query, key = _heads(4, 200, 16) / 4, _heads(2, 200, 16, outlier=40.0)
    found = search_key_smoothing(query, key, scheme, 6, joint=joint)
    assert found.scales.shape == (1 if joint else 2, 16)
    assert torch.equal(found.scales[:, :6], found.scales[:, 6:12])
    assert torch.equal(found.scales.log2(), found.scales.log2().round())
    assert found.error < 0.3 * found.before
    # What it says is what comes out.
    spread = found.scales.expand(2, 16)[:, None]
    kept, metric = key / spread, key_metric(query * spread.repeat_interleave(2, 0), 2)
    change = through_cache(kept, head_scales(kept, metric) if scheme == "per_head" else None) - kept
    assert found.error == pytest.approx(float(head_errors(change, metric).sum()), rel=1e-12)
    none = search_key_smoothing(query, key, scheme, 6, joint=joint, strengths=())
    assert none.error == none.before == found.before
    assert bool((none.scales == 1).all())


def planted(source: SourceModel, factor: float) -> SourceModel:
    """The same function with two channels of every head's keys `factor` times as large."""
    scales = {}
    for layer in range(source.spec.layers):
        scale = torch.ones(scale_shape(source.spec, layer, "q_k"), dtype=torch.float64)
        half = len(source.spec.attention[layer].rope_inv_freq)
        scale[:, [1, half + 1]] = 1 / factor
        scales[layer, "q_k"] = scale
    return apply(source, [Smooth(scales)])[0]  # type: ignore[arg-type]


def cost(source: SourceModel, scheme: str, *transforms: str) -> float:
    """KL in nats per token that the cache costs alone."""
    with wide():
        prepared = prepare(source, recipe(scheme, *transforms), TOKENS)
        one, other = (torch.log_softmax(x, -1) for x in (logits(source.model), fake(prepared).logits(TOKENS)))
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "scheme"),
    [*((family, "per_token") for family in ("llama", "qwen3", "gemma3", "phi4", "opt")), ("qwen3", "per_head")],
)
def test_key_outliers_cost_and_are_taken_out_again(
    source: Callable[[str], SourceModel], family: str, scheme: str
) -> None:
    """The norms on heads of qwen3 and gemma3 take the scales up, and leave R3 to turn what they put out."""
    original, wild = source(family), planted(source(family), 64.0)
    little = cost(original, scheme)
    much = cost(wild, scheme)
    assert much > 20 * little
    assert cost(planted(original, 8.0), scheme) < 0.2 * much
    turned, smoothed = cost(wild, scheme, "rotatekeys"), cost(wild, scheme, "smooth")
    assert turned < 0.7 * much
    assert smoothed < 0.1 * much


def test_only_a_recipe_with_a_cache_smooths_keys(source: Callable[[str], SourceModel]) -> None:
    for document, smoothed in (({}, False), ({"kv_cache": {}}, True)):
        base = {"method": "rtn", "weights": {"bits": 8}, "transforms": ["smooth"]}
        prepared = prepare(source("llama"), parse_recipe(base | document, "test"), TOKENS)
        (transform,) = prepared.transforms
        assert isinstance(transform, Smooth)
        assert ({pair for _, pair in transform.scales} >= {"q_k"}) == smoothed


@pytest.mark.parametrize("scheme", KV8)
def test_a_checkpoint_holds_the_cache(scheme: str, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    fields = {"kv_cache": {"scheme": scheme}, "activations": {}, "transforms": ["rotatekeys", "smooth"]}
    checkpoint = quantized(tiny_model, tmp_path / "ckpt", text_file, **fields)
    assert checkpoint.recipe["kv_cache"] == {"scheme": scheme, "bits": 8}
    reference = load_file(tmp_path / "ckpt" / "reference.safetensors")
    model, spec = rebuilt(checkpoint), checkpoint.spec
    again, without = (
        FakeQuantized(model, spec, {}, checkpoint.activations, cache).logits(reference["tokens"][None])[0]
        for cache in (checkpoint.kv_cache, None)
    )
    expected = reference["quantized_logits"]
    away = float((again - expected).abs().mean())
    assert away < 0.1 * float((without - expected).abs().mean())
    told = checkpoint.provenance["kv_cache"]
    for name in ("keys", "values"):
        ranges = torch.tensor(told["ranges"][name])
        assert ranges.shape == (spec.layers, spec.kv_heads, 2)
        assert bool((ranges[..., 0] < ranges[..., 1]).all())
    # A static scale covers what was seen, or clips it.
    plan = checkpoint.kv_cache
    assert plan is not None
    if scheme == "per_head":
        largest = torch.tensor(told["ranges"]["keys"]).abs().amax(-1)
        assert bool((torch.tensor(plan.key_scales) <= largest / 127 * 1.001).all())


def test_a_plan_on_disk_is_checked(source: Callable[[str], SourceModel], tmp_path: Path) -> None:
    spec = source("llama").spec
    scales = ((0.5,) * spec.kv_heads,) * spec.layers
    good = CachePlan("per_head", key_scales=scales, value_scales=scales)
    write_json(tmp_path / "plan.json", good.to_document())
    document = read_json(tmp_path / "plan.json", "it")
    assert CachePlan.from_document(document, spec, "here") == good
    changes: tuple[tuple[dict[str, object], str], ...] = (
        ({"scheme": "per_channel"}, "there is no cache scheme 'per_channel'; known: per_token, per_head"),
        ({"scheme": "per_token"}, "key_scales: per_token takes none"),
        ({"bits": 4}, "8 bits, not 4"),
        ({"value_scales": []}, "value_scales: per_head needs them"),
        ({"value_scales": [[0.5, 0.5]]}, "value_scales: not one scale for each head of the model"),
        ({"key_scales": [[0.5, 0.0]] * 2}, "key_scales must be positive"),
        ({"key_scales": 3}, "is not a plan for the cache"),
        ({"schema_version": 2}, "schema_version is 2"),
    )
    for change, message in changes:
        with pytest.raises(BoaEdgeError, match=message):
            CachePlan.from_document({**document, **change}, spec, "here")
    for broken in (None, [], {"scheme": "per_token"}):
        with pytest.raises(BoaEdgeError, match="here: is not a plan for the cache"):
            CachePlan.from_document(broken, spec, "here")


def test_recipes_spell_the_cache() -> None:
    for name in ("w4g32a8kv8-edge-smooth", "w4g32kv8-gptq", "w3asymkv8-rtn"):
        chosen = load_recipe(name)
        assert chosen.kv_cache is not None
        assert (chosen.kv_cache.scheme, chosen.name) == ("per_head", name)
    assert load_recipe("w4g32a8-edge").kv_cache is None
    base = {"method": "rtn", "weights": {"bits": 4}}
    for cache, message in (
        ({"shceme": "per_token"}, "unknown key 'kv_cache.shceme', did you mean 'scheme'"),
        ({"scheme": "per_layer"}, "kv_cache.scheme: Input should be 'per_token' or 'per_head'"),
        ({"bits": 4}, "kv_cache.bits: Input should be 8"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_recipe({**base, "kv_cache": cache}, "test")
    assert parse_recipe(parse_recipe({**base, "kv_cache": {"scheme": "per_head"}}, "x").model_dump(), "y").kv_cache
