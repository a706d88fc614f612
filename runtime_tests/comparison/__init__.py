"""Two reports side by side, the noise of both taken into account; conditions on the changes, for a team's CI."""

from runtime_tests.comparison.comparing import Comparison, compare
from runtime_tests.comparison.table import print_comparison

__all__ = ["Comparison", "compare", "print_comparison"]
