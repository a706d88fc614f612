"""Tiny models of every family, made and loaded once per file of tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.toolchain.families import make
from toolchain.loading import SourceModel, load_source


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    def get(family: str) -> Path:
        path = root / family
        return path if path.exists() else make(path, family)

    return get


@pytest.fixture(scope="module")
def source(directory: Callable[[str], Path]) -> Callable[[str], SourceModel]:
    """Loaded models in float64; no test changes them."""
    known: dict[str, SourceModel] = {}

    def get(family: str) -> SourceModel:
        if family not in known:
            known[family] = load_source(str(directory(family)))
            known[family].model.double()
        return known[family]

    return get
