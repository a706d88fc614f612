"""Simulated activation quantization against ONNX Runtime and ExecuTorch themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from exporters.onnx.session import session_options
from toolchain.activations import (
    FLOAT,
    SCHEMES,
    ActivationFormat,
    RangeObserver,
    matmul_per_block,
    matmul_per_token,
    per_block,
    per_row,
    per_token,
    simulate,
    static,
)
from toolchain.quantized import QuantizedWeight, code_range

COLUMNS = 128
Linear = Callable[[Tensor], Tensor]


def random_weight(bits: int, rows: int, columns: int, size: int | None, symmetric: bool = True) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits * 1000 + columns)
    low, high = code_range(bits)
    groups = 1 if size is None else columns // size
    scales = (0.01 + torch.rand(rows, groups, generator=generator)).bfloat16().float()
    zeros = torch.randint(low, high + 1, (rows, groups), generator=generator, dtype=torch.int8)
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int8)
    return QuantizedWeight(codes, scales, None if symmetric else zeros, bits, size)


def power_of_two_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """The same codes with scales 1/4 to 1: float32 then holds every sum of products with integers exactly."""
    generator = torch.Generator().manual_seed(7)
    scales = 2.0 ** -torch.randint(0, 3, weight.scales.shape, generator=generator).float()
    return QuantizedWeight(weight.codes, scales, weight.zero_points, weight.bits, weight.group_size)


def identity(bits: int, size: int | None) -> QuantizedWeight:
    """Output j is what input j became: code - zero point, times its scale."""
    groups = 1 if size is None else COLUMNS // size
    return QuantizedWeight(torch.eye(COLUMNS, dtype=torch.int8), torch.ones(COLUMNS, groups), None, bits, size)


def activations(rows: int = 48, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Rows of every kind: random, one sign, zero, tiny, with zero blocks, with outliers times 100 to 1000."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[6:9], x[9:12] = x[6:9].abs(), -x[9:12].abs()
    x[12], x[13], x[14] = 0, x[13] * 1e-6, x[14] * 1e-30
    x[15:18, : columns // 2] = 0
    x[18:24, 3] *= 100
    x[24:30, 5] *= 1000
    x[30:36, [7, 70]] *= -500
    return x


def ties(low: int, high: int, rows: int = 8) -> Tensor:
    """Integers and halves between low and high, both present in each block of 16: a row's scale is then exactly 1."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(2 * low, 2 * high + 1, (rows, COLUMNS), generator=generator).float() / 2
    x[:, ::16], x[:, 1::16] = low, high
    return x


# ONNX Runtime.


