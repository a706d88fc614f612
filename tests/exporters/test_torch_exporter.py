"""Another way to a graph, from PyTorch's own exporter: slow and of float weights, and it has to say the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.exporters.conftest import Tiny

MakeTiny = Callable[..., Tiny]


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, position_ids=position_ids, use_cache=False).logits
        return logits


@pytest.mark.filterwarnings("ignore")
def test_both_forms_agree_with_the_graph_that_pytorch_exports(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(bits=4, group_size=32)
    length = {1: torch.export.Dim("length", min=2, max=64)}
    ids = torch.arange(8)[None]
    program = torch.onnx.export(
        _Logits(tiny.model()),
        (ids, ids.clone()),  # not one tensor twice: the exporter would take them for one input
        dynamo=True,
        verbose=False,
        dynamic_shapes={"input_ids": length, "position_ids": length},
    )
    assert program is not None
    program.save(str(tmp_path / "torch.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "torch.onnx"), providers=["CPUExecutionProvider"])
    tokens = np.arange(24)[None] * 5 % tiny.checkpoint.spec.vocab_size
    places = np.arange(24)[None]
    expected = session.run(None, {"input_ids": tokens, "position_ids": places})[0]
    for form in ("qdq", "fused"):
        logits = tiny.decoder(tmp_path / form, "float32", form).logits(tokens)
        assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()
