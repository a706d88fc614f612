"""The benchmark of the runtimes: its arithmetic, and a real run of our own bundles of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from benchmarks.runtimes import bench as bench_module
from benchmarks.runtimes.__main__ import parse
from benchmarks.runtimes.bench import Benchmark, chosen
from benchmarks.runtimes.build_executorch import interleaved as rotary_interleaved
from benchmarks.runtimes.build_executorch import meta_name
from benchmarks.runtimes.contenders import CONTENDERS, FUSED, PROGRAM, QDQ, Contender
from benchmarks.runtimes.figures import Speed, Spread, Timed, interleaved, ratio, speed_of, spread
from benchmarks.runtimes.programs import PROGRAMS, NotAvailableError, requantize
from benchmarks.runtimes.report import markdown, pareto, write_report
from benchmarks.runtimes.rows import Protocol, Report, rows_of
from boa_edge.errors import BoaEdgeError, UsageError
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe

SMALL = {"sequences": 4, "sequence_length": 32, "held_out_sequences": 2}
PROTOCOL = Protocol("a model", "a text", 16, 8, 1, 3, 1, 2, 32, (0.5, 1.5), "a version")


def speed(decode: float, prefill: float = 100.0) -> Speed:
    return Speed(prefill=prefill, decode=decode, load_s=0.5, peak_bytes=1000)


def test_every_contender_runs_once_a_round_and_every_round_starts_with_another() -> None:
    order = interleaved(["a", "b", "c"], 3)
    rounds = [[label for turn, label in order if turn == number] for number in range(3)]
    assert [sorted(each) for each in rounds] == [["a", "b", "c"]] * 3
    assert [each[0] for each in rounds] == ["a", "b", "c"]
    assert [turn for turn, _ in order] == sorted(turn for turn, _ in order)


def test_speeds_are_of_the_median_run_and_the_first_token_belongs_to_the_prefill() -> None:
    runs = [Timed(prefill_ns=n * 10**9, decode_ns=n * 10**9) for n in (4, 1, 2)]
    found = speed_of(runs, prompt=10, new_tokens=9, load_ns=5 * 10**8, peak_bytes=7)
    assert found == Speed(prefill=5.0, decode=4.0, load_s=0.5, peak_bytes=7)


@pytest.mark.parametrize(("runs", "new_tokens"), [([], 9), ([Timed(0, 1)], 9), ([Timed(1, 1)], 1)])
def test_no_speed_without_a_time(runs: list[Timed], new_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"time|speed"):
        speed_of(runs, 10, new_tokens, 1, 1)


def test_a_ratio_is_of_the_medians_and_its_spread_is_within_rounds() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    # A slow machine in the last round meets both, and moves no ratio.
    assert ratio([20.0, 20.0, 10.0], [10.0, 10.0, 5.0]) == Spread(2.0, 2.0, 2.0)
    assert ratio([20.0, 30.0, 10.0], [10.0, 10.0, 10.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_rows_compare_with_ours_and_take_over_the_kl_of_the_same_file() -> None:
    ours = Contender("ours", "p", "native")
    same = Contender("ours elsewhere", "p", "genai", same_program="ours")
    other = Contender("other", "q", "llama", beside="ours")
    speeds = {"ours": [speed(40.0)] * 2, "ours elsewhere": [speed(30.0)] * 2, "other": [speed(20.0, 200.0)] * 2}
    rows = rows_of([ours, same, other], speeds, dict.fromkeys(speeds, 5), {"ours": [0.1, 0.3], "other": [0.2]})
    assert [(row.ours, row.kl, row.kl_rows, row.kl_first) for row in rows] == [
        (True, 0.2, 2, 0.1),
        (True, 0.2, 2, 0.1),
        (False, 0.2, 1, 0.2),
    ]
    assert rows[0].decode_ratio is None
    assert rows[2].decode_ratio == Spread(2.0, 2.0, 2.0)
    assert rows[2].prefill_ratio == Spread(0.5, 0.5, 0.5)
    text = markdown(Report(rows, PROTOCOL, {"missing": "why"}, {"other": ["said so"]}))
    assert "| other | 200 (200 to 200) | 20.0 (20.0 to 20.0) | 0.50 | 0 | 0 | of the first only | 0.2000 |" in text
    assert "| ours | other | 0.50 (0.50 to 0.50) | 2.00 (2.00 to 2.00) |" in text
    assert "- **missing**: why" in text
    assert "- **other**: said so" in text


def test_the_front_holds_what_nothing_betters() -> None:
    assert pareto([(10, 0.1), (20, 0.2), (15, 0.3), (30, 0.4), (30, 0.5)]) == [(30, 0.4), (20, 0.2), (10, 0.1)]


def test_the_table_names_what_exists() -> None:
    labels = [one.label for one in CONTENDERS]
    assert len(set(labels)) == len(labels)
    for one in CONTENDERS:
        assert one.program in PROGRAMS
        assert {one.beside, one.same_program} - {None} <= {each.label for each in CONTENDERS}
        drivers = Path(bench_module.__file__).parent
        assert one.driver == "native" or (drivers / f"drive_{one.driver}.py").is_file()
    with pytest.raises(UsageError, match="no contender 'none such'"):
        chosen("none such")


def test_metas_layout_turns_the_same_pairs_of_a_head() -> None:
    """RoPE with pairs half a head apart, then reordered, is RoPE with neighbouring pairs on reordered rows."""
    heads, size = 2, 8
    weight, x, angle = torch.randn(heads * size, 5), torch.randn(5), torch.randn(size // 2)

    def halves(v: torch.Tensor) -> torch.Tensor:
        a, b = v.view(heads, 2, -1).unbind(1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten()

    def neighbours(v: torch.Tensor) -> torch.Tensor:
        a, b = v.view(heads, -1, 2).unbind(-1)
        return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten()

    expected = rotary_interleaved(halves(weight @ x)[:, None], size)[:, 0]
    torch.testing.assert_close(neighbours(rotary_interleaved(weight, size) @ x), expected)
    assert meta_name("model.layers.3.mlp.down_proj.weight") == "layers.3.feed_forward.w2.weight"


def test_a_gguf_file_is_quantized_anew(tmp_path: Path) -> None:
    values = {name: np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) for name in ("blk.0.w", "head")}
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, value in values.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    requantize(tmp_path / "source.gguf", tmp_path / "made.gguf")
    made = gguf.GGUFReader(tmp_path / "made.gguf")
    assert {tensor.name: tensor.tensor_type.name for tensor in made.tensors} == {
        "blk.0.w.weight": "Q4_0",
        "head.weight": "Q8_0",
    }
    assert made.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    for tensor in made.tensors:
        error = gguf.dequantize(tensor.data, tensor.tensor_type) - values[tensor.name.removesuffix(".weight")]
        assert np.abs(error).max() < 0.3
    (tmp_path / "broken.gguf").write_bytes(b"no such thing as a model" * 10)
    with pytest.raises(BoaEdgeError, match="no GGUF file"):
        requantize(tmp_path / "broken.gguf", tmp_path / "other.gguf")


@pytest.fixture
def request_words(tiny_model: Path, text_file: Path, tmp_path: Path) -> list[str]:
    recipe = parse_recipe({"method": "rtn", "weights": {"bits": 4, "group_size": 32}, "calibration": SMALL}, "test")
    quantize(str(tiny_model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    words = ["--model", str(tiny_model), "--checkpoint", str(tmp_path / "checkpoint"), "--text", str(text_file)]
    words += ["--prompt", "8", "--new-tokens", "4", "--rounds", "2", "--repeats", "1", "--tokens", "64"]
    return [*words, "--length", "32", "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out")]


def test_our_bundles_of_a_tiny_model(request_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise NotAvailableError("it cannot be had")

    monkeypatch.setitem(bench_module.PROGRAMS, "gguf-q4_0", refuse)
    contenders = [one for one in CONTENDERS if one.label in (QDQ, FUSED, PROGRAM) or one.program == "gguf-q4_0"]
    monkeypatch.setattr(Benchmark, "_python", lambda *_: Path("unused"))
    arguments = parse(request_words)
    report = Benchmark(arguments, contenders, "test").run()
    assert [row.label for row in report.rows] == [QDQ, FUSED, PROGRAM]
    assert report.not_run == {"llama.cpp Q4_0": "it cannot be had"}
    for row in report.rows:
        assert row.kl is not None
        assert 0 < row.kl < 1
        assert 0 < row.decode.low <= row.decode.median <= row.decode.high
        assert row.peak_bytes > row.size > 0
    # One checkpoint, so one KL, but for what int8 activations of two kinds do.
    kls = [row.kl or 0.0 for row in report.rows]
    assert max(kls) < 1.5 * min(kls)

    def fail(*_: object) -> None:
        raise AssertionError("it was measured again")

    for name in ("native_speed", "native_logits"):
        monkeypatch.setattr(bench_module, name, fail)
    second = Benchmark(arguments, contenders, "test")
    assert second.run().rows == report.rows
    second.finish()
    with pytest.raises(AssertionError, match="measured again"):  # once reported, times are not kept
        Benchmark(arguments, contenders, "test").run()
    arguments.output.mkdir()
    write_report(arguments.output, report)
    written = json.loads((arguments.output / "runtimes.json").read_text())
    assert [row["label"] for row in written["rows"]] == [QDQ, FUSED, PROGRAM]
    assert {path.name for path in arguments.output.iterdir()} == {
        "runtimes.json",
        "runtimes.md",
        "runtimes.svg",
        "runtimes.png",
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--new-tokens", "1"], "at least 2"),
        (["--prompt", "100000"], "the prompt needs 100000"),
        (["--checkpoint", "/nowhere"], "nowhere"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_clear_error(
    change: list[str], says: str, request_words: list[str]
) -> None:
    with pytest.raises(BoaEdgeError, match=says):
        Benchmark(parse([*request_words, *change]), chosen(QDQ), "test").run()