def onnx_session(nodes: Sequence[Any], columns: int, tensors: dict[str, np.ndarray]) -> Linear:
    """A graph from X [rows, columns] to Y, run by ONNX Runtime."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["rows", columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options({}, threads=1), providers=["CPUExecutionProvider"]
    )
    return lambda x: torch.from_numpy(session.run(["Y"], {"X": x.numpy()})[0])


def packed(values: Tensor, bits: int) -> np.ndarray:
    """Signed codes [..., n] as MatMulNBits stores them: unsigned, low nibble first."""
    unsigned = (values.to(torch.int32) + (1 << (bits - 1))).to(torch.uint8).numpy()
    if bits == 8:
        return unsigned
    if unsigned.shape[-1] % 2:
        unsigned = np.concatenate([unsigned, np.zeros_like(unsigned[..., :1])], -1)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def matmul_nbits(weight: QuantizedWeight) -> Linear:
    assert weight.group_size is not None
    rows, columns = weight.shape
    tensors = {
        "B": packed(weight.codes.view(rows, -1, weight.group_size), weight.bits),
        "S": weight.scales.numpy(),
    }
    if weight.zero_points is not None:
        tensors["Z"] = packed(weight.zero_points, weight.bits)
    attributes = {"K": columns, "N": rows, "bits": weight.bits, "block_size": weight.group_size, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["X", *tensors], ["Y"], domain="com.microsoft", **attributes)
    return onnx_session([node], columns, tensors)


BITS_AND_BLOCKS = [(bits, size) for bits in (4, 8) for size in (16, 32, 64, 128)]


@pytest.mark.parametrize(("bits", "size"), BITS_AND_BLOCKS)
def test_onnx_runtime_takes_the_same_codes_and_scales_per_block(bits: int, size: int) -> None:
    # With the lowest zero point the stored codes are 0 and 1, and nothing is subtracted: Y is scale * code.
    low, weight = code_range(bits)[0], identity(bits, size)
    zeros = torch.full(weight.scales.shape, low, dtype=torch.int8)
    run = matmul_nbits(QuantizedWeight(weight.codes + low, weight.scales, zeros, bits, size))
    x = activations()
    expected = per_block.quantize(x, size).dequantize()
    for rows in (slice(0, 1), slice(24, 25), slice(0, 48)):  # (one row has kernels of its own)
        assert torch.equal(run(x[rows]), expected[rows])


@pytest.mark.parametrize(("bits", "size"), BITS_AND_BLOCKS)
def test_onnx_runtime_rounds_ties_to_even_per_block(bits: int, size: int) -> None:
    x = ties(-127, 127)
    y = matmul_nbits(identity(bits, size))(x)
    assert torch.equal(y, per_block.fake_quantize(x, size))
    assert not torch.equal(y, per_block.fake_quantize(x, size, "neon"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), BITS_AND_BLOCKS)
def test_onnx_runtime_products_per_block(bits: int, size: int, symmetric: bool) -> None:
    weight = random_weight(bits, 40, 384, size, symmetric)
    exact = power_of_two_weight(weight)
    x, whole = activations(columns=384), torch.cat([ties(-127, 127).trunc()] * 3, 1)
    for rows in (1, 48):
        assert_close_to_terms(matmul_nbits(weight)(x[-rows:]), matmul_per_block(x[-rows:], weight), x[-rows:], weight)
        # Scales of 1 and integers: no rounding anywhere, so every code, sum and scale is the same.
        assert torch.equal(matmul_nbits(exact)(whole[:rows]), matmul_per_block(whole[:rows], exact))


def assert_close_to_terms(y: Tensor, expected: Tensor, x: Tensor, weight: QuantizedWeight) -> None:
    """Equal up to float32 rounding of what was added up: the codes with their offset, not the small differences."""
    largest = weight.scales.amax() * (1 << weight.bits)
    bound = x.abs().sum(1, keepdim=True) * largest + 1e-30
    assert ((y - expected).abs() <= 4e-7 * bound).all()
    # The bound must see one code in one place.
    assert (expected.abs().amax() > 1e4 * 4e-7 * bound.amin()).all()


@pytest.mark.parametrize("columns", [96, 80])
def test_onnx_runtime_takes_blocks_of_32_without_groups(columns: int) -> None:
    import ml_dtypes

    weight = random_weight(4, 24, columns, None)
    tensors = {"W": weight.codes.numpy().T.astype(ml_dtypes.int4), "S": weight.scales[:, 0].numpy()}
    nodes = [
        helper.make_node("DequantizeLinear", ["W", "S"], ["D"], axis=1),
        helper.make_node("MatMul", ["X", "D"], ["Y"]),
    ]
    x = activations(columns=columns)
    y = onnx_session(nodes, columns, tensors)(x)
    assert_close_to_terms(y, matmul_per_block(x, weight), x, weight)
    coarser = per_block.fake_quantize(x, 64) @ weight.dequantize().T
    assert (y - coarser).abs().max() > 100 * (y - matmul_per_block(x, weight)).abs().max()


@pytest.mark.parametrize("signed", [True, False])
def test_onnx_quantize_linear_static(signed: bool) -> None:
    x = torch.cat([activations(), ties(-128, 127)])
    grids = [static.grid(*extremes, signed=signed) for extremes in ((-2.0, 3.0), (0.0, 1e-3), (-900.0, 10.0))]
    grids.append(static.StaticGrid(1.0, 0 if signed else 128, signed))
    for grid in grids:
        kind = np.int8 if signed else np.uint8
        tensors = {"s": np.array(grid.scale, np.float32), "z": np.array(grid.zero_point, kind)}
        nodes = [
            helper.make_node("QuantizeLinear", ["X", "s", "z"], ["Q"]),
            helper.make_node("DequantizeLinear", ["Q", "s", "z"], ["Y"]),
        ]
        y = onnx_session(nodes, COLUMNS, tensors)(x)
        assert torch.equal(y, static.fake_quantize(x, grid))
        assert torch.equal(y, static.quantize(x, grid).dequantize())


# ExecuTorch.


class Dynamic(nn.Module):
    """Linears of one input, in the form that XNNPACK's partitioner recognises. No two may have the same codes."""

    def __init__(self, weights: Sequence[QuantizedWeight]) -> None:
        super().__init__()
        self.weights = list(weights)
        for index, weight in enumerate(weights):
            grouped = weight.group_size is not None
            scales = weight.scales if grouped else weight.scales[:, 0]
            self.register_buffer(f"codes{index}", weight.codes)
            self.register_buffer(f"scales{index}", scales)
            zeros = torch.zeros(scales.shape, dtype=torch.int8 if grouped else torch.int64)
            self.register_buffer(f"zeros{index}", zeros)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ops = torch.ops.quantized_decomposed
        results = []
        for index, weight in enumerate(self.weights):
            scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
            q = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
            values = ops.dequantize_per_token(q, scale, zero, -128, 127, torch.int8, torch.float32)
            grid = [self.get_buffer(f"{name}{index}") for name in ("codes", "scales", "zeros")]
            low, high = code_range(weight.bits)
            if weight.group_size is None:
                matrix = ops.dequantize_per_channel(*grid, 0, low, high, torch.int8)
            else:
                matrix = ops.dequantize_per_channel_group(
                    *grid, low, high, torch.int8, weight.group_size, torch.float32
                )
            results.append(nn.functional.linear(values, matrix))
        return tuple(results)


