"""
A server with a command of its own for twistd.

    cd examples/twistd_plugin
    PYTHONPATH=. twistd --reactor=rtsig-auto -n greeter --listen tcp:7777
    telnet 127.0.0.1 7777

``twisted/plugins/greeter_plugin.py`` tells twistd of it.
"""

from __future__ import annotations

from typing import ClassVar

from twisted.application.service import IService
from twisted.internet.endpoints import serverFromString
from twisted.python import usage

from twisted_rtsig.coro import CoroutineService, IncompleteRead, Stream, timeout


class Options(usage.Options):
    """The arguments of the command."""

    optParameters: ClassVar[list[list[object]]] = [
        ["listen", "l", "tcp:7777:interface=127.0.0.1", "where, as an endpoint"],
        ["grace", "g", 10.0, "how many seconds clients have when it stops", float],
    ]


async def greet(stream: Stream) -> None:
    await stream.write(b"What is your name?\n")
    try:
        with timeout(60):
            name = await stream.read_line(max_bytes=100)
    except (TimeoutError, IncompleteRead):
        return
    await stream.write(b"Hello, %b!\n" % name)


def makeService(options: Options) -> IService:
    """What twistd runs."""
    # Only now, when twistd has installed the reactor that it was told to.
    from twisted.internet import reactor

    endpoint = serverFromString(reactor, options["listen"])
    return CoroutineService(
        endpoint, greet, grace=options["grace"], max_connections=1000
    )
