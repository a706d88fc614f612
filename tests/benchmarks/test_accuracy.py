"""The accuracy benchmark on a tiny random model, without the peers' environments."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablation, accuracy, contenders, report, results
from benchmarks.contenders import own_contenders
from benchmarks.kept import beside
from benchmarks.ours import SCHEMES, STEPS, VARIANTS, make, product_recipe, recipe_for, split
from benchmarks.peers import table
from benchmarks.peers.harness import (
    GridError,
    Job,
    Made,
    check_error,
    check_grid,
    check_made,
    load_parameters,
    main,
    peak_bytes,
)
from benchmarks.peers.table import EnvironmentMissingError, Format, Peer
from benchmarks.results import FAILED, FIGURES, Outcome, in_order
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.pipeline import default_recipe
from toolchain.grids import GridFormat, find_grid
from toolchain.solvers import rtn


@pytest.fixture
def request_words(model_factory: Callable[..., Path], text_file: Path, tmp_path: Path) -> list[str]:
    """A request that takes seconds: two settings, one seed, a model whose inputs 128 does not divide."""
    model = model_factory(hidden_size=64, intermediate_size=96)
    words = ["--model", str(model), "--calibration", str(text_file), "--text", str(text_file)]
    words += ["--sequences", "4", "--length", "32", "--tokens", "128", "--seeds", "0"]
    words += ["--work", str(tmp_path / "work"), "--environments", str(tmp_path / "peers"), "-o", str(tmp_path / "out")]
    return words


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that were really run, in order; ours in this process, which saves seconds of imports."""
    seen: list[str] = []
    run = accuracy.run_quantizer

    def note(command: list[str], place: Path, log: Path, limit: float) -> None:
        seen.append(command[command.index("--variant") + 1])
        if "benchmarks.ours" in command:
            main("boa-edge", make, VARIANTS, command[command.index("benchmarks.ours") + 1 :])
        else:
            run(command, place, log, limit)

    monkeypatch.setattr(accuracy, "run_quantizer", note)
    monkeypatch.setattr(accuracy, "own_source", lambda: "as it is now")
    return seen


