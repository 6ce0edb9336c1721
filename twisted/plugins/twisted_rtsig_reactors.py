"""The short names of this package's reactors, for ``twistd`` and ``trial``."""

from twisted.application.reactors import Reactor

rtsig = Reactor(
    "rtsig",
    "twisted_rtsig.rtsigreactor",
    "Linux realtime signals: the kernel queues each event (twisted-rtsig).",
)

rtsig_epoll = Reactor(
    "rtsig-epoll",
    "twisted_rtsig.epollreactor",
    "Linux epoll, edge-triggered, under the same engine (twisted-rtsig).",
)

__all__ = ["rtsig", "rtsig_epoll"]
