"""Every family: its model is quantized, and its statistics are those of its own block, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from boa_edge.errors import BoaEdgeError
from tests.toolchain.families import CONFIGS, WINDOW, Block, rotation
from toolchain.block import Stream
from toolchain.checkpoint import Checkpoint
from toolchain.entry import own_attention
from toolchain.fake_quantized import FakeQuantized
from toolchain.families import DecoderSpec, describe
from toolchain.loading import SourceModel, load_source
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe
from toolchain.run import quantize_model
from toolchain.solve import _attention_hessians
from toolchain.statistics.block import Wanted, collect

LENGTH, BATCH = 11, 3
SMALL = {"sequences": 10, "sequence_length": 32, "held_out_sequences": 1}
FAMILIES = sorted(CONFIGS)
LAYERS = [(family, layer) for family in FAMILIES for layer in (0, 1)]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The classes of `transformers` norm and turn in float32; here in float64, so that small changes can be seen."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spec_says_what_the_model_is(source: Callable[[str], SourceModel], family: str) -> None:
    model, spec = source(family).model, source(family).spec
    assert spec.layers == len(spec.layer_names) == len(spec.attention) == 2
    widths = spec.linear_inputs()
    for names in spec.layer_names:
        parts = names.parts()
        for role, part in parts.items():
            linear = model.get_submodule(part.module)
            assert linear.in_features == widths[part.module]
            assert (linear.bias is not None) == (role in spec.biases)
        rows = {role: model.get_submodule(p.module).weight[p.rows].shape[0] for role, p in parts.items()}
        size = {"q": spec.heads * spec.head_dim, "o": spec.hidden_size, "down": spec.hidden_size}
        size |= dict.fromkeys(("k", "v"), spec.kv_heads * spec.head_dim)
        size |= dict.fromkeys(("gate", "up"), spec.intermediate_size)
        assert rows == {role: size[role] for role in parts}
        norms = (names.attention_norm, names.mlp_norm, names.attention_output_norm, names.mlp_output_norm)
        for norm in (*norms, *names.head_norms().values(), spec.final_norm):
            if norm is not None:
                module = model.get_submodule(norm)
                kind = "layer" if isinstance(module, torch.nn.LayerNorm) else "rms"
                assert spec.norm.startswith(kind)
                assert spec.norm_eps in [getattr(module, name, None) for name in ("eps", "variance_epsilon")]
        named = {name for name, _ in model.named_modules() if name.startswith(names.q.rpartition(".")[0] + ".")}
        assert {name for name in named if name.endswith("norm")} == set(names.head_norms().values())
    rotary = next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)
    for layer, attention in enumerate(spec.attention):
        block = model.get_submodule(spec.layer_names[layer].q.rpartition(".")[0])
        prefix = "" if family != "gemma3" else f"{model.config.layer_types[layer]}_"
        turns = rotary is not None and bool(getattr(block, "use_rope", True))
        assert bool(attention.rope_inv_freq) == turns
        if turns:
            own = getattr(rotary, f"{prefix}inv_freq")
            assert torch.allclose(torch.tensor(attention.rope_inv_freq, dtype=own.dtype), own, rtol=1e-6)
            assert attention.rope_scaling == pytest.approx(getattr(rotary, f"{prefix}attention_scaling"))
    assert spec.tied_embeddings
    assert model.get_parameter(f"{spec.embedding}.weight") is model.get_parameter(f"{spec.head}.weight")
    assert (spec.position_table is None) or model.get_submodule(spec.position_table)


def test_windows_and_longest_texts(source: Callable[[str], SourceModel]) -> None:
    def windows(family: str) -> tuple[int | None, ...]:
        return tuple(each.window for each in source(family).spec.attention)

    assert windows("gemma2") == windows("gemma3") == (WINDOW, None)
    assert windows("qwen2") == windows("qwen3") == (None, WINDOW)
    assert windows("mistral") == windows("phi3") == (WINDOW, WINDOW)
    assert windows("smollm3") == windows("opt") == windows("llama") == (None, None)
    longest = {family: source(family).spec.max_positions for family in FAMILIES}
    assert (longest["mistral"], longest["phi3"], longest["phi4"], longest["gemma3"]) == (WINDOW, WINDOW, 64, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_the_family_is_quantized(
    directory: Callable[[str], Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    """Its checkpoint, loaded into its own class, computes the logits that were promised."""
    settings = {"weights": {"bits": 4, "group_size": 32}, "calibration": SMALL}
    recipe = parse_recipe({"method": "edge", **settings}, "test")
    quantize(str(directory(family)), tmp_path / "ckpt", recipe=recipe, calibration=str(text_file))
    checkpoint = Checkpoint(tmp_path / "ckpt")
    state = checkpoint.dequantized_state()
    state[f"{checkpoint.spec.head}.weight"] = state[f"{checkpoint.spec.embedding}.weight"]
    reloaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory(family))).eval()
    reloaded.load_state_dict(state)
    reference = load_file(tmp_path / "ckpt" / "reference.safetensors")
    with torch.inference_mode():
        logits = reloaded(reference["tokens"][None]).logits[0]
    assert bool(logits.isfinite().all())
    assert torch.allclose(logits, reference["quantized_logits"], atol=1e-4)
    original = reference["original_logits"].float()
    assert 0 < float((logits - original).norm() / original.norm()) < 0.5
    assert set(reference["quantized_greedy"].tolist()) <= set(range(264))

    source = load_source(str(directory(family)))
    tokens = torch.randint(2, 264, (8, 20), generator=torch.Generator().manual_seed(0))
    for method in ("gptq", "boa"):
        quantized = quantize_model(source, parse_recipe({"method": method, **settings}, "test"), tokens)
        assert set(quantized.layers) == reports(source.spec)
        with torch.inference_mode():
            fake = FakeQuantized(source.model, source.spec, quantized.weights).logits(tokens)
        assert bool(fake.isfinite().all())


def reports(spec: DecoderSpec) -> set[str]:
    """What provenance calls the projections: by module, and by role too where several share one."""
    found = set()
    for names in spec.layer_names:
        modules = [part.module for part in names.parts().values()]
        for role, part in names.parts().items():
            found.add(part.module if modules.count(part.module) == 1 else f"{part.module}:{role}")
    return found


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_a_block_run_in_stages_puts_out_what_it_puts_out_at_once(
    source: Callable[[str], SourceModel], family: str, layer: int
) -> None:
    with torch.no_grad():
        block = Block(source(family), layer, BATCH, LENGTH)
        hidden = list(block.hidden.split(2))
        runner = block.runner()
        text, reference = Stream(list(hidden)), Stream(list(hidden))
        changed = {role: runner.original(role) * 1.1 for role in runner.parts}
        wanted = Wanted(attention=True, residual=1.0)
        with own_attention(block.source.model):
            expected = [runner.run(reference, batch, final=False).hidden for batch in range(2)]
            for stage in (("q", "k"), ("v",), ("o",), ("gate", "up"), ("down",)):
                present = tuple(role for role in stage if role in runner.parts)
                statistics, kept = collect(runner, block.spec, present, text, reference, wanted)
                for role in present:
                    runner.settle(role, changed[role])
                    assert statistics.lacking[role].shape == runner.original(role).shape
                for role, inputs in kept.items():
                    text.outputs[role] = [runner.output(role, x) for x in inputs]
            staged = [runner.run(text, batch, final=True).hidden for batch in range(2)]
            at_once = [runner.run(Stream(list(hidden)), batch, final=True).hidden for batch in range(2)]
    # The classes of `transformers` norm in float32.
    assert torch.allclose(torch.cat(staged), torch.cat(at_once), atol=1e-5)
    assert torch.allclose(torch.cat(reference.following), torch.cat(expected), atol=1e-5)
    assert not torch.allclose(torch.cat(staged), torch.cat(expected), atol=1e-2)


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_the_statistics_are_those_of_the_block_itself(
    source: Callable[[str], SourceModel], wide: None, family: str, layer: int
) -> None:
    block = Block(source(family), layer, BATCH, LENGTH)
    spec, model, names = block.spec, block.source.model, block.names
    tokens, hd, group = BATCH * LENGTH, spec.head_dim, spec.heads // spec.kv_heads
    runner = block.runner()
    taken: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(part.module).register_forward_pre_hook(
            lambda _, given, role=role: taken.__setitem__(role, given[0].reshape(tokens, -1))
        )
        for role, part in runner.parts.items()
    ]
    with own_attention(model):
        runner.run(Stream([block.hidden]), 0, final=False)
        for hook in hooks:
            hook.remove()
        statistics, _ = collect(
            runner, spec, tuple(runner.parts), Stream(list(block.hidden.split(2))), None, Wanted(attention=True)
        )
    assert torch.equal(taken["q"], model.get_submodule(names.attention_norm)(block.hidden).flatten(0, 1))
    for role, x in taken.items():
        assert torch.allclose(statistics.inputs[role], 2 * x.mT @ x / tokens, atol=1e-9)

    seen = block.see()
    if block.turn.window is not None:
        assert float(seen.weights.tril(-block.turn.window).abs().amax()) == 0.0
    else:
        assert float(seen.weights[:, :, -1, 0].amin()) > 0.0
    assert torch.allclose(statistics.queries, 2 * torch.einsum("bhli,bhlj->hij", seen.query, seen.query) / tokens)
    assert torch.allclose(statistics.keys, 2 * torch.einsum("bhli,bhlj->hij", seen.key, seen.key) / tokens)
    # Both factors of the value Hessian are partial traces of the exact one, cross-head terms included.
    output = runner.original("o").view(-1, spec.kv_heads, group, hd)
    overlap = torch.einsum("dghi,dgki->ghk", output, output)
    mixed = (seen.weights @ seen.x[:, None]).unflatten(1, (spec.kv_heads, group))
    moments = 2 * torch.einsum("bghli,bgklj->ghkij", mixed, mixed) / tokens
    over_rows = torch.einsum("ghk,ghkij->gij", overlap, moments)
    over_columns = torch.einsum("dghi,ghk,dgkj->gij", output, moments.diagonal(dim1=3, dim2=4).sum(-1), output)
    whole = over_rows.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    assert torch.allclose(
        statistics.values * group, over_rows / overlap.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    )
    assert torch.allclose(
        statistics.value_rows, over_columns * overlap.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] / whole
    )
    traces = [each.diagonal(dim1=1, dim2=2).sum(-1) for each in (statistics.values, statistics.value_rows)]
    assert torch.allclose(traces[0] * traces[1], whole[:, 0, 0])

    rows, _ = _attention_hessians(spec, statistics)
    partners = {
        "q": statistics.keys.repeat_interleave(group, 0),
        "k": statistics.queries.unflatten(0, (spec.kv_heads, group)).mean(1),
    }
    for role, partner in partners.items():
        turns = [rotation(spec, block.turn, position) for position in range(LENGTH)]
        mean = sum(turn.mT @ partner @ turn for turn in turns) / LENGTH
        jacobians = block.jacobians(role, seen.x)
        expected = torch.einsum("bhlki,hkm,bhlmj->hij", jacobians, mean, jacobians) / tokens
        assert torch.allclose(rows[role], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("role", ["q", "k"])
@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_the_error_of_q_and_k_tends_to_its_quadratic_form(
    source: Callable[[str], SourceModel], wide: None, family: str, layer: int, role: str
) -> None:
    """Of the logits and of the attention's output: bias, head norm, RoPE, window, softcap and grouped heads included.

    The error of the real block on W + step D, over step^2, tends to the form linearly.
    """
    block = Block(source(family), layer, 2, LENGTH)
    seen, weight = block.see(), block.runner().original(role)
    change = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scores = block.logit_change(seen, role, block.answer(seen, change))
    forms = (float(scores.square().sum()), float(block.output_change(seen, scores).sum(1).square().sum()))
    group = block.spec.heads // block.spec.kv_heads
    deviations = []
    for step in (1e-3, 1e-4):
        other = block.see(role, step * change)
        both = [each.scaling * each.query @ each.key.repeat_interleave(group, 1).mT for each in (seen, other)]
        errors = ((both[1] - both[0]).square().sum(), (other.output - seen.output).square().sum())
        deviations.append([abs(float(e) / step**2 / form - 1) for e, form in zip(errors, forms, strict=True)])
    for far, near in zip(*deviations, strict=True):
        assert near < 1e-3
        assert near < 0.2 * far + 1e-5


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_the_error_of_v_is_its_kronecker_form(
    source: Callable[[str], SourceModel], wide: None, family: str, layer: int
) -> None:
    """Exact in the attention output, cross-head terms of the group included (algorithms.md 1.2, 1.4)."""
    block = Block(source(family), layer, 2, LENGTH)
    spec, seen = block.spec, block.see()
    hd, group, head = spec.head_dim, spec.heads // spec.kv_heads, spec.kv_heads - 1
    own = torch.randn(hd, spec.hidden_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    change = torch.zeros_like(block.runner().original("v"))
    change[head * hd : (head + 1) * hd] = own
    output = block.runner().original("o").view(-1, spec.heads, hd)
    mixed = seen.weights @ seen.x[:, None]
    predicted = torch.zeros((), dtype=torch.float64)
    for h in range(head * group, (head + 1) * group):
        for other in range(head * group, (head + 1) * group):
            row = output[:, h].mT @ output[:, other]
            column = torch.einsum("bli,blj->ij", mixed[:, h], mixed[:, other])
            predicted += (row * (own @ column @ own.mT)).sum()
    assert block.error("v", change) == pytest.approx(float(predicted), rel=1e-9)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "opt", "phi4", "qwen3"])
def test_gauss_newton_rows_are_the_sum_of_the_tokens_own_forms(
    source: Callable[[str], SourceModel], wide: None, family: str
) -> None:
    """Sums over l (q) and over m (k, terms m = m') of what a change of one token's query or key does to the output."""
    block = Block(source(family), 0, 1, 7)
    spec, seen, runner = block.spec, block.see(), block.runner()
    wanted = Wanted(attention=True, gauss_newton=True)
    with own_attention(block.source.model):
        statistics, _ = collect(runner, spec, ("q", "k"), Stream([block.hidden]), None, wanted)
    hd, group = spec.head_dim, spec.heads // spec.kv_heads
    for role, heads in (("q", spec.heads), ("k", spec.kv_heads)):
        expected = torch.zeros(heads, hd, hd, dtype=torch.float64)
        for position in range(7):
            outputs = []
            for channel in range(hd):
                answer = torch.zeros(1, heads, 7, hd, dtype=torch.float64)
                answer[:, :, position, channel] = 1
                outputs.append(block.output_change(seen, block.logit_change(seen, role, answer)).flatten(2))
            answers = torch.stack(outputs, 2)[0]  # [H, hd, L d]
            forms = answers @ answers.mT
            expected += forms if role == "q" else forms.unflatten(0, (heads, group)).sum(1)
        found = statistics.rows[role]
        ratio = (found * expected).sum((1, 2)) / expected.square().sum((1, 2))
        assert torch.allclose(found, expected * ratio[:, None, None], rtol=1e-6, atol=1e-6 * float(expected.amax()))
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-6)


def test_the_residual_is_made_up_for_only_where_it_is_plain(source: Callable[[str], SourceModel]) -> None:
    """A norm between `o` and the stream would turn what is added into something else."""
    for family, plain in (("gemma3", False), ("qwen3", True)):
        with torch.no_grad():
            block = Block(source(family), 0, 2, LENGTH)
            assert block.spec.residual_is_plain == plain
            runner, generator = block.runner(), torch.Generator().manual_seed(3)
            moved = block.hidden + 0.1 * torch.randn(block.hidden.shape, generator=generator, dtype=torch.float64)
            lacking = []
            for residual in (0.0, 1.0):
                text, reference = Stream([moved]), Stream([block.hidden])
                wanted = Wanted(attention=False, residual=residual)
                with own_attention(block.source.model):
                    statistics, _ = collect(runner, block.spec, ("o",), text, reference, wanted)
                lacking.append(statistics.lacking["o"])
        assert torch.equal(*lacking) != plain


BASE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
REFUSED = {
    "mixtral": ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, "experts"),
    "qwen3-moe": ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "is a mixture of experts"),
    "deepseek": ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "is a mixture of experts"),
    "gemma3": (
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}},
        "is a multimodal model",
    ),
    "qwen2-vl": ({"model_type": "qwen2_vl", "vision_config": {"depth": 2}}, "is a multimodal model"),
    "embedding-gemma": (
        {**BASE, "model_type": "gemma3_text", "use_bidirectional_attention": True},
        "use_bidirectional_attention: the model looks ahead",
    ),
    "opt-350m": (
        {"model_type": "opt", "architectures": ["OPTForCausalLM"], "do_layer_norm_before": False},
        "do_layer_norm_before: norms stand after the sublayers",
    ),
    "opt-projected": ({"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 32}, "are projected to 64"),
    "opt-bare-norms": (
        {"model_type": "opt", "layer_norm_elementwise_affine": False},
        "layer_norm_elementwise_affine: is false: the norms have no weights",
    ),
    "activation": ({**BASE, "model_type": "qwen3", "hidden_act": "gelu"}, "activation 'gelu'"),
    "partial": (
        {**BASE, "model_type": "llama", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
    "dynamic": (
        {**BASE, "model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "RoPE type 'dynamic'",
    ),
    "unknown": ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "no adapter for model_type 'mamba'"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused_in_one_line(config: dict[str, object], message: str) -> None:
    with pytest.raises(BoaEdgeError) as caught:
        describe(config, "config.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Accepted" in str(caught.value) or "Only" in str(caught.value) or "Remove" in str(caught.value)
