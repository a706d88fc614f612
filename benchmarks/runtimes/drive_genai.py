"""A directory with a genai_config.json, run by onnxruntime-genai."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime_genai as genai
from numpy.typing import NDArray

from benchmarks.runtimes.process import main


class GenaiEngine:
    """The official client's own loop."""

    def __init__(self, model: Path, threads: int) -> None:
        config = genai.Config(str(model))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = genai.Model(config)
        self.notes = ["memory includes Python"]

    def _generator(self, length: int) -> Any:
        parameters = genai.GeneratorParams(self._model)
        # The least length keeps it from stopping at an end-of-sequence token.
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        return genai.Generator(self._model, parameters)

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[int, int, int]:
        generator = self._generator(len(prompt) + new_tokens)
        start = time.monotonic_ns()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        ids = [int(generator.get_next_tokens()[0])]
        first = time.monotonic_ns()
        while len(ids) < new_tokens:
            generator.generate_next_token()
            ids.append(int(generator.get_next_tokens()[0]))
        return first - start, time.monotonic_ns() - first, len(ids)

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        generator = self._generator(len(tokens) + 1)
        generator.append_tokens(tokens)
        every = np.asarray(generator.get_output("logits"), np.float32)
        if every.shape[1] == len(tokens):
            return every[0]
        generator, rows = self._generator(len(tokens) + 1), []  # a graph that gives the last position's only
        for token in tokens:
            generator.append_tokens([token])
            rows.append(np.array(generator.get_logits(), np.float32).reshape(-1))
        return np.stack(rows)


if __name__ == "__main__":
    main(GenaiEngine)
