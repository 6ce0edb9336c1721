"""
Log lines that tell of an exceeded limit.

A stranger can exceed each limit as often as it likes, so the log lines are limited as
well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

# How many seconds lie between two log lines about the same limit.
_QUIET: Final = 60.0


class Notice:
    """
    Logs that a limit was exceeded: the first time at once, and then at most once a
    minute, with the number of times in the meantime.

    :param log: a method of a ``twisted.logger.Logger``.
    :param message: the format of the log line.
    """

    def __init__(self, log: Callable[..., object], message: str) -> None:
        self._log = log
        self._message = message
        self._told_at: float | None = None
        self._untold = 0

    def tell(self, now: float, **values: object) -> None:
        """
        The limit was exceeded.

        :param now: the time by ``IReactorTime.seconds``; that clock may be set back.
        """
        if self._told_at is not None and 0 <= now - self._told_at < _QUIET:
            self._untold += 1
            return
        message = self._message
        if self._untold:
            message += " ({untold} more since the last such message)"
        self._log(message, untold=self._untold, **values)
        self._told_at = now
        self._untold = 0
