"""
Ctrl-C and Ctrl-Break, which have to wake a reactor that sleeps.

Windows calls a handler in a thread that it makes for each console control event, and
such an event ends no sleep.  CPython's own handler would run after a handler of this
package: the loop would be woken, find nothing to do, and sleep again.  So the handler
of this package calls CPython's, and wakes the loop afterwards.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Protocol

from twisted_rtsig.windows import calls as windows


class Sleeper(Protocol):
    """A notifier that can be woken from any thread."""

    def wake(self) -> None:
        """End the wait under way, or else the next one."""


class _Console:
    """Wakes sleepers at Ctrl-C and Ctrl-Break."""

    def __init__(self) -> None:
        self._sleepers: list[Sleeper] = []
        self._handler = windows.ConsoleHandler(self.handle)

    def add(self, sleeper: Sleeper) -> None:
        if not self._sleepers:
            windows.set_console_handler(self._handler, True)
        self._sleepers.append(sleeper)

    def discard(self, sleeper: Sleeper) -> None:
        with contextlib.suppress(ValueError):
            self._sleepers.remove(sleeper)
            if not self._sleepers:
                windows.set_console_handler(self._handler, False)

    def handle(self, event: int) -> bool:
        """
        Called by Windows, in a thread of its own.

        :return: whether no other handler is to be called.
        """
        if event == windows.CTRL_C_EVENT:
            number = signal.SIGINT
        elif event == windows.CTRL_BREAK_EVENT:
            number = getattr(signal, "SIGBREAK", signal.SIGINT)
        else:
            return False
        if not callable(signal.getsignal(number)):
            # Windows takes its default action.
            return False
        signal.raise_signal(number)
        for sleeper in list(self._sleepers):
            sleeper.wake()
        return True


console = _Console()
"""The console control events of this process arrive here."""
