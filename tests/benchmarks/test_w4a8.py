"""The table of int8 activations, made on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import w4a8
from boa_edge.files import read_json


@pytest.fixture
def words(tiny_model: Path, text_file: Path, tmp_path: Path) -> list[str]:
    given = ["w4a8", "--model", str(tiny_model), "--method", "gptq", "--calibration", str(text_file)]
    given += ["--text", str(text_file), "--sequences", "4", "--length", "48", "--tokens", "96"]
    return [*given, "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out")]


def test_a_table_of_the_rows_asked_for(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted outliers cost what smoothing takes back; a finished row is not measured again."""
    monkeypatch.setattr(sys, "argv", [*words, "--variants", "plain,smooth,guarded"])
    monkeypatch.setattr(w4a8, "own_source", lambda: "as it is now")
    w4a8.main()
    rows = read_json(tmp_path / "out" / "w4a8.json", "the rows")
    kl = {(row["model"], row["scheme"], row["variant"]): row["kl"] for row in rows}
    assert list(kl)[:4] == [("as it is", None, "weights alone")] + [
        ("as it is", "per_block", variant) for variant in ("plain", "smooth", "guarded")
    ]
    assert len(rows) == 2 * (1 + 2 * 3)
    for scheme in w4a8.SCHEMES:
        assert kl["planted", scheme, "plain"] > 2 * kl["planted", scheme, "smooth"]
    table = (tmp_path / "out" / "w4a8.md").read_text()
    assert f"| {kl['planted', 'per_token', 'plain']:.4f} |" in table
    assert (tmp_path / "out" / "w4a8.svg").stat().st_size > 1000
    monkeypatch.setattr(w4a8, "measure", None)
    w4a8.main()


def test_rows_that_there_are_not(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [*words, "--variants", "plain,rough"])
    with pytest.raises(SystemExit, match=r"unknown variants rough.*Accepted: plain, smooth"):
        w4a8.main()
