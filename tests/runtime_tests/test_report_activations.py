"""Activations, transforms and outliers: from `provenance.json` through the report document onto the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from report_fakes import BLOCKS, RECIPE, RECIPE_A8, Made, activations, make, provenance

from boa_edge.errors import BoaEdgeError
from runtime_tests.facts import _spelled
from runtime_tests.labels import SCHEMES
from runtime_tests.model import Outlier, OutlierFacts
from runtime_tests.report.outliers import changed, outlier_chart, worst
from runtime_tests.schema import published_schema
from toolchain import activations as schemes
from toolchain.recipe import load_recipe


def words(made: Made) -> str:
    """The page's section on activations as running text; empty where it has none."""
    section = re.search(r"<h2>Activations</h2>.*?</section>", made.html, flags=re.DOTALL)
    return "" if section is None else re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", section[0]))


def made(path: Path, change: dict[str, Any], recipe: dict[str, Any] = RECIPE_A8, runtime: str = "int8") -> Made:
    bundle = {"origin": provenance() | activations() | change, "recipe": recipe, "activations": runtime}
    return make(path, bundle=bundle)


def test_the_report_holds_what_the_quantizer_recorded(measured: Made) -> None:
    found, recorded = measured.report.quantization, activations()
    assert found.transforms is not None
    assert found.transforms.names == ("smooth",)
    assert found.activations is not None
    assert found.activations.scheme == "per_block"
    assert found.activations.kl is not None
    assert (found.activations.kl.value, found.activations.kl.unit) == (0.0537, "nats/token")
    assert found.activations.kept == ("model.layers.1.mlp.down_proj", "model.layers.29.mlp.down_proj")
    assert {cost.name: cost.kl and cost.kl.value for cost in found.activations.costs} == recorded["activations"][
        "costs"
    ]
    assert found.outliers is not None
    assert [row.model_dump() for row in found.outliers.after] == recorded["outliers"]["after"]
    assert len(found.outliers.before) == 4 * BLOCKS + 1


@pytest.mark.parametrize(
    "change",
    [
        {"transforms": None, "activations": None, "outliers": None},
        {"transforms": {"names": [], "notes": []}, "activations": None, "outliers": {"before": [], "after": []}},
    ],
)
def test_where_nothing_was_recorded_nothing_is_shown(tmp_path: Path, change: dict[str, Any]) -> None:
    bare = made(tmp_path, change, RECIPE)
    assert words(bare) == ""
    assert bare.html.count("<svg") == 3
    found = bare.report.quantization
    assert (found.activations, found.outliers) == (None, None)
    jsonschema.validate(bare.report.as_dict(), published_schema())


def test_the_page_says_how_what_it_costs_and_who_is_spared(measured: Made) -> None:
    text = words(measured)
    assert SCHEMES["per_block"] in text
    assert "2 of 211 linears keep floating-point activations" in text
    assert "0.0492 – int8 everywhere 0.0911 +85 % As planned: int8 but for 2 0.0537 +9 %" in text
    assert "smooth q_k: left out, heads are normed" in text
    assert "model.layers.29.mlp.down_proj" in text.replace(" ", "")
    assert "before and after" in text
    assert "exported with" not in text
    assert measured.html.count("<svg") == 5


def test_the_page_without_exceptions_or_transforms(tmp_path: Path) -> None:
    rows = activations()["outliers"]["before"]
    change = {
        "transforms": {"names": [], "notes": []},
        "activations": {"weights_kl": 0.0, "all_int8_kl": float("nan"), "kl": 0.02, "kept": [], "costs": {}},
        "outliers": {"before": rows, "after": rows},
    }
    plain = made(tmp_path, change, runtime="float32")
    text = words(plain)
    assert "No linear keeps floating-point activations" in text
    assert "exported with float32 activations, so on the device none of them is rounded" in text
    assert "not recorded" in text
    assert "before" not in text.lower()
    assert "went through" not in text


def test_transforms_alone_are_shown(tmp_path: Path) -> None:
    change = {"transforms": {"names": ["rotate"], "notes": []}, "activations": None, "outliers": None}
    text = words(made(tmp_path, change, RECIPE))
    assert "the model went through rotate , which leaves" in text
    assert "8 bits" not in text


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"transforms": {"names": "smooth"}}, "transforms.names"),
        ({"transforms": {"notes": [3]}}, r"transforms.notes.0"),
        ({"activations": {"kl": "much"}}, "activations.kl"),
        ({"activations": {"costs": {"a": []}}}, "activations.costs.a"),
        ({"activations": {"kept": ["b"], "costs": {"a": 0.1}}}, "activations: .*kept: 'b' is not among the costs"),
        ({"outliers": {"before": [{"layer": 0}]}}, "outliers.before.0.place"),
        ({"outliers": {"after": [{"layer": -2, "place": "o"}]}}, "outliers.after.0.layer"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, change: dict[str, Any], where: str) -> None:
    with pytest.raises(BoaEdgeError, match=where):
        made(tmp_path, change)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("place", "nowhere", "outliers.after.3.place"),
        ("place", "head", "outliers.after.3: .*layer: 0 has no place 'head'"),
        ("maximum", -1.0, "outliers.after.3.maximum"),
        ("kurtosis", "high", "outliers.after.3.kurtosis"),
        ("layer", 0.5, "outliers.after.3.layer"),
    ],
)
def test_a_bad_outlier_is_named(tmp_path: Path, field: str, value: object, where: str) -> None:
    change = activations()
    change["outliers"]["after"][3][field] = value
    with pytest.raises(BoaEdgeError, match=where):
        made(tmp_path, change)


