"""Read a report that `measure` wrote."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json
from runtime_tests.model import Report

REPORT = "report.json"
_VERSION = Report.model_fields["schema_version"].default


def read_report(path: Path) -> Report:
    """The report in a directory, or in the file itself.

    Raises:
        BoaEdgeError: nothing there, not JSON, another schema version, or a field that the schema does not allow.
    """
    where = path / REPORT if path.is_dir() else path
    document = read_json(where, "the report")
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != _VERSION:
        found = f"has schema version {version!r}, this program reads {_VERSION}"
        raise BoaEdgeError(found, where=where, fix="Name a directory that `boa-edge measure` wrote")
    try:
        return Report.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BoaEdgeError(f"field '{field}': {first['msg']}", where=where, fix="Measure the bundle again") from None
