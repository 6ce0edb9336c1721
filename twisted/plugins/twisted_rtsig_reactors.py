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


_ON_LINUX = sys.platform.startswith("linux")
_WITH_KQUEUE = hasattr(select, "kqueue")
_ON_WINDOWS = sys.platform == "win32"

_DESCRIPTIONS = {
    "rtsig": "Linux realtime signals: the kernel queues each event",
    "rtsig-epoll": "Linux epoll, edge-triggered, under the same engine",
    "rtsig-kqueue": "BSD and macOS kqueue, under the same engine",
    "rtsig-iocp": "Windows completion port, for sockets of any kind and number",
    "rtsig-asyncio": "One loop for Twisted and asyncio, at the speed of the engine",
}


def _reactor(name: str, module: str, needs: str, here: bool) -> Reactor | _NotHere:
    description = f"{_DESCRIPTIONS[name]} (twisted-rtsig)."
    reactor = Reactor(name, f"twisted_rtsig.{module}", description)
    return reactor if here else _NotHere(reactor, needs)


rtsig = _reactor("rtsig", "rtsigreactor", "Linux", _ON_LINUX)
rtsig_epoll = _reactor("rtsig-epoll", "epollreactor", "Linux", _ON_LINUX)
rtsig_kqueue = _reactor("rtsig-kqueue", "kqreactor", "BSD or macOS", _WITH_KQUEUE)
rtsig_iocp = _reactor("rtsig-iocp", "iocpreactor", "Windows", _ON_WINDOWS)
rtsig_asyncio = _reactor(
    "rtsig-asyncio", "asyncioreactor", "Linux, BSD or macOS", not _ON_WINDOWS
)
rtsig_auto = Reactor(
    "rtsig-auto",
    "twisted_rtsig.autoreactor",
    "The reactor of twisted-rtsig for this system.",
)

__all__ = [
    "rtsig",
    "rtsig_asyncio",
    "rtsig_auto",
    "rtsig_epoll",
    "rtsig_iocp",
    "rtsig_kqueue",
]
