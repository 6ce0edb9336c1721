"""
A server with its own twistd command.

    cd examples/twistd_plugin
    PYTHONPATH=. twistd --reactor=rtsig-auto -n greeter --listen tcp:7777
    telnet 127.0.0.1 7777

``twisted/plugins/greeter_plugin.py`` registers the command.
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
        ["listen", "l", "tcp:7777:interface=127.0.0.1", "the endpoint to listen on"],
        ["grace", "g", 10.0, "how many seconds clients have to finish", float],
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
    """Return the service that twistd runs."""
    # Imported here, when twistd has installed the chosen reactor.
    from twisted.internet import reactor

    endpoint = serverFromString(reactor, options["listen"])
    return CoroutineService(
        endpoint, greet, grace=options["grace"], max_connections=1000
    )
