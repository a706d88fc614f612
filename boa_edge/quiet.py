"""Silences what libraries print on their own: a command's output is its own."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Before the first import of torch or transformers: no banners, bars or advice from them."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("torchao", "torch.utils._pytree", "transformers", "onnx_ir", "onnxscript", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def quiet_transformers() -> None:
    """Imports transformers and silences its progress bars, which no variable does."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
