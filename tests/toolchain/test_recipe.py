"""Recipes by name and by file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from boa_edge.errors import UsageError
from toolchain.methods import METHODS
from toolchain.recipe import load_recipe, parse_recipe


@pytest.mark.parametrize(
    ("name", "bits", "group", "symmetric", "method"),
    [
        ("w4g32-boa", 4, 32, True, "boa"),
        ("w3asym-gptq", 3, None, False, "gptq"),
        ("w2asym-rtn", 2, None, False, "rtn"),
        ("w8-rtn", 8, None, True, "rtn"),
        ("w2g64asym-boa", 2, 64, False, "boa"),
    ],
)
def test_a_name_reads_as_what_it_does(name: str, bits: int, group: int | None, symmetric: bool, method: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.weights.bits, recipe.weights.group_size) == (bits, group)
    assert (recipe.weights.symmetric, recipe.method, recipe.name) == (symmetric, method, name)


def test_the_effective_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(load_recipe("w3asym-gptq").to_yaml())
    assert load_recipe(str(path)) == load_recipe("w3asym-gptq")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", [None, {"sweeps": 3}])
def test_the_effective_recipe_leaves_nothing_to_the_method(method: str, solver: dict[str, int] | None) -> None:
    """It says what the method's own options are, and still another method would have its own."""
    options = METHODS[method].options
    if options is None:
        solver = None
    elif solver is not None:
        options = options.model_copy(update=solver)
    recipe = parse_recipe({"method": method, "weights": {"bits": 4}, "solver": solver}, "test")
    document = yaml.safe_load(recipe.to_yaml())
    assert document["solver"] == (None if options is None else options.model_dump())
    assert document["scale_search"] == METHODS[method].default_search
    again = parse_recipe(document, "test")
    assert (again, again.effective()) == (recipe, recipe.effective())
    for other in METHODS:
        assert again.with_method(other) == recipe.with_method(other)
        assert (again.with_method(other).options, again.with_method(other).search) == (
            METHODS[other].options,
            METHODS[other].default_search,
        )


def test_the_name_says_that_the_solver_is_not_the_methods_own() -> None:
    def named(solver: dict[str, object] | None) -> str:
        return parse_recipe({"method": "edge", "weights": {"bits": 4}, "solver": solver}, "test").name

    assert named(None) == named(METHODS["edge"].options.model_dump()) == "w4-edge"
    assert named({"sweeps": 0}) == "w4-edge+solver"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w5-boa", "weights.bits: Input should be 2, 3, 4, 8 or 'auto'"),
        ("w4g8-boa", "weights.group_size: Input should be greater than or equal to 16"),
        ("w4g32-boo", "method 'boo' is unknown; accepted: rtn, gptq, boa"),
        ("w4g32-boa-smoth", "transform 'smoth' is unknown; accepted: smooth, rotate"),
        ("q4_k_m", "unknown recipe 'q4_k_m'. A recipe is a YAML file or a name: w<bits>"),
        ("missing.yaml", "no such recipe file"),
    ],
)
def test_a_bad_name_says_what_is_accepted(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: boa\nweights: {bits: 4, group: 32}", "unknown key 'weights.group', did you mean 'group_size'?"),
        ("method: boa\nwieghts: {bits: 4}", "unknown key 'wieghts', did you mean 'weights'?"),
        ("method: boa\nweights: {bits: 4}\ncalibration: {seqs: 3}", "unknown key 'calibration.seqs'"),
        ("method: boa", "weights is missing"),
        ("method: boa\nweights: {bits: '4'}", "weights.bits"),
        ("method: boa\nweights: {bits: 4}\ndamping: -1", "damping: Input should be greater than 0, found -1"),
        ("method: rtn\nweights: {bits: 4}\nscale_search: hessian", "needs statistics"),
        ("method: rtn\nweights: {bits: 4}\nscale_search: compensated", "'compensated' needs statistics"),
        ("- boa", "a mapping of fields is expected"),
        ("weights: {bits: 4}", "method is missing, accepted: rtn, gptq, boa"),
        ("method: boa\nweights: 4", "weights: Input should be a mapping of bits, budget_mb, group_size, symmetric"),
        ("method: boa\nweights: {bits: 4}\nactivations: true", "activations: Input should be a mapping of scheme"),
        ("method: boa\nweights: {bits: 4}\ntransforms: smooth", "transforms: Input should be a list, found 'smooth'"),
        ("method: boa\nweights: {bits: auto, budget_mb: .inf}", "weights.budget_mb: Input should be a finite number"),
        ("method: boa\nweights: {bits: 4}\nseed: 9223372036854775808", "seed: Input should be less than or equal to"),
        ("method: boa\nweights: {bits: 4}\nmethod: rtn", "key 'method' comes twice, the second time on line 3"),
        ("method: boa\nweights: {bits: 4, bits: 8}", "key 'bits' comes twice, the second time on line 2"),
        (
            "method: boa\nweights: {bits: 4}\ncalibration: {sequence_length: 1048577}",
            "calibration.sequence_length: Input should be less than or equal to 1048576",
        ),
        (
            "method: boa\nweights: {bits: 4}\ncalibration: {sequences: 100000000000}",
            "calibration.sequences: Input should be less than or equal to 1048576",
        ),
        ("method: [boa", "is not valid YAML"),
    ],
)
def test_a_bad_file_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"residual": 0.5, "recollect": False}, "set recollect to true"),
        ({"deviation": 0.0}, "set that above 0, or residual to 0"),
        ({"adaptive_rows": 16}, "set activation_order to false"),
        ({"adaptive_rows": 16, "activation_order": False, "attention_rows": "aespa"}, "set it to null"),
        ({"attention_rows": "none"}, "safety_net is for attention_rows 'boa' and 'gauss_newton', not 'none'"),
        ({"deviation": 2.0}, "less than or equal to 1"),
        ({"devation": 0.5}, "devation"),
    ],
)
def test_solver_options_that_do_not_go_together_are_refused(solver: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe({"method": "edge", "weights": {"bits": 4}, "solver": solver}, "recipe.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("solver", [{}, {"refits": 1}])
def test_a_method_that_solves_nothing_has_no_solver(solver: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"recipe\.yaml: solver: method 'rtn' solves nothing"):
        parse_recipe({"method": "rtn", "weights": {"bits": 4}, "solver": solver}, "recipe.yaml")
