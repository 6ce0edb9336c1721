"""The short names of this package's reactors, for ``twistd`` and ``trial``."""

import select
import sys

from twisted.application.reactors import IReactorInstaller, Reactor
from twisted.plugin import IPlugin
from zope.interface import implementer


@implementer(IPlugin, IReactorInstaller)
class _NotHere:
    """
    A reactor for other systems.

    ``--help-reactors`` lists it as not available, with the reason.  Choosing it raises
    ``UnsupportedReactorError``, which says what to use instead.
    """

    def __init__(self, reactor: Reactor, needs: str) -> None:
        self.shortName = reactor.shortName
        self.description = reactor.description
        self.install = reactor.install
        self._needs = needs

    @property
    def moduleName(self) -> str:
        # --help-reactors imports this module to see whether it can be imported.
        raise ImportError(f"it needs {self._needs}, and this is {sys.platform}")


rtsig: Reactor | _NotHere = Reactor(
    "rtsig",
    "twisted_rtsig.rtsigreactor",
    "Linux realtime signals: the kernel queues each event (twisted-rtsig).",
)

rtsig_epoll: Reactor | _NotHere = Reactor(
    "rtsig-epoll",
    "twisted_rtsig.epollreactor",
    "Linux epoll, edge-triggered, under the same engine (twisted-rtsig).",
)

rtsig_kqueue: Reactor | _NotHere = Reactor(
    "rtsig-kqueue",
    "twisted_rtsig.kqreactor",
    "BSD and macOS kqueue, under the same engine (twisted-rtsig).",
)

rtsig_iocp: Reactor | _NotHere = Reactor(
    "rtsig-iocp",
    "twisted_rtsig.iocpreactor",
    "Windows completion port, for sockets of any kind and number (twisted-rtsig).",
)

rtsig_asyncio: Reactor | _NotHere = Reactor(
    "rtsig-asyncio",
    "twisted_rtsig.asyncioreactor",
    "One loop for Twisted and asyncio, at the speed of the engine (twisted-rtsig).",
)

rtsig_auto = Reactor(
    "rtsig-auto",
    "twisted_rtsig.autoreactor",
    "The reactor of twisted-rtsig for this system.",
)

if not sys.platform.startswith("linux"):
    rtsig = _NotHere(rtsig, "Linux")
    rtsig_epoll = _NotHere(rtsig_epoll, "Linux")
if not hasattr(select, "kqueue"):
    rtsig_kqueue = _NotHere(rtsig_kqueue, "BSD or macOS")
if sys.platform == "win32":
    rtsig_asyncio = _NotHere(rtsig_asyncio, "Linux, BSD or macOS")
else:
    rtsig_iocp = _NotHere(rtsig_iocp, "Windows")

__all__ = [
    "rtsig",
    "rtsig_asyncio",
    "rtsig_auto",
    "rtsig_epoll",
    "rtsig_iocp",
    "rtsig_kqueue",
]
