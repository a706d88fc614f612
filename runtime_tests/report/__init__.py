"""`report.html`: one file that needs nothing else, neither a network nor a script."""

from runtime_tests.report.page import render

__all__ = ["render"]
