"""Zero-shot calibration beside real text: what is finished is kept by what decides it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import zero_shot
from boa_edge.files import read_json


@pytest.fixture
def words(tiny_model: Path, text_file: Path, tmp_path: Path) -> list[str]:
    given = ["zero_shot", "--model", str(tiny_model), "--recipe", "w4g32-rtn", "--calibration", str(text_file)]
    given += ["--text", str(text_file), "--sequences", "4", "--length", "16", "--pool", "1", "--tokens", "1024"]
    return [*given, "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out")]


def test_finished_pieces_are_not_taken_for_those_of_another_request(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized: list[str] = []
    run = zero_shot.quantize_model

    def note(source: Any, recipe: Any, tokens: Any, **others: Any) -> Any:
        quantized.append(f"{recipe.name} on {tokens.shape[0]}")
        return run(source, recipe, tokens, **others)

    monkeypatch.setattr(zero_shot, "quantize_model", note)
    monkeypatch.setattr(zero_shot, "own_source", lambda: "as it is now")
    monkeypatch.setattr(sys, "argv", words)
    zero_shot.main()
    assert quantized == ["w4g32-rtn on 4"] * 4
    first = read_json(tmp_path / "out" / "zero_shot.json", "the figures")
    zero_shot.main()
    assert len(quantized) == 4
    assert read_json(tmp_path / "out" / "zero_shot.json", "the figures") == first
    monkeypatch.setattr(sys, "argv", [*words, "--tokens", "512"])
    zero_shot.main()
    assert len(quantized) == 8
    fewer = read_json(tmp_path / "out" / "zero_shot.json", "the figures")
    assert fewer["settings"]["evaluated_tokens"] == 512
    assert fewer["results"]["w4g32-rtn"]["real"]["kl"] != first["results"]["w4g32-rtn"]["real"]["kl"]
    monkeypatch.setattr(sys, "argv", [*words, "--sequences", "3"])
    zero_shot.main()
    assert quantized[8:] == ["w4g32-rtn on 3"] * 4
    other = tmp_path / "other.txt"
    other.write_text("another text altogether, with words of its own " * 50)
    monkeypatch.setattr(sys, "argv", [*words, "--calibration", str(other)])
    zero_shot.main()
    assert len(quantized) == 13  # the texts that the model writes are the same


@pytest.mark.parametrize("recipe", ["w4g32-rtn-smooth", "w4g32a8-rtn", "w4g32kv8-rtn"])
def test_recipes_that_would_be_ignored_in_part_are_refused(
    words: list[str], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*words, "--recipe", recipe])
    with pytest.raises(SystemExit, match=f"error: --recipe: recipe '{recipe}' has transforms"):
        zero_shot.main()


def test_a_text_that_is_not_there_is_one_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [*words, "--calibration", "no/such.txt"])
    with pytest.raises(SystemExit, match=r"error: no/such\.txt: no such text file"):
        zero_shot.main()
