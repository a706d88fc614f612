"""What `test_distributed.py` has each rank do that `torchrun` starts; imported by it, the same with one rank."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import boa_edge.cli
import toolchain.solve
from toolchain import distributed
from toolchain.block import BlockRunner, Stream
from toolchain.entry import entry, own_attention
from toolchain.families import describe
from toolchain.statistics.block import Wanted, collect

SEQUENCES, LENGTH = 7, 24


def statistics(dtype: torch.dtype) -> dict[str, Tensor]:
    """Every kind of statistics of one small block with norms on its heads: this rank's share, added up over all."""
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        architectures=["Qwen3ForCausalLM"],
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(dtype).eval()
    spec = describe(config.to_dict(), "test")
    generator = torch.Generator().manual_seed(1)
    hidden, other = torch.randn(2, SEQUENCES, LENGTH, 32, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(SEQUENCES, LENGTH, generator=generator) + 0.5
    own = distributed.share(len(hidden.split(2)))
    text, reference = (Stream(list(x.split(2))[own]) for x in (hidden, hidden + 0.1 * other))
    names = spec.layer_names[0]
    result: dict[str, Tensor] = {}
    with torch.inference_mode(), own_attention(model):
        runner = BlockRunner(
            model.model.layers[0],
            names.parts(),
            {name: model.get_submodule(name) for name in names.linears()},
            entry(model, LENGTH)[0][0],
            head_norms={role: model.get_submodule(name) for role, name in names.head_norms().items()},
        )
        wanted = Wanted(attention=True, gauss_newton=True)
        found, _ = collect(runner, spec, tuple(runner.parts), text, reference, wanted, list(weights.split(2))[own])
        for kind in ("inputs", "lacking", "rows"):
            result |= {f"{kind}.{role}": tensor.clone() for role, tensor in getattr(found, kind).items()}
        assert found.keys is not None
        assert found.queries is not None
        assert found.values is not None
        assert found.value_rows is not None
        result |= {"keys": found.keys, "queries": found.queries, "values": found.values, "value_rows": found.value_rows}
        result |= {f"norm.{role}": norm.mean(result[f"rows.{role}"]) for role, norm in found.head_norms.items()}
    return result


def main(output: str, *arguments: str) -> None:
    """Statistics to `output`; then `boa-edge` with `arguments`, which the second rank fails at."""
    with distributed.joined():
        assert distributed.world_size() == 2
        for dtype in (torch.float64, torch.float32):
            found = statistics(dtype)
            alike = distributed.gather({name: tensor.numpy().tobytes() for name, tensor in found.items()})
            assert alike[0] == alike[1]
            if distributed.is_main():
                save_file(found, f"{output}-{dtype}")
        if distributed.rank() == 1:
            toolchain.solve.inverse_factor = _fail  # type: ignore[assignment]
        sys.argv = ["boa-edge", *arguments]
        boa_edge.cli.main()


def _fail(*_: object, **__: object) -> None:
    raise ArithmeticError("no damping mends this Hessian")


if __name__ == "__main__":
    main(*sys.argv[1:])
