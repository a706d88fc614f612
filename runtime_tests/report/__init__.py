"""`report.html`: one file that needs nothing else, neither a network nor a script; `report.md`, for pull requests."""

from runtime_tests.report.markdown import to_markdown
from runtime_tests.report.page import render

__all__ = ["render", "to_markdown"]
