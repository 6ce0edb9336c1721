"""The names by which other code knows Twisted's reactors that sleep in a poller."""

from __future__ import annotations

from typing import Any

from twisted_rtsig.engine.reactor import EngineReactor


class PollingReactor(EngineReactor):
    """
    A reactor that is a subclass of Twisted's poll or epoll reactor as well.

    It is one for code that asks for the class, and uses nothing of it.  It has two of
    its private attributes: ``doPoll``, and ``_poller``, whose ``poll`` is the sleep of
    the reactor.  A wrapper may replace ``_poller``, to measure how long the reactor
    sleeps.
    """

    def doPoll(self, timeout: float | None) -> None:
        """As ``doIteration``."""
        self.doIteration(timeout)

    @property
    def _poller(self) -> Any:
        notifier: Any = self._notifier
        return notifier.poller

    @_poller.setter
    def _poller(self, poller: Any) -> None:
        notifier: Any = self._notifier
        notifier.poller = poller
