"""Files of the user's that are no JSON are one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b'{"a": ' + b"1" * 5000 + b"}", b"[" * 200_000])
def test_what_is_no_json_is_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(BoaEdgeError, match=r"report\.json: the report is not valid JSON \(") as error:
        read_json(path, "the report")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
