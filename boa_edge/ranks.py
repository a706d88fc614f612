"""Which of the processes that `torchrun` has started this one is; nothing is imported to know it."""

from __future__ import annotations

import os


def launched_rank() -> int | None:
    """This process's rank; None where it was started alone."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    return int(os.environ["RANK"])


def is_silent() -> bool:
    """Whether another process speaks for this one."""
    return launched_rank() not in (None, 0)
