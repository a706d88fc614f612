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


KERNELS = {
    "schema_version": 1,
    "kernels": {"MatMulNBits": 211, "MatMul": 2, HOSTILE: 1},
    "float_products": ["/model/embed_tokens/r1/MatMul", "/model/norm/r1_inverse/MatMul"],
}


def with_file(directory: Path, name: str, document: object) -> Path:
    path = make_bundle(directory / "bundle", origin=provenance())
    (path / name).write_text(json.dumps(document))
    write_manifest(path)
    return path


def test_shown(tmp_path: Path, emulated: Made) -> None:
    report = measure(with_file(tmp_path, "lowering.json", LOWERING), make_device(), tmp_path / "report")
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


@pytest.mark.parametrize("products", [KERNELS["float_products"], []])
def test_kernels_are_shown(products: list[str], tmp_path: Path, emulated: Made) -> None:
    document = {**KERNELS, "float_products": products}
    report = measure(with_file(tmp_path, "kernels.json", document), make_device(), tmp_path / "report")
    assert report.deployed.kernels is not None
    assert report.deployed.kernels.kernels == KERNELS["kernels"]
    page = (tmp_path / "report" / "report.html").read_text()
    words = Page(page).words
    assert "ONNX Runtime ran 214 nodes when the bundle was made" in words
    assert ("2 of them multiply float32 matrices" in words) == bool(products)
    assert ("None of them multiplies float32 matrices" in words) == (not products)
    assert all(name in words.replace(" ", "") for name in products)
    assert HOSTILE not in page
    assert emulated.report.deployed.kernels is None


def test_kernels_are_checked(tmp_path: Path) -> None:
    document = {**KERNELS, "float_products": "all"}
    with pytest.raises(BoaEdgeError, match=r"kernels.json: float_products: .*Export the checkpoint again"):
        measure(with_file(tmp_path, "kernels.json", document), make_device(), tmp_path / "report")


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
        measure(with_file(tmp_path, "lowering.json", document), make_device(), tmp_path / "report")
    assert "\n" not in str(caught.value)