GROUPED = random_weight(4, 40, COLUMNS, 32)
WEIGHTS = {
    "identity": identity(4, None),
    "per channel": random_weight(4, 40, COLUMNS, None),
    "int8 per channel": random_weight(8, 40, COLUMNS, None),
    "grouped": GROUPED,
    "grouped, exact": power_of_two_weight(random_weight(4, 44, COLUMNS, 32)),
    "groups of 64, float32 scales": QuantizedWeight(
        random_weight(4, 40, COLUMNS, 64).codes, 0.1 + torch.arange(80).view(40, 2) / 97, None, 4, 64
    ),
}


@pytest.fixture(scope="module")
def xnnpack() -> Callable[[Tensor], dict[str, Tensor]]:
    """All of WEIGHTS in one program, every linear inside XNNPACK."""
    import torch.ao.quantization.fx._decomposed
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(
        Dynamic(list(WEIGHTS.values())).eval(),
        (activations(),),
        dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=64)},),
        strict=False,
    )
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    left = {str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"}
    assert left == {"executorch_call_delegate", "<built-in function getitem>"}
    data = edge.to_executorch().buffer
    loaded = Runtime.get().load_program(data)
    method = loaded.load_method("forward")

    # (the method points into `data` and `loaded`, which nothing else keeps alive)
    def run(x: Tensor, _keep: object = (data, loaded)) -> dict[str, Tensor]:
        return dict(zip(WEIGHTS, [y.clone() for y in method.execute([x])], strict=True))

    return run


def test_xnnpack_takes_the_same_codes_scales_and_zero_points(xnnpack: Callable[[Tensor], dict[str, Tensor]]) -> None:
    x = torch.cat([activations(), ties(-100, 155), ties(-128, 127)])
    expected = per_token.fake_quantize(x)
    assert torch.equal(xnnpack(x)["identity"], expected)
    assert torch.equal(xnnpack(x[:1])["identity"], expected[:1])
    assert torch.equal(per_token.quantize(x).dequantize(), expected)
    # Other rules would have been seen: the ties of KleidiAI, and the reference operators of the exported program.
    assert not torch.equal(per_row.fake_quantize(x), expected)
    ops = torch.ops.quantized_decomposed
    scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    reference = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    assert not torch.equal(reference, per_token.quantize(x).codes)


@pytest.mark.parametrize("name", ["per channel", "int8 per channel", "grouped, exact"])
def test_xnnpack_products_bit_for_bit(name: str, xnnpack: Callable[[Tensor], dict[str, Tensor]]) -> None:
    x = torch.cat([activations(), ties(-100, 155)])
    assert torch.equal(xnnpack(x)[name], matmul_per_token(x, WEIGHTS[name]))
    assert torch.equal(xnnpack(x[:1])[name], matmul_per_token(x[:1], WEIGHTS[name]))


@pytest.mark.parametrize("name", ["grouped", "groups of 64, float32 scales"])
def test_xnnpack_products_in_groups(name: str, xnnpack: Callable[[Tensor], dict[str, Tensor]]) -> None:
    x, weight = activations(), WEIGHTS[name]
    y, expected = xnnpack(x)[name], matmul_per_token(x, weight)
    # What is added up is codes, not yet without their zero point.
    bound = per_token.quantize(x).scales * 128 * weight.dequantize().abs().sum(1)
    assert ((y - expected).abs() <= 3e-7 * bound).all()
    changed = weight.scales * (1 + 2**-8)
    other = matmul_per_token(x, QuantizedWeight(weight.codes, changed, None, weight.bits, weight.group_size))
    assert ((y - other).abs() > 3e-7 * bound).any()


def test_xnnpack_returns_noise_for_zeros_in_groups(xnnpack: Callable[[Tensor], dict[str, Tensor]]) -> None:
    zeros = torch.zeros(2, COLUMNS)
    y = xnnpack(zeros)
    assert 0 < y["grouped"].abs().max() < 1e-2
    assert not y["per channel"].any()


def test_weights_that_xnnpack_gets_wrong_are_refused() -> None:
    x = activations()
    with pytest.raises(ValueError, match="zero points"):
        matmul_per_token(x, random_weight(4, 8, COLUMNS, 32, symmetric=False))
    with pytest.raises(ValueError, match="multiple of 32"):
        matmul_per_token(x, random_weight(4, 8, COLUMNS, 16))
    with pytest.raises(ValueError, match="8 bits in groups"):
        matmul_per_token(x, random_weight(8, 8, COLUMNS, 32))


# What needs no runtime.


def test_simulation_is_the_dequantized_codes() -> None:
    x = activations().view(4, 12, COLUMNS)[..., :80]
    for kernel in ("x86", "neon"):
        for size in (16, 32, 80):
            assert torch.equal(
                per_block.quantize(x, size, kernel).dequantize(), per_block.fake_quantize(x, size, kernel)
            )
    assert torch.equal(
        simulate(x, ActivationFormat("per_block"), group_size=None),
        simulate(x, ActivationFormat("per_block"), group_size=32),
    )
    assert torch.equal(per_row.quantize(x, symmetric=True).scales, per_block.quantize(x, 80).scales)
    assert simulate(x, FLOAT, group_size=32) is x
    steps = {"per_token": 255, "per_row": 255, "per_block": 254}
    for name, levels in steps.items():
        widest = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
        if name == "per_block":
            widest = 2 * x.abs().amax(-1, keepdim=True)
        error = (simulate(x, ActivationFormat(name), group_size=16) - x).abs()
        # (half a step, and the zero point's own rounding)
        assert (error <= widest / levels * 1.01).all()


def test_half_away() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, 0.49999997, -0.49999997, 126.5, 8388607.5, 3.0])
    expected = torch.tensor([1.0, 2, -1, -3, 0, 0, 127, 8388608, 3])
    assert torch.equal(per_block.round_half_away(x), expected)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_schemes_keep_zeros_and_tiny_values_finite(name: str) -> None:
    x = torch.zeros(3, 64)
    x[1], x[2] = 1e-38, 3e-41
    fmt = ActivationFormat(name)
    y = simulate(x, fmt, group_size=32, static_range=(0.0, 0.0) if fmt.needs_range else None)
    assert y.abs().max() <= 1.1e-38
    assert torch.equal(y[0], x[0])


