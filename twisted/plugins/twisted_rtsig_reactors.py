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

rtsig_kqueue = Reactor(
    "rtsig-kqueue",
    "twisted_rtsig.kqreactor",
    "BSD and macOS kqueue, under the same engine (twisted-rtsig).",
)

rtsig_iocp = Reactor(
    "rtsig-iocp",
    "twisted_rtsig.iocpreactor",
    "Windows completion port, for sockets of any kind and number (twisted-rtsig).",
)

rtsig_auto = Reactor(
    "rtsig-auto",
    "twisted_rtsig.autoreactor",
    "The reactor of twisted-rtsig for this system.",
)

__all__ = ["rtsig", "rtsig_auto", "rtsig_epoll", "rtsig_iocp", "rtsig_kqueue"]
