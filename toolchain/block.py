"""One decoder block and the texts that stand before it: run in stages, each stage on weights that are already final.

A block is run by its own class from `transformers`; nothing of its architecture is written down here but where its
projections are. Hooks take the projections' inputs, a pass ends as soon as it has shown what was wanted, and what is
already known is not computed again: attention or an MLP that is done hands out its stored output, and what lies before
it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from toolchain.accelerator import at
from toolchain.activations.plan import ActivationPlan
from toolchain.families import Part
from toolchain.spill import Spill
from toolchain.statistics.attention import Handler, Kept, Stop, cached_by, handled_by

_BEFORE = {"o": ("q", "k", "v"), "down": ("gate", "up")}


@dataclass
class Stream:
    """A text on its way through the model.

    Attributes:
        hidden: what the block at hand takes in, a tensor [B, L, d] per batch.
        keep: what tensors go through that are kept, to memory or to disk.
        outputs: what its `o` and `down` put out, per batch, once known.
        following: what the block puts out, per batch, where a pass has got that far already.
    """

    hidden: list[Tensor]
    keep: Spill = field(default_factory=Spill)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    following: list[Tensor] = field(default_factory=list)

    def advance(self) -> None:
        """On to the next block."""
        self.hidden, self.following, self.outputs = self.following, [], {}


@dataclass(frozen=True)
class Taps:
    """What one pass showed: inputs and outputs of projections by role, and the block's output where it got that far."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    hidden: Tensor | None