def test_formats_and_ranges_are_checked() -> None:
    x = activations()
    with pytest.raises(ValueError, match="no activation scheme 'per_tensor'"):
        ActivationFormat("per_tensor")
    with pytest.raises(ValueError, match="8 bits, not 4"):
        ActivationFormat("per_token", bits=4)
    with pytest.raises(ValueError, match="static_int8 needs"):
        simulate(x, ActivationFormat("static_int8"), group_size=32)
    with pytest.raises(ValueError, match="per_token takes no range"):
        simulate(x, ActivationFormat("per_token"), group_size=32, static_range=(0.0, 1.0))
    with pytest.raises(ValueError, match="float32"):
        simulate(x.double(), ActivationFormat("per_token"), group_size=32)
    for low, high in ((1.0, 0.0), (float("-inf"), 1.0), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="not a range"):
            static.grid(low, high, signed=True)
    with pytest.raises(ValueError, match="leaves"):
        static.StaticGrid(1.0, 128, signed=True)
    with pytest.raises(ValueError, match="float32"):
        static.StaticGrid(0.1, 0, signed=True)


def test_static_grids_hold_zero_and_the_range() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)):
        for signed in (True, False):
            grid = static.grid(low, high, signed=signed)
            ends = torch.tensor([0.0, low, high])
            got = static.fake_quantize(ends, grid)
            assert got[0] == 0
            assert ((got - ends).abs() <= grid.scale).all()
            assert grid.zero_point == 0 or not signed


