"""What runs where, from the bundle into the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_fakes import HOSTILE, Made, make_bundle, make_device, provenance, write_manifest
from test_report_page import Page

from boa_edge.errors import BoaEdgeError
from runtime_tests import measure

LOWERING = {
    "schema_version": 1,
    "backend": "XnnpackBackend",
    "delegates": 31,
    "delegated": {"FullyConnected": 332, HOSTILE: 1},
    "outside": {"llama::custom_sdpa.out": 30},
    "quantized_linears": 211,
    "float_linears": ["lm_head"],
}


def with_lowering(directory: Path, document: object) -> Path:
    path = make_bundle(directory / "bundle", origin=provenance())
    (path / "lowering.json").write_text(json.dumps(document))
    write_manifest(path)
    return path


def test_shown(tmp_path: Path, emulated: Made) -> None:
    report = measure(with_lowering(tmp_path, LOWERING), make_device(), tmp_path / "report")
    assert report.deployed.placement is not None
    assert report.deployed.placement.outside == LOWERING["outside"]
    document = (tmp_path / "report" / "report.html").read_text()
    words = Page(document).words
    assert "333 operators stand in 31 delegates of XnnpackBackend, 30 outside of them." in words
    assert "Dequantized, since their inputs stay float32: lm_head" in words
    assert "llama::custom_sdpa.out" in words.replace(" ", "")
    assert HOSTILE not in document
    assert emulated.report.deployed.placement is None
    assert "What runs where" not in emulated.html


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ({**LOWERING, "schema_version": 2}, "schema_version"),
        ({**LOWERING, "delegates": -1}, "delegates"),
        ({**LOWERING, "more": 1}, "more"),
        ({**LOWERING, "outside": {"a": "b"}}, r"outside\.a"),
        ([], "the document"),
    ],
)
def test_checked(document: object, match: str, tmp_path: Path) -> None:
    with pytest.raises(BoaEdgeError, match=rf"lowering.json: {match}: .*Export the checkpoint again") as caught:
        measure(with_lowering(tmp_path, document), make_device(), tmp_path / "report")
    assert "\n" not in str(caught.value)
