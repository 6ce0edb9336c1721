"""
The edge-triggered epoll reactor, for Linux.

Install it before anything imports ``twisted.internet.reactor``::

    from twisted_rtsig import epollreactor
    epollreactor.install()

or by its short name: ``twistd --reactor=rtsig-epoll web``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from twisted.internet.main import installReactor

from twisted_rtsig.engine.polling import PollingReactor
from twisted_rtsig.notifiers import UnsupportedReactorError, explain_lack_of_descriptors

if sys.platform.startswith("linux"):
    from twisted.internet.epollreactor import EPollReactor
else:
    # Twisted's module cannot be imported here, and making the reactor fails.
    EPollReactor = object

if TYPE_CHECKING:
    from twisted_rtsig.notifiers.edge_epoll import EdgeEPollNotifier


def _notifier() -> EdgeEPollNotifier:
    # On other systems the import below would fail with an error that does not tell the
    # user what to do.
    if not sys.platform.startswith("linux"):
        raise UnsupportedReactorError(
            f"epoll exists on Linux only, and this is {sys.platform}; use "
            "--reactor=poll, or --reactor=select where there is no poll"
        )
    from twisted_rtsig.notifiers.edge_epoll import EdgeEPollNotifier

    return EdgeEPollNotifier()


class EdgeEPollReactor(PollingReactor, EPollReactor):
    """
    A reactor that gets events from edge-triggered epoll.

    :raises twisted_rtsig.notifiers.UnsupportedReactorError: on other systems than
        Linux, or if no descriptors are left for a reactor.
    """

    def __init__(self) -> None:
        with explain_lack_of_descriptors():
            super().__init__(_notifier())


def install() -> None:
    """
    Install the edge-triggered epoll reactor.

    :raises twisted_rtsig.notifiers.UnsupportedReactorError: as
        :class:`EdgeEPollReactor` does.
    """
    installReactor(EdgeEPollReactor())


__all__ = ["EdgeEPollReactor", "install"]
