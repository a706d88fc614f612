"""A model whose blocks are not in memory: each is read from the safetensors files while it is worked on, then let go.

Embedding, last norm and head stay in memory. A block that runs reads its own weights first, so that the model can be
called like any other; whoever needs a block for longer holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from toolchain.entry import decoder_layers
from toolchain.loading.shards import Stored
from toolchain.loading.sound import check_finite

_ATTRIBUTE = "boa_edge_blocks"
# A model that takes up a larger part of the machine's memory in float32 is streamed: it is there twice while it is
# evaluated, once with quantized weights.
_LARGEST_SHARE = 1 / 8


class Dequantizable(Protocol):
    """What stands for a weight."""

    def dequantize(self) -> Tensor: ...


# The number of a block and its parameters by full name -> the same parameters, transformed.
BlockTransform = Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]


class StreamedBlocks:
    """The blocks of a model, on the meta device while nobody needs them.

    Args:
        model: everything but its blocks is in memory.
        stored: where each parameter is, by its full name.

    Attributes:
        modules: full names of all modules inside blocks.
        live: blocks whose weights are in memory, and by how many they are held.
    """

    def __init__(self, model: nn.Module, stored: Mapping[str, Stored]) -> None:
        self._stored = stored
        self._layers = list(decoder_layers(model))
        names = {id(module): name for name, module in model.named_modules()}
        self._prefixes = [f"{names[id(layer)]}." for layer in self._layers]
        self._meta = [dict(layer.named_parameters()) for layer in self._layers]
        self.modules = {names[id(part)] for layer in self._layers for part in layer.modules()}
        self.live: dict[int, int] = {}
        self._replaced: Mapping[str, Dequantizable] = {}
        self._transforms: list[BlockTransform] = []
        # Vectors of blocks that have been transformed: they are asked for one by one, and are small.
        self._vectors: dict[str, Tensor] = {}
        setattr(model, _ATTRIBUTE, self)
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._taking(index))
            layer.register_forward_hook(self._letting_go(index), always_call=True)

    def _taking(self, index: int) -> Any:
        def hook(layer: nn.Module, *_: Any) -> None:
            if "forward" not in layer.__dict__:  # otherwise somebody stands in for the block
                self._take(index)

        return hook

    def _letting_go(self, index: int) -> Any:
        def hook(layer: nn.Module, *_: Any) -> None:
            if "forward" not in layer.__dict__:
                self._let_go(index)

        return hook

    def _take(self, index: int) -> None:
        self.live[index] = self.live.get(index, 0) + 1
        if self.live[index] > 1:
            return
        values = self._values(index)
        for name in self._meta[index]:
            self._put(index, name, nn.Parameter(values.pop(self._prefixes[index] + name), requires_grad=False))

    def _let_go(self, index: int) -> None:
        self.live[index] -= 1
        if self.live[index] == 0:
            del self.live[index]
            for name, parameter in self._meta[index].items():
                self._put(index, name, parameter)

    def _put(self, index: int, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self._layers[index].get_submodule(owner), leaf, parameter)

    def _values(self, index: int) -> dict[str, Tensor]:
        """What a block computes with, by full name."""
        values = {}
        for name in self._names(index):
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and module in self._replaced:
                values[name] = self._replaced[module].dequantize()
        rest = [name for name in self._names(index) if name not in values]
        if self._transforms and any(name not in self._vectors for name in rest):
            block = self._transformed(index)
            return values | {name: block[name] for name in rest}
        return values | {name: self.read(name) for name in rest}

    def _names(self, index: int) -> list[str]:
        return [self._prefixes[index] + name for name in self._meta[index]]

    def _transformed(self, index: int) -> dict[str, Tensor]:
        values: Mapping[str, Tensor] = {name: read_tensor(self._stored[name].file, name) for name in self._names(index)}
        for transform in self._transforms:
            values = transform(index, values)
        self._vectors |= {name: value.clone() for name, value in values.items() if value.ndim == 1}
        return dict(values)

    def read(self, name: str) -> Tensor:
        """A parameter in float32, as the file has it or, in a block, after the transformations."""
        index = next((index for index, prefix in enumerate(self._prefixes) if name.startswith(prefix)), None)
        if index is None or not self._transforms:
            return read_tensor(self._stored[name].file, name)
        return self._vectors[name].clone() if name in self._vectors else self._transformed(index)[name]

    def transform(self, function: BlockTransform) -> None:
        """From now on, the blocks are what `function` makes of them, after those before it."""
        assert not self.live
        self._transforms.append(function)
        self._vectors = {}

    @contextmanager
    def held(self, index: int) -> Iterator[None]:
        """Inside, the weights of block `index` are in memory."""
        self._take(index)
        try:
            yield
        finally:
            self._let_go(index)

    @contextmanager
    def replaced(self, weights: Mapping[str, Dequantizable]) -> Iterator[None]:
        """Inside, modules named in `weights` compute with these."""
        assert not self.live
        before, self._replaced = self._replaced, weights
        try:
            yield
        finally:
            self._replaced = before


def streamed_blocks(model: nn.Module) -> StreamedBlocks | None:
    """The blocks of a model that is not in memory as a whole; None for one that is."""
    return getattr(model, _ATTRIBUTE, None)


def is_large(stored: Mapping[str, Stored]) -> bool:
    """Whether these weights are too large for this machine's memory to be handled freely."""
    numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
    return 4 * numbers > _LARGEST_SHARE * psutil.virtual_memory().total


def load_streamed(directory: Path, stored: Mapping[str, Stored]) -> nn.Module | None:
    """The model of a directory with its blocks on disk; None where files and modules name weights differently.

    What is not in blocks is read at once. The blocks' hooks read the rest.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if set(model.state_dict()) != known or not set(stored) <= known or not set(parameters) <= set(stored):
        return None
    if any(tuple(parameter.shape) != stored[name].shape for name, parameter in parameters.items()):
        return None
    blocks = StreamedBlocks(model, stored)
    for name in parameters:
        owner, _, leaf = name.rpartition(".")
        if owner not in blocks.modules:
            setattr(model.get_submodule(owner), leaf, nn.Parameter(blocks.read(name), requires_grad=False))
    model.tie_weights()
    return model.eval()


def read_tensor(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file in float32, in memory of its own; nothing of the file stays mapped.

    Raises:
        BoaEdgeError: it is not finite.
    """
    with safe_open(file, framework="pt") as stream:
        value: Tensor = stream.get_tensor(name).to(torch.float32, copy=True)
    check_finite(name, value, file)
    return value