def test_observer_ranges() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator)
    observer = RangeObserver()
    with pytest.raises(ValueError, match="no activations"):
        observer.range()
    observer.update(torch.zeros(10))
    assert observer.range("mse") == (0.0, 0.0)
    for part in values.split(7_000):
        observer.update(part)
    assert observer.range() == (values.min().item(), values.max().item())
    low, high = observer.range("percentile", percentile=99.0)
    quantiles = np.quantile(values.numpy(), [0.005, 0.995])
    np.testing.assert_allclose([low, high], quantiles, atol=0.02)
    with pytest.raises(ValueError, match="percentile"):
        observer.range("percentile", percentile=0)
    with pytest.raises(ValueError, match="finite"):
        observer.update(torch.tensor([float("nan")]))


def test_observer_does_not_depend_on_the_order() -> None:
    values = activations(seed=4).flatten()
    forward, backward = RangeObserver(), RangeObserver()
    for part in values.split(50):
        forward.update(part)
    for part in reversed(values.split(50)):
        backward.update(part)
    for method in ("minmax", "percentile", "mse"):
        assert forward.range(method) == backward.range(method)


@pytest.mark.parametrize("signed", [True, False])
def test_mse_range_is_the_best_of_the_shrunk_ranges(signed: bool) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    x[0], x[1] = 12, -12
    observer = RangeObserver()
    observer.update(x)

    def error(extremes: tuple[float, float]) -> float:
        return float((static.fake_quantize(x, static.grid(*extremes, signed=signed)) - x).double().square().sum())

    best = error(observer.range("mse", signed=signed))
    low, high = observer.range()
    fractions = [error((low * f, high * f)) for f in np.geomspace(1, 0.01, 40)]
    assert best <= 1.01 * min(fractions)
    assert best < 0.9 * fractions[0]
    falling = [a >= b for a, b in pairwise(fractions)]
    assert True in falling
    assert False in falling
