"""The task `text-generation`, where a directory is a checkpoint of boa-edge; anything else goes to optimum's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from boa_edge_optimum import Checkpoint, is_checkpoint

from ..task_registry import register_task
from .causal_lm import load_causal_lm_model  # registers its own under this name first


@register_task("text-generation")
def load_text_generation(model_name_or_path: str, **kwargs: Any) -> Any:
    """What the recipe lowers; arguments as in `load_causal_lm_model`."""
    path = Path(model_name_or_path) / kwargs.get("subfolder", "")
    load = partial(load_causal_lm_model, model_name_or_path, **kwargs)
    return Checkpoint(path, kwargs, load) if is_checkpoint(path) else load()
