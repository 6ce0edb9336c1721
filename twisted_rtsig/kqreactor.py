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
from twisted_rtsig.notifiers import UnsupportedReactorError
from twisted_rtsig.notifiers.kqueue import KQueueNotifier
from twisted_rtsig.notifiers.kqueue_calls import KernelCalls, native_calls


class KQueueReactor(EngineReactor):
    """
    A reactor that is told of events by kqueue.

    :param calls: kqueue(2) and kevent(2), for tests.  None takes the system's.
    :raises twisted_rtsig.notifiers.UnsupportedReactorError: elsewhere than on
        BSD and macOS, or where the system has no descriptors left for a reactor.
    """

    def __init__(self, calls: KernelCalls | None = None) -> None:
        try:
            self._kqueue = KQueueNotifier(native_calls() if calls is None else calls)
            super().__init__(self._kqueue)
        except OSError as error:
            raise UnsupportedReactorError(
                f"the system has no descriptors left for a reactor ({error})"
            ) from error

    def installWaker(self) -> None:
        """Make a pipe to wake the loop by, where kqueue has nothing for that."""
        if not self._kqueue.can_wake:
            super().installWaker()

    def wakeUp(self) -> None:
        """See ``IReactorFromThreads``: end the sleep, from any thread."""
        if self._kqueue.can_wake:
            self._kqueue.wake()
        else:
            super().wakeUp()

    def _watch_child(self, child: Any) -> None:
        self._kqueue.watch_exit(child.pid, _EndOfChild(self, child))


class _EndOfChild:
    """What kqueue calls when a child ends, until the child was reaped."""

    def __init__(self, reactor: KQueueReactor, child: Any) -> None:
        self._reactor = reactor
        self._child = child
        self._can_be_reaped = True

    def __call__(self) -> bool:
        """Reap it outside of the wait; whether that may take another call."""
        if self._child.pid is None or not self._can_be_reaped:
            return False
        self._reactor.callLater(0, self._reap)
        return True

    def _reap(self) -> None:
        self._can_be_reaped = reap(self._child)


def install() -> None:
    """
    Make the kqueue reactor the one of this process.

    Raises what :class:`KQueueReactor` does.
    """
    installReactor(KQueueReactor())


__all__ = ["KQueueReactor", "install"]
