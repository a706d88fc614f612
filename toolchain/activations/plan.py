"""Which linears of a model meet quantized activations, and how: a checkpoint stores it, an exporter carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from boa_edge.errors import BoaEdgeError
from toolchain.activations import SCHEMES, ActivationFormat, Range, simulate

SCHEMA_VERSION = 1


@dataclass
class _Last:
    """The last input, since projections that share one follow each other."""

    x: Tensor | None = None
    key: tuple[int | None, Range | None] | None = None
    quantized: Tensor | None = None


@dataclass(frozen=True)
class ActivationPlan:
    """The precision of every quantized linear's inputs.

    Attributes:
        format: of those that are quantized.
        group_sizes: of the weights that they meet, by module name; these modules and no others are quantized.
        kept: modules among them whose inputs stay in floating point.
        ranges: smallest and largest calibrated value by module, for static schemes.
    """

    format: ActivationFormat
    group_sizes: Mapping[str, int | None]
    kept: frozenset[str] = frozenset()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    _last: _Last = field(default_factory=lambda: _Last(), init=False, repr=False, compare=False)

    def keeping(self, modules: Iterable[str]) -> ActivationPlan:
        """The same with other exceptions."""
        return replace(self, kept=frozenset(modules))

    def of(self, modules: Iterable[str]) -> ActivationPlan:
        """The same for these modules alone."""
        return replace(self, group_sizes={name: self.group_sizes[name] for name in modules if name in self.group_sizes})

    def applies_to(self, module: str) -> bool:
        """Whether the inputs of `module` are quantized."""
        return module in self.group_sizes and module not in self.kept

    def apply(self, module: str, x: Tensor) -> Tensor:
        """x float32 [..., in] as `module` gets to see it."""
        if not self.applies_to(module):
            return x
        key = (self.group_sizes[module], self.ranges.get(module))
        if self._last.x is not x or self._last.key != key:
            quantized = simulate(x, self.format, group_size=key[0], static_range=key[1])
            self._last.x, self._last.key, self._last.quantized = x, key, quantized
        assert self._last.quantized is not None
        return self._last.quantized

    def hook(self, module: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        """A forward pre-hook that quantizes the first argument of `module`."""

        def quantize(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self.apply(module, arguments[0]), *arguments[1:])

        return quantize

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` computes with quantized activations."""
        handles = [
            model.get_submodule(name).register_forward_pre_hook(self.hook(name))
            for name in self.group_sizes
            if self.applies_to(name)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last.x = self._last.quantized = None

    def to_document(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema_version": SCHEMA_VERSION,
            "scheme": self.format.scheme,
            "bits": self.format.bits,
            "group_sizes": dict(self.group_sizes),
            "kept": sorted(self.kept),
            "ranges": {name: list(each) for name, each in self.ranges.items()},
        }

    @classmethod
    def from_document(cls, document: Any, where: object) -> ActivationPlan:
        """Raises BoaEdgeError naming the field that is wrong."""
        try:
            scheme, kept = str(document["scheme"]), frozenset(map(str, document["kept"]))
            sizes = {str(name): None if size is None else int(size) for name, size in document["group_sizes"].items()}
            ranges = {str(name): (float(low), float(high)) for name, (low, high) in document["ranges"].items()}
            plan = cls(ActivationFormat(scheme, int(document["bits"])), sizes, kept, ranges)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"is not an activation plan ({type(error).__name__}: {error})"
            raise BoaEdgeError(problem, where=where, fix="Quantize the model again") from None
        if unknown := kept - sizes.keys():
            raise BoaEdgeError(f"kept: {sorted(unknown)[0]!r} is no module of group_sizes", where=where)
        if SCHEMES[scheme].needs_range and (missing := sizes.keys() - kept - ranges.keys()):
            raise BoaEdgeError(f"ranges: none for {sorted(missing)[0]!r}, which {scheme} needs", where=where)
        return plan
