"""The published JSON Schema of `report.json`, made from the report's classes.

`python -m runtime_tests.schema` writes `runtime_tests/report.schema.json` anew; a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from boa_edge.files import read_json, write_json
from runtime_tests.model import Report

SCHEMA_PATH = Path(__file__).with_name("report.schema.json")


def make_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of schema version 1."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:boa-edge:report:1",
        **Report.model_json_schema(mode="validation"),
    }


def published_schema() -> dict[str, Any]:
    """The schema as it is shipped."""
    document = read_json(SCHEMA_PATH, "the report's schema")
    assert isinstance(document, dict)
    return document


if __name__ == "__main__":
    write_json(SCHEMA_PATH, make_schema())