def test_kurtosis_of_a_constant_is_no_number(tmp_path: Path) -> None:
    change = activations()
    change["outliers"]["after"][0]["kurtosis"] = float("nan")
    found = made(tmp_path, change).report.quantization.outliers
    assert found is not None
    assert found.after[0].kurtosis is None
    assert found.after[0].maximum is not None


@pytest.mark.parametrize(
    ("recipe", "runtime", "text"),
    [
        (RECIPE, "int8", "the runtime compute with int8 activations, the PyTorch model computes with float32:"),
        (RECIPE, "float32", "Both compute with float32 activations:"),
        (
            RECIPE_A8,
            "int8",
            "Both compute with int8 activations, the PyTorch model rounding them as the runtime does on",
        ),
        (RECIPE_A8, "float32", "the bundle was exported with float32 activations:"),
        (
            RECIPE_A8 | {"activations": {"scheme": "per_token"}},
            "int8",
            f"quantizes them otherwise than ONNX Runtime does: {SCHEMES['per_token']}:",
        ),
    ],
)
def test_the_notes_say_what_each_model_computes_with(
    tmp_path: Path, recipe: dict[str, Any], runtime: str, text: str
) -> None:
    notes = made(tmp_path, {}, recipe, runtime).report.notes
    assert sum(text in note for note in notes) == 1
    assert sum("activations" in note for note in notes) == 1


def test_every_scheme_has_words() -> None:
    assert set(SCHEMES) == set(schemes.SCHEMES) - {"float"}


@pytest.mark.parametrize(
    "name",
    [
        "w4g32-edge",
        "w3asym-gptq",
        "w2asym-rtn",
        "wmix83mbg32-edge",
        "w4g32a8-edge-smooth",
        "w4g32a8tkv8-edge-smooth",
        "w4g32asyma8-boa-rotate-smooth",
        "w8a8-rtn",
    ],
)
def test_a_recipe_without_a_name_is_spelled_as_the_quantizer_does(name: str) -> None:
    recipe = load_recipe(name)
    assert _spelled(recipe.model_dump()) == recipe.name == name


def facts(before: list[Outlier], after: list[Outlier]) -> OutlierFacts:
    return OutlierFacts(execution="measured", before=tuple(before), after=tuple(after))


def test_the_chart_describes_itself_in_words() -> None:
    low = [Outlier(layer=0, place="down", maximum=2.0, kurtosis=3.0), Outlier(layer=-1, place="head", maximum=4.0)]
    high = [Outlier(layer=0, place="down", maximum=512.25, kurtosis=900.0), Outlier(layer=1, place="down", maximum=7.0)]
    chart = outlier_chart(facts(high, low), "maximum")
    assert chart is not None
    assert "down 512.2 before, 2 after; head none before, 4 after." in chart
    assert {">before<", ">after<", ">down<", ">head<"} <= set(re.findall(r">[a-z, ]+<", chart))
    assert ">o<" not in chart, "a panel without a mark"
    kurtosis = outlier_chart(facts(high, low), "kurtosis")
    assert kurtosis is not None
    assert "down 900 before, 3 after." in kurtosis
    assert ">head<" not in kurtosis
    rows = worst(facts(high, low))
    assert [(row.place, row.maximum_before, row.maximum_after) for row in rows] == [
        ("down", 512.25, 2.0),
        ("head", None, 4.0),
    ]


def test_the_same_before_and_after_is_drawn_once() -> None:
    rows = [Outlier(layer=layer, place="o", maximum=2.0 + layer) for layer in range(3)]
    same = facts(rows, rows)
    assert not changed(same)
    chart = outlier_chart(same, "maximum")
    assert chart is not None
    assert ">before<" not in chart
    assert "o 4." in chart
    assert chart == outlier_chart(facts(rows, []), "maximum") == outlier_chart(facts([], rows), "maximum")


def test_nothing_is_drawn_where_there_is_nothing() -> None:
    assert outlier_chart(None, "maximum") is None
    flat = [Outlier(layer=0, place="o", maximum=0.0)]
    assert outlier_chart(facts(flat, flat), "maximum") is None
    assert outlier_chart(facts(flat, flat), "kurtosis") is None
