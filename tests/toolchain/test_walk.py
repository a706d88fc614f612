"""Which calibration text is used for what, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from toolchain import distributed
from toolchain.loading import SourceModel, load_source
from toolchain.methods import METHODS
from toolchain.options import Options
from toolchain.spill import Spill
from toolchain.walk import Texts

EDGE = METHODS["edge"].options
assert EDGE is not None
USES = ("all", "recorded", "followed", "kept apart")


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> SourceModel:
    return load_source(str(tiny_model))


def uses(source: SourceModel, options: Options, batches: int) -> dict[str, list[float]]:
    """The batches of this rank by what becomes of them, each known by its first number."""
    tokens = torch.arange(batches).repeat_interleave(2)[:, None].expand(-1, 8)
    with torch.inference_mode():
        text = Texts(source, tokens, None, options, Spill())
    every = [float(hidden[0, 0, 0]) for hidden in text._text.hidden]
    followed = [] if text._reference is None else [float(hidden[0, 0, 0]) for hidden in text._reference.hidden]
    unseen = text._unseen(("q", "k"))
    assert not text._unseen(("o",))
    return dict(zip(USES, (every, every[: text._recorded], followed, [every[index] for index in unseen]), strict=True))


@pytest.mark.parametrize(
    ("changes", "batches", "expected"),
    [
        ({}, 40, (40, 16, 32, 1)),
        ({"attention_sequences": None}, 40, (40, 40, 32, 2)),
        ({"attention_sequences": 16, "compared_sequences": 8}, 40, (40, 8, 4, 1)),
        ({"compared_sequences": 2, "deviation": 0.0, "residual": 0.0}, 40, (40, 16, 0, 1)),
        ({"safety_net": False}, 40, (40, 16, 32, 0)),
        ({}, 3, (3, 3, 3, 0)),
    ],
)
def test_every_number_of_ranks_uses_the_same_text(
    source: SourceModel,
    changes: dict[str, object],
    batches: int,
    expected: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert EDGE is not None
    options = EDGE.model_copy(update=changes)
    alone = uses(source, options, batches)
    assert tuple(len(alone[use]) for use in USES) == expected
    assert len(set(alone["all"])) == batches
    assert set(alone["recorded"]) <= set(alone["followed"]) or set(alone["followed"]) <= set(alone["recorded"])
    for ranks in (2, 3):
        together: dict[str, list[float]] = {use: [] for use in USES}
        for rank in range(ranks):
            monkeypatch.setattr(distributed, "world_size", lambda ranks=ranks: ranks)
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            for use, found in uses(source, options, batches).items():
                together[use] += found
        monkeypatch.undo()
        assert {use: sorted(found) for use, found in together.items()} == {
            use: sorted(found) for use, found in alone.items()
        }
