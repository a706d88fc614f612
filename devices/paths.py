"""Where the project keeps what it fetched or built: one private directory that can be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PROFILES = PACKAGE / "profiles"
RUNNER_SOURCES = PACKAGE / "runner"


def cache_directory() -> Path:
    """`$BOA_EDGE_CACHE`, else `.cache` of the checkout, else the user's cache directory; not created here."""
    chosen = os.environ.get("BOA_EDGE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    root = PACKAGE.parent
    if (root / "pyproject.toml").is_file():
        return root / ".cache"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "boa-edge"
