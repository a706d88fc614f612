"""A module and its delegates -> a .pte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.exir.schema import KernelCall, Program
from torch import Tensor, fx, nn
from torch.export import export

from exporters.executorch.constants import Constants
from exporters.executorch.placeholder import PLACEHOLDER
from exporters.executorch.sharing import share

BACKEND = "XnnpackBackend"


@dataclass(frozen=True)
class Written:
    """What stands in a program.

    Attributes:
        outside: kernels outside of the delegates, by name and overload, with how often they are called.
        shared: bytes of the delegates' constants that are those of a constant tensor outside, and stand once.
    """

    outside: dict[str, int]
    shared: int


class _Traced:
    """What ExecuTorch asks of the program that a delegate came from: tensors of the right shapes, when its passes trace
    the whole again, and a graph with notes for debuggers, which is empty here.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._like = list(like)
        self.graph = fx.Graph()
        self.graph.output([None] * len(self._like))

    def module(self) -> Callable[..., list[Tensor]]:
        return lambda *inputs: [torch.empty_like(each) for each in self._like]


def write_program(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    sizes: Any,
    delegates: Sequence[bytes],
    constants: Constants,
    path: Path,
    metadata: Mapping[str, Any] | None = None,
) -> Written:
    """Write the program whose method forward is `module`.

    Args:
        module: with a placeholder (`exporters.executorch.placeholder`) for each delegate.
        inputs: of the largest sizes that forward takes.
        sizes: which of them may be smaller, as torch.export takes it; None for none.
        delegates: by number, as the placeholders name them.
        constants: of all delegates.
        metadata: constant methods by name.
    """
    with torch.no_grad():
        exported = export(module, inputs, dynamic_shapes=sizes, strict=False)
    edge = to_edge(
        exported, constant_methods=dict(metadata or {}), compile_config=EdgeCompileConfig(_check_ir_validity=False)
    )
    _insert(edge.exported_program().graph_module, delegates)
    edge._named_data_store.merge_named_data_store(constants.output())
    lowered = edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
    with path.open("wb") as stream:
        lowered.write_to_file(stream)
    return Written(_operators(lowered.executorch_program), share(path))


def _insert(module: fx.GraphModule, delegates: Sequence[bytes]) -> None:
    """Replace each placeholder by a call of its delegate."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or _name(node.target) != PLACEHOLDER:
            continue
        inputs, segment = node.args[0], node.args[1]
        lowered = LoweredBackendModule(_Traced(node.meta["val"]), BACKEND, delegates[segment], [])
        lowered.meta = {"debug_handle_map": {}}
        name = f"delegate_{segment}"
        setattr(module, name, lowered)
        with module.graph.inserting_before(node):
            held = module.graph.get_attr(name)
            held.meta["val"] = None
            call = module.graph.call_function(executorch_call_delegate, (held, *inputs))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.recompile()


def _name(target: Any) -> str:
    """`namespace::name` of an operator, without its overload."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else schema.name


def _operators(program: Program) -> dict[str, int]:
    """How often each kernel is called by the method forward."""
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    calls = [
        plan.operators[instruction.instr_args.op_index]
        for chain in plan.chains
        for instruction in chain.instructions
        if isinstance(instruction.instr_args, KernelCall)
    ]
    return dict(sorted(Counter(f"{each.name}.{each.overload}".rstrip(".") for each in calls).items()))
