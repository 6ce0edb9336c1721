"""
The kqueue reactor, for BSD and macOS.

Install it before anything imports ``twisted.internet.reactor``::

    from twisted_rtsig import kqreactor
    kqreactor.install()

or by its short name: ``twistd --reactor=rtsig-kqueue web``.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.main import installReactor

from twisted_rtsig.engine.processes import reap
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.notifiers import explain_lack_of_descriptors
from twisted_rtsig.notifiers.kqueue import KQueueNotifier
from twisted_rtsig.notifiers.kqueue_calls import KernelCalls, native_calls


class KQueueReactor(EngineReactor):
    """
    A reactor that gets events from kqueue.

    :param calls: kqueue(2) and kevent(2), for tests; None for those of the system.
    :raises twisted_rtsig.notifiers.UnsupportedReactorError: on other systems than BSD
        and macOS, or if no descriptors are left for a reactor.
    """

    def __init__(self, calls: KernelCalls | None = None) -> None:
        with explain_lack_of_descriptors():
            self._kqueue = KQueueNotifier(native_calls() if calls is None else calls)
            super().__init__(self._kqueue)

    def installWaker(self) -> None:
        """Make a pipe that wakes the loop, if kqueue itself cannot."""
        if not self._kqueue.can_wake:
            super().installWaker()

    def wakeUp(self) -> None:
        """End the sleep of the reactor, from any thread."""
        if self._kqueue.can_wake:
            self._kqueue.wake()
        else:
            super().wakeUp()

    def _watch_child(self, child: Any) -> None:
        self._kqueue.watch_exit(child.pid, _EndOfChild(self, child))


class _EndOfChild:
    """The callback that the notifier calls when a child ends, until it is reaped."""

    def __init__(self, reactor: KQueueReactor, child: Any) -> None:
        self._reactor = reactor
        self._child = child
        self._can_be_reaped = True

    def __call__(self) -> bool:
        """
        Reap the child outside of the wait.

        :return: whether another call may be needed.
        """
        if self._child.pid is None or not self._can_be_reaped:
            return False
        self._reactor.callLater(0, self._reap)
        return True

    def _reap(self) -> None:
        self._can_be_reaped = reap(self._child)


def install() -> None:
    """
    Install the kqueue reactor.

    :raises twisted_rtsig.notifiers.UnsupportedReactorError: as :class:`KQueueReactor`
        does.
    """
    installReactor(KQueueReactor())


__all__ = ["KQueueReactor", "install"]
