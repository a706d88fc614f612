"""boa-edge: from a language model to a measured bundle on a phone.

The stages have the same names here as on the command line:

    from boa_edge import quantize, export, measure, evaluate, devices
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "devices", "evaluate", "export", "measure", "quantize"]

_STAGES = {
    "quantize": ("toolchain.quantize", "quantize"),
    "export": ("exporters", "export"),
    "measure": ("runtime_tests", "measure"),
    "evaluate": ("runtime_tests.evaluate", "evaluate"),
    "devices": ("devices", "list_devices"),
}


def __getattr__(name: str) -> Any:
    """Import a stage when it is first asked for: torch takes seconds, `--help` should not."""
    if name not in _STAGES:
        raise AttributeError(name)
    from importlib import import_module

    module, attribute = _STAGES[name]
    return getattr(import_module(module), attribute)
