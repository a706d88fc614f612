"""Ours and other runtimes side by side, in one run on one machine: speed, load time, memory, size, KL to the original.

    python -m benchmarks.runtimes --checkpoint DIR --text test.txt -o docs/benchmarks

Every run is a process of its own and every contender runs once a round, so that what else the machine does meets all of
them. All have the same prompt, lengths and threads. Programs and KLs are kept in the work directory by what decides
them, times until the report is written, so that a run that is stopped goes on where it stopped. Writes runtimes.json,
runtimes.md and runtimes.svg/.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.identity import own_version
from benchmarks.runtimes.bench import Benchmark, chosen
from benchmarks.runtimes.report import write_report
from boa_edge.errors import BoaEdgeError
from boa_edge.quiet import quiet_libraries, quiet_transformers

_ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """The command line."""
    arguments = parse(sys.argv[1:])
    quiet_libraries()
    quiet_transformers()
    try:
        benchmark = Benchmark(arguments, chosen(arguments.contenders), own_version())
        report = benchmark.run()
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_report(arguments.output, report)
        benchmark.finish()
    except BoaEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps({"rows": len(report.rows), "output": str(arguments.output)}, separators=(",", ":")))


def parse(words: list[str]) -> argparse.Namespace:
    """The request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="the source model of the checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="made of it; none: the default recipe, with --calibration")
    parser.add_argument("--calibration", help="text file, or a data set's name")
    parser.add_argument("--text", type=Path, required=True, help="held-out text file, for the prompt and the KL")
    parser.add_argument("--contenders", default="", help="only those whose label has one of these, comma-separated")
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--prompt", type=_count, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=_count, default=64)
    parser.add_argument("--threads", type=_count, default=1)
    parser.add_argument(
        "--repeats", type=_count, default=3, help="generations of a process, after one that is not timed"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, for the KL; 0: none is measured")
    parser.add_argument("--length", type=_count, default=512, help="of a sequence of it")
    parser.add_argument("--again", action="store_true", help="take all times anew, those of a stopped run too")
    cache = Path(os.environ.get("BOA_EDGE_CACHE") or _ROOT / ".cache").expanduser().absolute()
    parser.add_argument(
        "--work", type=Path, default=cache / "bench-runtimes", help="where programs and figures are kept"
    )
    parser.add_argument("--environments", type=Path, default=cache / "peers", help="where other runtimes are installed")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args(words)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    main()
