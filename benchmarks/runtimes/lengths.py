"""Of the ExecuTorch programs of others, as in our own: positions of the cache, and the most tokens of one call."""

CONTEXT, PREFILL = 2048, 128
