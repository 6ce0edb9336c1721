"""
The realtime-signals reactor, for Linux.

Install it before anything imports ``twisted.internet.reactor``::

    from twisted_rtsig import rtsigreactor
    rtsigreactor.install()

or by its short name: ``twistd --reactor=rtsig web``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from twisted.internet.main import installReactor

from twisted_rtsig.engine.polling import PollingReactor
from twisted_rtsig.notifiers import explain_lack_of_descriptors
from twisted_rtsig.notifiers.signal_queue import choose_signal

if sys.platform.startswith("linux"):
    from twisted.internet.pollreactor import PollReactor
else:
    # Not every system has poll(2), and making the reactor fails here.
    PollReactor = object

if TYPE_CHECKING:
    from twisted_rtsig.notifiers.realtime_signals import RealtimeSignalNotifier


def _notifier(signal_number: int | None) -> RealtimeSignalNotifier:
    # This fails on other systems than Linux.  There the import below would fail with an
    # error that does not tell the user what to do.
    chosen = choose_signal(signal_number)
    from twisted_rtsig.notifiers.realtime_signals import RealtimeSignalNotifier

    return RealtimeSignalNotifier(chosen)


class RealtimeSignalReactor(PollingReactor, PollReactor):
    """
    A reactor that gets events from queued realtime signals.

    :param signal_number: the realtime signal to use.  None is the one that the
        environment variable ``TWISTED_RTSIG_SIGNAL`` names (a number, or
        ``SIGRTMIN+n``), or else the first that nothing in this process uses.
    :raises twisted_rtsig.notifiers.UnsupportedReactorError: if realtime signals do not
        work here; the message says why and what to use instead.
    """

    def __init__(self, signal_number: int | None = None) -> None:
        with explain_lack_of_descriptors():
            super().__init__(_notifier(signal_number))


def install(signal_number: int | None = None) -> None:
    """
    Install the realtime-signals reactor.

    :param signal_number: as of :class:`RealtimeSignalReactor`.
    :raises twisted_rtsig.notifiers.UnsupportedReactorError: as
        :class:`RealtimeSignalReactor` does.
    """
    installReactor(RealtimeSignalReactor(signal_number))


__all__ = ["RealtimeSignalReactor", "install"]
