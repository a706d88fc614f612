"""Benchmarks, each a command of its own. What libraries say on their own is silenced before the first is imported."""

from boa_edge.quiet import quiet_libraries

quiet_libraries()
