"""A model whose blocks stay on disk gives what the same model gives from memory, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model, tiny_config
from tests.toolchain.families import CONFIGS, make
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import load_source
from toolchain.loading.shards import stored_tensors
from toolchain.loading.streamed import StreamedBlocks, is_large, streamed_blocks
from toolchain.quantize import quantize
from toolchain.recipe import Recipe, parse_recipe
from toolchain.resume import ResumeFile
from toolchain.spill import Spill


def recipe(method: str) -> Recipe:
    document = {
        "method": method,
        "weights": {"bits": 3, "group_size": 32, "symmetric": False},
        "calibration": {"sequences": 6, "sequence_length": 32, "held_out_sequences": 2},
    }
    return parse_recipe(document, "test")


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "embedding.safetensors")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks in several files, in bfloat16, with a head of its own."""
    directory = tmp_path_factory.mktemp("sharded") / "model"
    config = tiny_config(num_hidden_layers=3, tie_word_embeddings=False, attention_bias=True)
    make_model(directory, config)
    model = load_source(str(directory)).model.to(torch.bfloat16)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    return directory


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers in the weights of blocks that are in memory, each time a block has been read."""
    counts: list[int] = []
    take = StreamedBlocks._take

    def note(self: StreamedBlocks, index: int) -> None:
        take(self, index)
        parameters = [parameter for layer in self._layers for parameter in layer.parameters()]
        counts.append(sum(parameter.numel() for parameter in parameters if not parameter.is_meta))

    monkeypatch.setattr(StreamedBlocks, "_take", note)
    return counts


@pytest.mark.parametrize("method", ["edge", "gptq", "rtn"])
def test_streamed_and_resident_models_get_the_same_codes(
    method: str, sharded: Path, text_file: Path, tmp_path: Path, live: list[int]
) -> None:
    arguments = {"recipe": recipe(method), "calibration": str(text_file)}
    whole = quantize(str(sharded), tmp_path / "whole", stream=False, **arguments)
    assert live == []
    streamed = quantize(str(sharded), tmp_path / "streamed", stream=True, spill=tmp_path / "spill", **arguments)
    one, other = stored(tmp_path / "whole"), stored(tmp_path / "streamed")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert streamed.rows[-1].kl == pytest.approx(whole.rows[-1].kl, rel=1e-4)
    assert streamed.original_perplexity == pytest.approx(whole.original_perplexity, rel=1e-5)
    references = [load_file(tmp_path / name / "reference.safetensors") for name in ("whole", "streamed")]
    assert torch.allclose(references[0]["quantized_logits"], references[1]["quantized_logits"], atol=1e-4)
    for name in ("original_greedy", "quantized_greedy"):
        assert torch.equal(references[0][name][:8], references[1][name])
    blocks = load_source(str(sharded)).model.model.layers
    assert 0 < max(live) <= max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    assert list((tmp_path / "spill").iterdir()) == [] if method != "rtn" else True


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_can_be_streamed(family: str, tmp_path: Path, live: list[int]) -> None:
    directory = make(tmp_path / "model", family)
    whole, streamed = load_source(str(directory)), load_source(str(directory), stream=True)
    assert streamed_blocks(streamed.model) is not None
    assert whole.model.state_dict().keys() == streamed.model.state_dict().keys()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, streamed.parameter(name)), name
    tokens = torch.arange(20)[None] + 3
    with torch.inference_mode():
        assert torch.allclose(whole.model(tokens).logits, streamed.model(tokens).logits, atol=1e-5)
    assert len(live) == whole.spec.layers
    greedy = [FakeQuantized(source.model, source.spec, {}).greedy(tokens[0], 4) for source in (whole, streamed)]
    assert torch.equal(greedy[0], greedy[1])
    assert all(
        parameter.is_meta for block in streamed_blocks(streamed.model)._layers for parameter in block.parameters()
    )


def test_other_names_on_disk_mean_the_whole_model(
    model_factory: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = model_factory()
    expected = load_source(str(directory)).model.state_dict()
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    source = load_source(str(directory), stream=True)
    assert streamed_blocks(source.model) is None
    assert "named otherwise" in capsys.readouterr().err
    assert all(torch.equal(value, source.parameter(name)) for name, value in expected.items())


def test_finished_blocks_are_read_back_module_by_module_where_projections_share_one(
    text_file: Path, tmp_path: Path, live: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phi-3: one module for q, k and v, one for gate and up."""
    model, chosen = make(tmp_path / "model", "phi3"), recipe("gptq")
    save, calls = ResumeFile.save, []

    def stop_at_the_second(self: ResumeFile, index: int, *block: object) -> None:
        calls.append(index)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        save(self, index, *block)  # type: ignore[arg-type]

    quantize(str(model), tmp_path / "whole", recipe=chosen, calibration=str(text_file))
    monkeypatch.setattr(ResumeFile, "save", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), tmp_path / "streamed", recipe=chosen, calibration=str(text_file), stream=True)
    quantize(str(model), tmp_path / "streamed", recipe=chosen, calibration=str(text_file), stream=True)
    assert calls == [0, 1, 1]
    whole, streamed = stored(tmp_path / "whole"), stored(tmp_path / "streamed")
    assert whole.keys() == streamed.keys()
    assert [name for name in whole if not torch.equal(whole[name], streamed[name])] == []


def test_a_tiny_model_is_not_large(tiny_model: Path) -> None:
    assert not is_large(stored_tensors([tiny_model / "model.safetensors"]))
    assert streamed_blocks(load_source(str(tiny_model), stream=None).model) is None


def test_spilled_tensors_keep_their_values_and_leave_no_files(tmp_path: Path) -> None:
    x = torch.randn(3, 5, 7)[:, :, ::2]
    kept = Spill(tmp_path)(x)
    assert torch.equal(kept, x)
    assert list(tmp_path.iterdir()) == []
    assert Spill()(x) is x
