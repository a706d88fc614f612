"""SIGTERM and SIGHUP end a command as Ctrl-C does: children are ended, what was half-made goes, one line says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Signalled(KeyboardInterrupt):
    """A signal that asks the program to end. `exit_code` is a shell's for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def as_interrupts() -> Iterator[None]:
    """Raise the first of them as `Signalled`; later ones are let pass, so that nothing interrupts the cleaning up.

    One that is ignored stays so (`nohup`). Of threads, only the main one can be told.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def tell(number: int, _: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            raise Signalled(number)

    before = {each: signal.getsignal(each) for each in _ENDING}
    taken = [each for each, handler in before.items() if handler == signal.SIG_DFL]
    for each in taken:
        signal.signal(each, tell)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
