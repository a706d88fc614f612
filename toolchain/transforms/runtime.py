"""The products that stay in the running model, as hooks, and R3 as an attention function.

R3 is computed where attention is, on the keys that the cache hands out: what is kept turned, per token, comes to the
same. Inside `toolchain.entry.own_attention` it is left out; it changes neither scores nor their derivatives there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from boa_edge.errors import UsageError
from toolchain.families import DecoderSpec
from toolchain.statistics.attention import ATTENTION
from toolchain.transforms.base import Transform
from toolchain.transforms.product import OnlineProduct
from toolchain.transforms.rotate_table import RotateTable
from toolchain.transforms.smooth import Smooth

_TURNED_ATTENTION = "boa_edge_turned"
_PRODUCT = "boa_edge_query_key_product"
_TRANSFORMS = "boa_edge_transforms"


class Runtime:
    """Hooks of `install_runtime`, to be taken off again."""

    def __init__(self, undo: Sequence[Callable[[], None]]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        """Take them off; a second time does nothing."""
        while self._undo:
            self._undo.pop()()


def check_transforms(spec: DecoderSpec, transforms: Sequence[Transform]) -> None:
    """Raises BoaEdgeError where the transforms do not go with the model, or not after each other in this order."""
    seen: set[str] = set()
    for transform in transforms:
        transform.check(spec)
        kind = transform.kind.removesuffix("_learned")
        if kind in seen and kind in ("r1", "r3", "r4", RotateTable.kind):
            raise UsageError(f"{kind} comes twice", where="transforms", fix="Keep one")
        if kind == "r1" and RotateTable.kind in seen:
            problem = f"r1 comes after {RotateTable.kind}, which turns the table as it is in the end"
            raise UsageError(problem, where="transforms", fix="Put r1 first")
        if isinstance(transform, Smooth) and "r4" in seen and any(pair == "up_down" for _, pair in transform.scales):
            problem = "smooth up_down comes after r4, which mixes the channels between up and down"
            raise UsageError(problem, where="transforms", fix="Smooth first")
        seen.add(kind)


def transforms_of(model: nn.Module) -> tuple[Transform, ...]:
    """The transforms that a model in memory has gone through or runs, in order."""
    return getattr(model, _TRANSFORMS, ())


def online_products(spec: DecoderSpec, transforms: Sequence[Transform]) -> list[OnlineProduct]:
    """Every product that the running model computes besides its own: what exporters write down.

    In the order in which they are computed where several stand at one place: what a later transform has done to a table
    is undone first.
    """
    found = [transform.products(spec) for transform in transforms]
    outputs = [product for products in reversed(found) for product in products if product.place == "output"]
    return [*outputs, *(product for products in found for product in products if product.place != "output")]


def turns_of(model: nn.Module, spec: DecoderSpec) -> dict[int, OnlineProduct]:
    """R3 by layer, where the model has it."""
    products = online_products(spec, transforms_of(model))
    return {one.layer: one for one in products if one.place == "query_key" and one.layer is not None}


def install_runtime(model: nn.Module, spec: DecoderSpec, transforms: Sequence[Transform]) -> Runtime:
    """Have a model whose weights are transformed compute the products that belong to them.

    Args:
        model: a causal language model of `transformers`; it is changed in place, until the handle's `remove`.
        transforms: all that its weights have gone through; those without products need nothing.

    Raises:
        BoaEdgeError: they do not go with the model, or with those it runs already.
    """
    before = transforms_of(model)
    check_transforms(spec, [*before, *transforms])
    setattr(model, _TRANSFORMS, (*before, *transforms))
    undo: list[Callable[[], None]] = [lambda: setattr(model, _TRANSFORMS, before)]
    products = online_products(spec, transforms)
    # Hooks of outputs go before those that a model has already, so the last of them first.
    for product in reversed(products):
        if product.place == "output":
            hook = model.get_submodule(product.module).register_forward_hook(_after(product), prepend=True)
            undo.append(hook.remove)
    for product in products:
        module = model.get_submodule(product.module)
        if product.place == "output":
            continue
        if product.place == "input":
            undo.append(module.register_forward_pre_hook(_before(product)).remove)
        else:
            setattr(module, _PRODUCT, product)
            undo.append(lambda module=module: delattr(module, _PRODUCT))  # type: ignore[misc]
    if any(product.place == "query_key" for product in products):
        config: Any = model.config
        implementation = config._attn_implementation
        config._attn_implementation = _TURNED_ATTENTION
        undo.append(lambda: setattr(config, "_attn_implementation", implementation))
    return Runtime(undo)


def _after(product: OnlineProduct) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda _module, _inputs, output: product(output)


def _before(product: OnlineProduct) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _module, inputs: (product(inputs[0]), *inputs[1:])


def turned(module: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H or G, L, hd] as the attention in `module` compares them: after R3, where there is one."""
    product: OnlineProduct | None = getattr(module, _PRODUCT, None)
    return (query, key) if product is None else (product(query), product(key))


def _turned_attention(
    module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    return ALL_ATTENTION_FUNCTIONS[ATTENTION](module, *turned(module, query, key), *rest, **arguments)


AttentionInterface.register(_TURNED_ATTENTION, _turned_attention)
AttentionMaskInterface.register(_TURNED_ATTENTION, eager_mask)
