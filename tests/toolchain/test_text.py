"""Text becomes sequences as the model knows them: behind what its tokenizer puts before a text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from benchmarks.accuracy import calibration_rows
from boa_edge.errors import BoaEdgeError
from runtime_tests.evaluate import evaluate
from tests.conftest import byte_tokenizer
from toolchain.calibration import load_calibration
from toolchain.loading import load_source
from toolchain.recipe import CalibrationSize
from toolchain.text import opening, sequences, tokenize


@pytest.fixture
def beginning(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that begins every text with a token, as Gemma's and Llama 3's do."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "beginning"))
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(model)
    return model


def test_what_a_tokenizer_puts_before_a_text_is_found(beginning: Path) -> None:
    assert opening(byte_tokenizer()) == ()
    assert opening(load_source(str(beginning)).tokenizer) == (0,)


def test_every_sequence_begins_with_it_and_no_text_is_lost(beginning: Path, text_file: Path, tiny_model: Path) -> None:
    size = CalibrationSize(sequences=1000, sequence_length=32, held_out_sequences=10)
    plain, opened = (load_calibration(str(text_file), load_source(str(m)), size, 0) for m in (tiny_model, beginning))
    tokens = tokenize(text_file.read_text(), byte_tokenizer())
    for text, first, own in ((plain, (), 32), (opened, (0,), 31)):
        rows = torch.cat([text.sequences, text.held_out])
        assert rows.shape[1] == 32
        assert rows.shape[0] == tokens.numel() // own
        assert all(tuple(row[: len(first)].tolist()) == first for row in rows)
        assert bool((rows[:, len(first) :] > 0).all())
    assert torch.equal(sequences(tokens, 32, "text", (0,))[:, 1:].flatten(), tokens[: tokens.numel() // 31 * 31])
    assert torch.equal(calibration_rows(tokens, 3, 32, 0, (0,))[:, 0], torch.zeros(3, dtype=torch.int64))


def test_a_sequence_that_has_no_room_for_text_is_refused() -> None:
    with pytest.raises(BoaEdgeError, match="less than one sequence of 1"):
        sequences(torch.arange(9), 1, "text", (0,))


def test_evaluation_begins_its_sequences_alike(beginning: Path, tiny_model: Path, text_file: Path) -> None:
    own = evaluate(str(beginning), text_file, reference=str(beginning), tokens=256, sequence_length=32)
    assert own.kl == pytest.approx(0, abs=1e-9)
    assert own.perplexity != evaluate(str(tiny_model), text_file, tokens=256, sequence_length=32).perplexity
    with pytest.raises(BoaEdgeError, match="split the text into different tokens"):
        evaluate(str(beginning), text_file, reference=str(tiny_model), tokens=256, sequence_length=32)


def test_evaluation_does_not_go_beyond_what_the_model_reads(
    tiny_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(str(tiny_model), text_file, tokens=600)
    assert (found.sequence_length, found.tokens) == (128, 512)
    assert "sequences of 128 tokens in place of 512: the longest that is read" in capsys.readouterr().err
