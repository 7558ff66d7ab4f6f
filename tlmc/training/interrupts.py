"""Ctrl-C, and the SIGTERM that schedulers send, in the midst of a training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tlmc.errors import Interrupted


class _Signal(KeyboardInterrupt):
    """An interrupt that knows the signal it came from."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def heeded() -> Iterator[None]:
    """Let SIGTERM interrupt the block as Ctrl-C does, so that what it keeps on an interrupt is kept then, too.

    Only where SIGTERM would end the process, and only in the main thread, where Python handles signals.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _Signal(number)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave further interrupts aside for the moment that it takes to save: an impatient second Ctrl-C, a launcher's."""
    if not _in_main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            # None is a handler that was not set from Python, which cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def interrupted(error: BaseException, sentence: str) -> Interrupted:
    """Return the interrupt that was caught, as a sentence."""
    return Interrupted(sentence, getattr(error, "number", signal.SIGINT))


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
