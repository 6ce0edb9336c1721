"""
The reactor of this package for the current system: edge-triggered epoll on Linux,
kqueue on BSD and macOS, a completion port on Windows.

Install it before anything imports ``twisted.internet.reactor``::

    import twisted_rtsig
    twisted_rtsig.install()

or by its short name: ``twistd --reactor=rtsig-auto web``.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from twisted.internet.main import installReactor
from twisted.logger import Logger

from twisted_rtsig.notifiers import UnsupportedReactorError

_log = Logger()

# The keys are prefixes of sys.platform.
_REACTORS = {
    "linux": ("twisted_rtsig.epollreactor", "EdgeEPollReactor"),
    "win32": ("twisted_rtsig.iocpreactor", "CompletionPortReactor"),
    "darwin": ("twisted_rtsig.kqreactor", "KQueueReactor"),
    "dragonfly": ("twisted_rtsig.kqreactor", "KQueueReactor"),
    "freebsd": ("twisted_rtsig.kqreactor", "KQueueReactor"),
    "netbsd": ("twisted_rtsig.kqreactor", "KQueueReactor"),
    "openbsd": ("twisted_rtsig.kqreactor", "KQueueReactor"),
}


def reactor_class() -> Any:
    """
    Return the class of the reactor for this system.

    :raises UnsupportedReactorError: if there is none.
    """
    for system, (module, name) in _REACTORS.items():
        if sys.platform.startswith(system):
            return getattr(importlib.import_module(module), name)
    raise UnsupportedReactorError(
        f"this package has no reactor for {sys.platform}; use --reactor=poll, or "
        "--reactor=select where there is no poll"
    )


def make_reactor() -> Any:
    """
    Make a reactor for this system.

    :raises UnsupportedReactorError: if there is none, or if it cannot run here.  The
        message says why.  No other reactor is tried instead.
    """
    return reactor_class()()


def install() -> None:
    """
    Install the reactor for this system, and log which it is.

    :raises UnsupportedReactorError: as :func:`make_reactor` does.
    """
    reactor = make_reactor()
    installReactor(reactor)
    _log.info("The reactor is {name}", name=type(reactor).__name__)


__all__ = ["install", "make_reactor", "reactor_class"]
