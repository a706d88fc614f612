"""Measure a bundle on a device, compare it with what it was made from, and write a report that can be trusted."""

from runtime_tests.figure import Figure
from runtime_tests.measuring import measure, measure_together
from runtime_tests.model import Report
from runtime_tests.settings import Wishes
from runtime_tests.summary import print_summary

__all__ = ["Figure", "Report", "Wishes", "measure", "measure_together", "print_summary"]
