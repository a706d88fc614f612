from __future__ import annotations

from pathlib import Path

import pytest
from tiny_decoder import write_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose model takes milliseconds."""
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
