"""
The reactor of this package for the system at hand: edge-triggered epoll on Linux,
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

# By the beginning of sys.platform.
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
    The class of the reactor for this system.

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
    A new reactor for this system.

    :raises UnsupportedReactorError: if there is none, or if it cannot run here.
        The message says why; nothing else is tried instead.
    """
    return reactor_class()()


def install() -> None:
    """
    Make the reactor for this system the one of this process, and log which it is.

    Raises what :func:`make_reactor` does.
    """
    reactor = make_reactor()
    installReactor(reactor)
    _log.info("The reactor is {name}", name=type(reactor).__name__)


__all__ = ["install", "make_reactor", "reactor_class"]
