"""Fetches and builds what the devices need: `python -m devices.provision` is a step of `make setup`.

System packages, the runtimes' ARM64 libraries, and the runners. Whatever is there already is left alone.
"""

from __future__ import annotations

import sys

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from devices import binaries, tools
from devices.registry import list_devices


def provision() -> None:
    """Bring every device of the package to `usable`. BoaEdgeError says what could not be had."""
    tools.provide(tools.SETUP_TOOLS)
    for runner in binaries.RUNNERS.values():
        runner.wheel.fetch_arm64()
        binaries.build(runner, "host")
        binaries.build(runner, "aarch64")
    for status in list_devices():
        say(f"device {status.name}: {'ready' if status.usable else '; '.join(status.missing)}")


def provision_tests() -> None:
    """Fetch what only the tests use. What cannot be had is said; the tests that need it skip themselves."""
    for tool in tools.TEST_TOOLS:
        try:
            tools.provide([tool])
        except BoaEdgeError as error:
            say(f"note: without {tool.purpose}: {error}")


def main(arguments: list[str]) -> int:
    """`--tests` sets up what only the tests use. Returns the exit code."""
    try:
        if arguments == ["--tests"]:
            provision_tests()
        elif not arguments:
            provision()
        else:
            say(f"usage: python -m devices.provision [--tests], not {' '.join(arguments)}")
            return 2
    except BoaEdgeError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
