"""Calibration data sets by name, as `optimum` offers them; the data come from the hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from toolchain.text import behind, opening

DATASETS = ("wikitext2", "c4", "c4-new")


def dataset_sequences(name: str, tokenizer: Any, count: int, length: int, seed: int, split: str) -> Tensor:
    """Random windows of a data set, int64 [count, length], each behind what the tokenizer puts before a text; `split`
    is `train` or `validation`.

    Raises:
        BoaEdgeError: the hub cannot be reached and the data are not in the cache.
    """
    from optimum.gptq.data import get_dataset

    say(f"loading calibration data {name} ({split})")
    first = opening(tokenizer)
    try:
        rows = get_dataset(name, tokenizer, nsamples=count, seqlen=length - len(first), seed=seed, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        fix = "Check the network, give a text file, or use --calibration self"
        raise BoaEdgeError(f"cannot be loaded ({reason})", where=f"data set {name}", fix=fix) from None
    return behind(first, torch.cat([row["input_ids"] for row in rows]))