class BlockRunner:
    """Runs one block on any stream.

    Args:
        block: in evaluation mode, at full precision.
        parts: where its projections are, module names relative to the whole model.
        modules: those modules.
        arguments: what the model hands this block besides the hidden states.
        index: which block of the model it is.
        norms: by role, `o` and `down`, what norms the inputs of attention and of the MLP.
        head_norms: by role, the norms on each head of q and k, where there are any.
        activations: how the inputs of the projections are quantized in passes with the settled weights.
        kept: what becomes of keys and values in those passes; None: nothing.

    Attributes:
        place: the device that the block is on; what it is given comes from anywhere.
    """

    def __init__(
        self,
        block: nn.Module,
        parts: Mapping[str, Part],
        modules: Mapping[str, nn.Linear],
        arguments: dict[str, Any],
        *,
        index: int = 0,
        norms: Mapping[str, nn.Module] | None = None,
        head_norms: Mapping[str, nn.Module] | None = None,
        activations: ActivationPlan | None = None,
        kept: Kept | None = None,
    ) -> None:
        self._block, self.parts, self.modules = block, parts, modules
        self.index, self.head_norms = index, head_norms or {}
        self._activations, self._kept = activations, kept
        self._final: dict[str, Tensor] = {}
        self.place = next(iter(modules.values())).weight.device
        self._arguments = at(self.place, arguments)
        self._norms = norms or {}
        owners = {role: _owner(block, modules[parts[role].module]) for role in _BEFORE if role in parts}
        self._owners = {role: owner for role, owner in owners.items() if owner is not block}

    def original(self, role: str) -> Tensor:
        """The full-precision weight of a projection, [out, in]."""
        part = self.parts[role]
        return self.modules[part.module].weight.data[part.rows]

    def bias(self, role: str) -> Tensor | None:
        """Its bias [out], if it has one."""
        part = self.parts[role]
        bias = self.modules[part.module].bias
        return None if bias is None else bias.data[part.rows]

    def settle(self, role: str, weight: Tensor) -> None:
        """From now on, passes with `final=True` use this weight for a projection."""
        part = self.parts[role]
        if part.module not in self._final:
            self._final[part.module] = self.modules[part.module].weight.data.clone()
        self._final[part.module][part.rows] = weight

    @contextmanager
    def _weights(self, final: bool) -> Iterator[None]:
        if not final:
            yield
            return
        originals = {name: self.modules[name].weight for name in self._final}
        try:
            for name, weight in self._final.items():
                self.modules[name].weight = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for name, original in originals.items():
                self.modules[name].weight = original

    def run(
        self,
        stream: Stream,
        batch: int,
        *,
        final: bool,
        inputs: tuple[str, ...] = (),
        outputs: tuple[str, ...] = (),
        attention: Callable[[Mapping[str, Tensor]], Handler] | None = None,
        stop_before: str | None = None,
        stop_after: str | None = None,
    ) -> Taps:
        """Run the block on one batch of a stream.

        Args:
            final: with the settled weights, quantized activations and the cache; otherwise as in the original.
            inputs, outputs: roles whose inputs and outputs are wanted.
            attention: makes the handler of attention from the inputs seen so far.
            stop_before, stop_after: a role before or after which nothing is needed any more.
        """
        seen_inputs: dict[str, Tensor] = {}
        seen_outputs: dict[str, Tensor] = {}
        hidden: Tensor | None = None
        handles: list[Any] = []

        def before(role: str) -> Callable[..., None]:
            def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                if role in inputs:
                    seen_inputs[role] = arguments[0]
                if role == stop_before:
                    raise Stop

            return hook

        def after(role: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
                if role in outputs:
                    seen_outputs[role] = output[..., self.parts[role].rows]
                if role == stop_after:
                    raise Stop

            return hook

        handler = None if attention is None else attention(seen_inputs)
        with ExitStack() as stack:
            stack.enter_context(self._weights(final))
            known = {role for role, stored in stream.outputs.items() if batch < len(stored)}
            if final and self._activations is not None:
                # First, so that inputs are seen as they are computed with.
                unread = {earlier for role in known for earlier in (role, *_BEFORE[role])}
                for name in dict.fromkeys(part.module for role, part in self.parts.items() if role not in unread):
                    handles.append(self.modules[name].register_forward_pre_hook(self._activations.hook(name)))
            for role, part in self.parts.items():
                if role in inputs or role == stop_before:
                    handles.append(self.modules[part.module].register_forward_pre_hook(before(role)))
                if role in outputs or role == stop_after:
                    handles.append(self.modules[part.module].register_forward_hook(after(role)))
            for role in known:  # the others are what this pass is to find out
                self._skip(stack, role, stream.outputs[role][batch].to(self.place))
            stack.enter_context(handled_by(handler))
            stack.enter_context(cached_by(self._kept if final else None))
            try:
                result = self._block(stream.hidden[batch].to(self.place), **self._arguments)
                hidden = result[0] if isinstance(result, tuple) else result
            except Stop:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        return Taps(seen_inputs, seen_outputs, hidden)

    def _skip(self, stack: ExitStack, role: str, known: Tensor) -> None:
        """Until `stack` ends, attention (`o`) or the MLP (`down`) puts out what is known; nothing before it runs."""
        if role in self._norms:
            stack.enter_context(_replaced(self._norms[role], _identity))
        if role in self._owners:
            # transformers' attention hands out its weights too, which nobody reads.
            stack.enter_context(_replaced(self._owners[role], _constant((known, None) if role == "o" else known)))
            return
        stack.enter_context(_replaced(self.modules[self.parts[role].module], _constant(known)))
        for earlier in _BEFORE[role]:
            if earlier in self.parts:
                module = self.modules[self.parts[earlier].module]
                stack.enter_context(_replaced(module, _empty_output(module)))

    def output(self, role: str, x: Tensor) -> Tensor:
        """What a settled projection with a module of its own puts out for an input."""
        module = self.parts[role].module
        return nn.functional.linear(x.to(self.place), self._final[module], self.modules[module].bias)


def _owner(block: nn.Module, module: nn.Module) -> nn.Module:
    """The part of a block that holds a module."""
    return next(part for part in block.modules() if any(child is module for child in part.children()))


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    if "forward" in module.__dict__:  # several projections of one module
        yield
        return
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _identity(x: Tensor) -> Tensor:
    return x


def _constant(known: Any) -> Callable[..., Any]:
    return lambda *_, **__: known


def _empty_output(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], module.out_features)

    return forward
