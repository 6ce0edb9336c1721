"""Reports of the task that blocks the reactor."""

from __future__ import annotations

import math
import sys
import threading
import time
from typing import Any

from twisted.logger import Logger

from twisted_rtsig.coro.inspection import in_words, stack_of_running
from twisted_rtsig.coro.scheduler import cancel_call, running, scheduler_for

_log = Logger()

# The number of looks within the allowed time.
_LOOKS = 4


class watch_for_blocking:
    """
    Log the name and the stack of a task that has blocked the reactor for some time; or
    the stack of another function that has.

    A thread watches the reactor.  This must be called in the reactor's thread.

    :param seconds: how long the reactor may be blocked.
    :param reactor: an ``IReactorTime`` and ``IReactorCore`` provider; by default the
        reactor of the calling task, or the installed reactor.
    :raises ValueError: if the time is not more than 0.
    """

    def __init__(self, seconds: float = 1.0, reactor: object = None) -> None:
        if not seconds > 0:
            raise ValueError(f"cannot watch for {seconds} seconds: it must be more")
        self._seconds = seconds
        self._reactor = scheduler_for(reactor).reactor
        self._watched = threading.get_ident()
        # The time of the reactor's last turn; infinite before the first turn.
        self._last_turn = math.inf
        self._over = threading.Event()
        self._call: Any = self._reactor.callLater(0, self._turn)
        self._reactor.addSystemEventTrigger("during", "shutdown", self.stop)
        thread = threading.Thread(target=self._look, name="blocking tasks", daemon=True)
        thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()
        cancel_call(self._call)
        self._call = None

    def _turn(self) -> None:
        self._last_turn = time.monotonic()
        self._call = self._reactor.callLater(self._seconds / _LOOKS, self._turn)

    def _look(self) -> None:
        told = math.inf
        while not self._over.wait(self._seconds / _LOOKS):
            last_turn = self._last_turn
            late = time.monotonic() - last_turn
            # Report each block once.
            if late > self._seconds * (1 + 1 / _LOOKS) and told != last_turn:
                told = last_turn
                self._tell(late)

    def _tell(self, late: float) -> None:
        task = running.task
        frame = sys._current_frames().get(self._watched)
        if frame is None:
            return
        _log.warn(
            "{what} has blocked the reactor for {late:.1f} s:\n{stack}",
            what="Code outside of tasks" if task is None else f"Task {task.name}",
            late=late,
            stack="\n".join(
                f"    at {line}" for line in in_words(stack_of_running(frame))
            ),
        )
