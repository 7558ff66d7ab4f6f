"""Processes that tests interrupt."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """Undo, as ``preexec_fn``, that background jobs of a shell, the test run perhaps, hand on an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