def run(words: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Rows and text of what a request writes."""
    arguments = accuracy.parse(words)
    accuracy.compare(arguments)
    rows = json.loads((arguments.output / "accuracy.json").read_text())
    return rows, (arguments.output / "accuracy.md").read_text()


def test_own_methods_are_compared_and_a_second_run_does_nothing(request_words: list[str], counted: list[str]) -> None:
    words = [*request_words, "--methods", "edge rtn,edge gptq", "--settings", "w4g128,w2asym"]
    rows, text = run(words)
    assert counted == ["gptq", "rtn"] * 2
    assert [(row["method"], row["bits"], row["group_size"], row["symmetric"], row["seed"]) for row in rows] == [
        ("boa-edge gptq", 4, 32, True, 0),
        ("boa-edge rtn", 4, 32, True, 0),
        ("boa-edge gptq", 2, None, False, 0),
        ("boa-edge rtn", 2, None, False, 0),
    ]
    assert [row["recipe"] for row in rows] == ["w4g32-gptq", "w4g32-rtn", "w2asym-gptq", "w2asym-rtn"]
    assert "- **boa-edge gptq**: `w4g32-gptq`, `w2asym-gptq`, with" in text
    assert all(row["ours"] and row["kl"] > 0 and row["perplexity"] > 1 and row["peak_mb"] > 0 for row in rows)
    assert rows[0]["kl"] < rows[2]["kl"]
    assert rows[1]["kl"] < rows[3]["kl"]
    assert "w4g128 became w4g32" in text
    output = Path(words[words.index("-o") + 1])
    assert (output / "accuracy.png").stat().st_size > 1000
    assert (output / "accuracy.svg").exists()
    assert run(words)[0] == rows
    assert len(counted) == 4
    work = Path(words[words.index("--work") + 1])
    assert not list(work.glob("runs/*/weights.safetensors"))


def test_rows_of_an_earlier_run_can_stay(request_words: list[str], counted: list[str], tmp_path: Path) -> None:
    settings = ["--settings", "w4g32,w2asym"]
    first, _ = run([*request_words, *settings, "--methods", "edge rtn"])
    rows, text = run([*request_words, "--settings", "w2asym", "--methods", "edge gptq", "--seeds", "1", "--keep"])
    made = [(row["setting"], row["method"], row["seed"]) for row in rows]
    assert made == [("w4g32", "boa-edge rtn", 0), ("w2asym", "boa-edge rtn", 0), ("w2asym", "boa-edge gptq", 1)]
    assert rows[:2] == first
    assert "seed 1 chooses the windows.\n" in text
    assert "**torchao RTN at w4g32, w2asym**: no run of it there yet" in text
    assert "| on |" not in text
    for row in first:
        row |= {"machine": "another processor", "date": "2020-02-02", "version": "boa-edge 1"}
    path = tmp_path / "out" / "accuracy.json"
    path.write_text(json.dumps(first))
    _, text = run([*request_words, "--settings", "w2asym", "--methods", "edge gptq", "--keep"])
    assert "Between 2020-02-02 and" in text
    assert "- A: another processor" in text
    lines = {line.split("|")[1].strip(" *"): line for line in text.splitlines() if line.startswith("| **")}
    assert lines["boa-edge rtn"].endswith("| A |")
    assert lines["boa-edge gptq"].endswith("| B |")
    again, _ = run([*request_words, "--settings", "w2asym", "--methods", "edge rtn"])
    assert len(again) == 1
    other = tmp_path / "other.txt"
    other.write_text("another text altogether, with words of its own " * 50)
    before = len(counted)
    keep = [*request_words, "--settings", "w3asym", "--methods", "edge gptq", "--keep"]
    with pytest.raises(BoaEdgeError, match=r"whose text is 4 x 32 tokens of text\.txt; here it is .*other\.txt"):
        run([*keep, "--text", str(other)])
    with pytest.raises(BoaEdgeError, match="whose calibration is 4 x 32 tokens"):
        run([*keep, "--sequences", "5"])
    del again[0]["date"], again[0]["machine"]
    path.write_text(json.dumps(again))
    with pytest.raises(BoaEdgeError, match=r"lacks `date`, `machine` in the row w2asym boa-edge rtn 0\. Leave --keep"):
        run(keep)
    path.write_text("{}")
    with pytest.raises(BoaEdgeError, match=r"accuracy\.json: is no list.*--keep"):
        run(keep)
    assert len(counted) == before
    again[0] |= {"date": "2020-02-02", "machine": "a processor", "reference_perplexity": 1.0}
    path.write_text(json.dumps(again))
    with pytest.raises(BoaEdgeError, match="another model or text"):
        run(keep)


@pytest.mark.usefixtures("counted")
def test_what_was_asked_for_and_what_failed_stays_too(
    request_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "PEERS", {"breaker": Peer("no_such_script", "rtn", None, (), lambda _: None)})
    monkeypatch.setattr(accuracy, "identity", lambda peer: peer.script)
    run([*request_words, "--settings", "w4g128asym", "--methods", "edge rtn,breaker"])
    failed = json.loads((tmp_path / "out" / FAILED).read_text())
    assert [(one["method"], one["asked"], one["setting"], one["group_size"], one["seed"]) for one in failed] == [
        ("breaker", "w4g128asym", "w4g32asym", 32, 0)
    ]
    keep = [*request_words, "--settings", "w2asym", "--methods", "edge rtn", "--keep"]
    rows, text = run(keep)
    assert [row["asked"] for row in rows] == ["w4g128asym", "w2asym"]
    assert "**w4g128asym became w4g32asym**: 128 does not divide" in text
    assert "| breaker | failed: " in text
    assert "**breaker at w2asym**: no run of it there yet" in text
    # Rows as they were kept before, and no other word of what the text needs.
    path = tmp_path / "out" / FIGURES
    old = [{key: row[key] for key in row if key not in ("asked", "model", "text", "recipe")} for row in rows]
    path.write_text(json.dumps(old))
    (tmp_path / "out" / "accuracy.md").unlink()
    redraw = ["--redraw", "-o", str(tmp_path / "out")]
    with pytest.raises(BoaEdgeError, match="lacks `model`, `text` in the row"):
        run(redraw)
    filled, _ = run([*redraw, "--model", "a name", "--text", "some/a.txt"])
    assert filled[0]["text"] == "48 x 512 tokens of a.txt"
    path.write_text(json.dumps(rows))
    assert run(redraw) == (rows, text)
    assert json.loads((tmp_path / "out" / FAILED).read_text()) == failed
    with pytest.raises(SystemExit):
        accuracy.parse(["-o", "out"])


def outcome(method: str, kl: float | None, seed: int = 0, **changes: Any) -> Outcome:
    """One of an imagined run."""
    facts: dict[str, Any] = {"method": method, "ours": method.startswith("boa"), "setting": "w2asym", "seed": seed}
    facts |= {"asked": "w2asym", "bits": 2, "group_size": None, "symmetric": False, "activations": None}
    facts |= {"model": "m", "text": "t", "calibration": "c", "calibrated": True}
    if kl is None:
        return Outcome(facts | {"reason": "no"} | changes)
    facts |= {"kl": kl, "perplexity": 9.0, "reference_perplexity": 8.0, "top1": 0.5, "seconds": 1.0, "cpu_seconds": 1.0}
    return Outcome(facts | {"peak_mb": 1, "version": "v", "date": "d", "machine": "a processor"} | changes)


def test_methods_are_compared_over_the_seeds_that_both_have() -> None:
    found = [outcome("boa-edge default", kl, seed) for seed, kl in ((0, 2.0), (1, 10.0))]
    found += [outcome("boa-edge gptq", 3.0, 2), outcome("boa-edge gptq", None, 3)]
    found += [outcome("AutoRound", 4.0, 0), outcome("HQQ", 40.0, 0, calibrated=False)]
    text = report.markdown(in_order(found))
    cells = {
        line.split("|")[1].strip(" *"): [cell.strip() for cell in line.split("|")]
        for line in text.splitlines()[1:]
        if "|" in line
    }
    assert cells["boa-edge default"][2:5] == ["6.0000", "0: 2.0000 / 1: 10.0000", "0.50"]
    assert cells["AutoRound"][2:5] == ["4.0000", "0: 4.0000", "1.00"]
    assert cells["HQQ"][2:5] == ["40.0000", "no calibration", "10.00"]
    assert "| **boa-edge gptq** | 3.0000 | 2: 3.0000 | 0.07 |" in text  # HQQ's are the same for every seed
    assert "| boa-edge gptq | seed 3: no |" in text
    assert "seeds 0, 1, 2 choose the windows. Not every method has them all" in text
    without = [one for one in found if one.method != "HQQ"]
    assert "| **boa-edge gptq** | 3.0000 | 2: 3.0000 |  |" in report.markdown(without)
    whole = report.markdown([outcome("AutoRound", 4.0), outcome("boa-edge default", 2.0)])
    assert "seed 0 chooses the windows.\n" in whole
    assert "| **boa-edge default** | 2.0000 | 2.0000 | 0.50 |" in whole


def test_what_is_kept_yields_to_what_is_new_but_figures_to_no_failure(tmp_path: Path) -> None:
    protocol = {"model": "m", "text": "t", "calibration": "c"}
    results.write_results(tmp_path, [outcome("a", 1.0), outcome("b", None), outcome("c", None), outcome("d", 1.0)])
    written: list[Outcome] = []
    beside(tmp_path, protocol, lambda _, outcomes: written.extend(outcomes))(
        tmp_path, [outcome("a", None), outcome("b", None, reason="another"), outcome("c", 2.0), outcome("d", 3.0)]
    )
    found = {one.method: one.facts.get("kl", one.facts.get("reason")) for one in written}
    assert found == {"a": 1.0, "b": "another", "c": 2.0, "d": 3.0}
    assert len(written) == 4


def test_only_what_is_missing_is_run(request_words: list[str], counted: list[str]) -> None:
    words = [*request_words, "--methods", "edge rtn", "--settings", "w4g32"]
    run(words)
    run([*words, "--seeds", "0,1"])  # round to nearest reads no calibration text
    assert counted == ["rtn"]
    rows, _ = run([*words, "--settings", "w4g32,w3asym", "--seeds", "0,1"])
    assert counted == ["rtn", "rtn"]
    assert [(row["setting"], row["seed"]) for row in rows] == [("w4g32", 0), ("w4g32", 1), ("w3asym", 0), ("w3asym", 1)]


def test_peers_that_fail_are_listed_and_stop_nobody(
    request_words: list[str], counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(wanted: Format) -> str | None:
        return "no such grid" if wanted.bits == 2 else None

    requirements = ("nothing==1",)
    peers = {
        "refuser": Peer("torch_ao", "rtn", None, (), refuses, calibrated=False),
        "breaker": Peer("no_such_script", "rtn", None, (), lambda _: None),
        "absent": Peer("torch_ao", "rtn", "absent", requirements, lambda _: None),
    }
    monkeypatch.setattr(contenders, "PEERS", peers)
    monkeypatch.setattr(accuracy, "identity", lambda peer: peer.script)

    def python_of(peer: Peer, place: Path) -> Path:
        if peer.environment:
            raise EnvironmentMissingError("ERROR: No matching distribution found for nothing==1")
        return Path(sys.executable)

    monkeypatch.setattr(accuracy, "python_of", python_of)
    words = [*request_words, "--methods", "edge rtn,refuser,breaker,absent", "--settings", "w2asym"]
    rows, text = run(words)
    assert [row["method"] for row in rows] == ["boa-edge rtn"]
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "not supported: no such grid" in lines["refuser"]
    assert "No module named" in lines["breaker"]
    assert "not installable here: ERROR: No matching distribution" in lines["absent"]
    assert "torchao GPTQ" in text


def test_each_quantizer_is_a_process_of_its_own(request_words: list[str]) -> None:
    rows, text = run([*request_words, "--methods", "edge rtn,torchao rtn", "--settings", "w4asym"])
    assert [row["ours"] for row in rows] == [True, False]
    assert rows[0]["kl"] == pytest.approx(rows[1]["kl"], rel=0.3)
    assert "torchao 0.18.0" in text


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_the_grid_check_knows_a_grid(symmetric: bool, group: int | None) -> None:
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)) + (0 if symmetric else 1)
    grid = find_grid(weight, GridFormat(3, group, symmetric), "minmax")
    value = grid.quantized(rtn.solve(weight, grid)).dequantize()
    check_grid("w", value, 3, group, symmetric)
    check_error({"w": weight[0]}, {"w": value}, 3, group, symmetric)
    with pytest.raises(GridError, match="values in one group"):
        check_grid("w", value, 2, group, symmetric=False)
    if not symmetric:
        with pytest.raises(GridError, match="it is asymmetric"):
            check_grid("w", value, 3, group, symmetric=True)
    astray = value.clone()
    astray[5, int(astray[5].abs().argmax())] *= 1.01
    with pytest.raises(GridError, match=r"no even grid|values in one group"):
        check_grid("w", astray, 3, group, symmetric)
    if group is None:  # a zero point that is off by one moves all weights by a step
        step = grid.quantized(rtn.solve(weight, grid)).scales
        with pytest.raises(GridError, match="misread"):
            check_error({"w": weight[0]}, {"w": value + step}, 3, group, symmetric)


def test_what_was_made_is_checked_as_a_whole(tiny_model: Path, tmp_path: Path) -> None:
    job = Job(tiny_model, torch.zeros(1, 8, dtype=torch.int64), 4, None, False, 0, "default", tmp_path)
    original = load_parameters(tiny_model)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(GridError, match="block linears were not quantized"):
        check_made(job, Made(weights={name: original[name]}))
    with pytest.raises(GridError, match="outside the blocks"):
        check_made(job, Made(weights=dict(original)))
    inside = {key: value for key, value in original.items() if key.startswith("model.layers.") and value.ndim == 2}
    with pytest.raises(GridError, match="values in one group"):
        check_made(job, Made(weights=inside))


def test_calibration_windows_are_chosen_by_the_seed_and_do_not_overlap() -> None:
    tokens = torch.arange(1000)
    rows = accuracy.calibration_rows(tokens, 6, 100, seed=1)
    assert torch.equal(rows, accuracy.calibration_rows(tokens, 6, 100, seed=1))
    assert not torch.equal(rows, accuracy.calibration_rows(tokens, 6, 100, seed=2))
    assert rows.unique().numel() == rows.numel() == 600
    assert accuracy.calibration_rows(tokens, 10, 100, seed=3).unique().numel() == 1000
    with pytest.raises(BoaEdgeError, match="1000 tokens"):
        accuracy.calibration_rows(tokens, 11, 100, seed=0)


def test_a_filter_that_names_nothing_is_an_error() -> None:
    assert [one.label for one in accuracy.chosen("torchao")] == ["torchao RTN", "torchao HQQ", "torchao 8da4w"]
    assert [one.label for one in accuracy.chosen("autoround,hqq")] == ["AutoRound", "HQQ"]
    assert [one.label for one in accuracy.chosen("light")] == ["AutoRound light"]
    with pytest.raises(UsageError, match="no method 'awk'"):
        accuracy.chosen("awk")


def test_every_peer_has_its_script_and_a_word_for_every_default_setting() -> None:
    for peer in table.PEERS.values():
        assert (table.HERE / f"{peer.script}.py").exists()
        assert all("==" in requirement for requirement in peer.requirements)
        flags = (False, True)
        answers = [peer.refuses(Format(bits, group, flag)) for bits in (2, 4) for group in (None, 32) for flag in flags]
        assert None in answers
    assert table.last_error("Traceback\n  x\nValueError: no\n\n") == "ValueError: no"


def test_quantized_activations_have_a_table_for_each_runtime(request_words: list[str], counted: list[str]) -> None:
    words = [*request_words, "--methods", "edge default,edge rtn,torchao", "--settings", "w4g32,w4g32a8"]
    rows, text = run(words)
    schemes = ("per_block", "per_token")
    assert counted.count("default") == 2  # torchao's variant for one setting and ours without activations
    assert {f"{variant}@{scheme}" for variant in ("default", "rtn") for scheme in schemes} <= set(counted)
    found = {(row["method"], row["activations"]): row["kl"] for row in rows}
    for scheme in schemes:
        assert found["boa-edge default", scheme] < found["boa-edge rtn", scheme]
        assert found["torchao 8da4w", scheme] > 0
        assert ("torchao RTN", scheme) not in found
        assert f"## w4g32a8 {scheme}" in text
    # The same weights, once with each runtime's activations.
    assert found["torchao 8da4w", "per_block"] != found["torchao 8da4w", "per_token"]
    assert ("torchao 8da4w", None) not in found
    assert "weights only" in text
    assert "calibrated on 3 of the sequences; the other 1 are the guard's" in text
    assert "`w4g32-edge`, `w4g32a8-edge-smooth`, `w4g32a8t-edge-smooth`, with" in text
    assert "without `rotatetable`" in text


def test_our_default_is_the_products_for_each_runtime() -> None:
    for scheme, runtime in zip(SCHEMES, ("onnx", "executorch"), strict=True):
        recipe = product_recipe(scheme)
        assert recipe.name == default_recipe(runtime)
        own = recipe_for("default", 4, 32, True, scheme)
        assert own.activations == recipe.activations
        assert set(own.transforms) == set(recipe.transforms) - {"rotatetable"}
        assert recipe_for("gptq", 4, 32, True, scheme).transforms == ()
    assert recipe_for("default", 3, None, False).name == "w3asym-edge"


def test_the_guard_has_sequences_of_its_own() -> None:
    rows, guards = split(torch.arange(32)[:, None])
    assert (rows[:, 0].tolist(), guards[:, 0].tolist()) == (list(range(28)), list(range(28, 32)))
    assert [len(part) for part in split(torch.zeros(2, 8))] == [1, 1]
    with pytest.raises(UsageError, match="one sequence"):
        split(torch.zeros(1, 8))


def test_what_a_child_computes_and_holds_counts() -> None:
    made, more = Made(in_child=True), peak_bytes() + (64 << 20)
    work = f"import time; held = b'x' * {more}\n"
    work += "while time.process_time() < 0.6: pass"
    with made.timed():
        subprocess.run([sys.executable, "-c", work], check=True)
    assert made.cpu_seconds > 0.5
    assert peak_bytes() < more < peak_bytes(in_child=True)


def test_the_ablation_goes_from_rounding_to_the_default_step_by_step(
    request_words: list[str], counted: list[str]
) -> None:
    arguments = accuracy.parse([*request_words, "--settings", "w2asym"])
    accuracy.Benchmark(arguments, own_contenders(STEPS)).run(ablation.write)
    assert counted == list(STEPS)
    rows = json.loads((arguments.output / "ablation.json").read_text())
    assert [row["method"].removeprefix("boa-edge ") for row in rows] == list(STEPS)
    kls = {row["method"].removeprefix("boa-edge "): row["kl"] for row in rows}
    assert kls[list(STEPS)[-1]] < kls["gptq"] < kls["rtn"]
    assert {f"ablation.{suffix}" for suffix in ("json", "md", "svg", "png")} <= {
        p.name for p in arguments.output.iterdir()
    }
    text = (arguments.output / "ablation.md").read_text()
    assert all(f"| {name} | {kls[name]:.4f} |" in text for name in STEPS)
    nothing = [line.split("|")[1].strip() for line in text.splitlines() if "nothing changes at this size" in line]
    assert "+ costly statistics of a part of the text" in nothing  # 4 sequences are below its limits
    assert "gptq" not in nothing


def test_a_quantizer_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    script = "import time; print('at it', flush=True); time.sleep(600)"
    with pytest.raises(accuracy.QuantizerError, match=r"not finished after 0\.02 minutes"):
        accuracy.run_quantizer([sys.executable, "-c", script], tmp_path / "run", tmp_path / "log", 0.02)
    assert (tmp_path / "log").read_text() in ("", "at it\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]
