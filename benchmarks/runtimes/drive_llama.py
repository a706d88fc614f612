"""A GGUF file, run by llama.cpp as xllamacpp builds it, through the server that is all it offers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import xllamacpp  # type: ignore[import-not-found]  # (in an environment of its own)
from numpy.typing import NDArray

from benchmarks.runtimes.process import main

_CONTEXT = 2048
_ALL = 1 << 20  # more than any vocabulary has
_FORCED = 260  # any token that is whole text; without one the server leaves its probabilities out


class LlamaEngine:
    """llama.cpp's own times, which leave the server's work out; its first token belongs to the prompt's time."""

    def __init__(self, model: Path, threads: int) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = _CONTEXT, 1, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(parameters)
        flags = [part.split("=")[0].strip() for part in xllamacpp.get_system_info().split("|") if "= 1" in part]
        self.notes = [f"built for {', '.join(flag.removeprefix('CPU : ') for flag in flags)}", "memory includes Python"]

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[int, int, int]:
        request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
        answer = self._server.handle_completions({**request, "cache_prompt": False})
        times = answer["timings"]
        if times["prompt_n"] != len(prompt) or times["predicted_n"] != new_tokens:
            raise RuntimeError(f"it did other work than it was asked for: {times}")
        return round(times["prompt_ms"] * 1e6), round(times["predicted_ms"] * 1e6), new_tokens

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        return np.stack([self._next(tokens[: place + 1]) for place in range(len(tokens))])

    def _next(self, tokens: list[int]) -> NDArray[np.float32]:
        """Log-probabilities of all tokens, before any sampling."""
        request = {"prompt": tokens, "n_predict": 1, "temperature": 0, "cache_prompt": True, "n_probs": _ALL}
        answer = self._server.handle_completions({**request, "logit_bias": [[_FORCED, 1000.0]]})
        listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = np.full(len(listed), -np.inf, np.float32)
        for entry in listed:
            found[entry["id"]] = max(entry["logprob"], -1e4)
        if not np.isfinite(found).all() or not math.isclose(float(np.exp(found).sum()), 1.0, rel_tol=1e-2):
            raise RuntimeError("it did not give the probability of every token")
        return found


if __name__ == "__main__":
    main(LlamaEngine)
