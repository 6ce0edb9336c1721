"""
An echo server as a Twisted application.

    PORT=7777 twistd --reactor=rtsig-auto -noy examples/echo_service.tac
    telnet 127.0.0.1 7777

On SIGTERM or Ctrl-C it stops listening, echoes what it has received, and ends.
"""

from __future__ import annotations

import os

from twisted.application.service import Application
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ServerEndpoint

from twisted_rtsig.coro import CoroutineService, Stream, select


async def echo(stream: Stream) -> None:
    while True:
        reading = stream.read()
        chosen, data = await select(reading, stream.stopping)
        if chosen is stream.stopping or not data:
            reading.cancel()
            return
        await stream.write(data)


port = int(os.environ.get("PORT", "7777"))
endpoint = TCP4ServerEndpoint(reactor, port, interface="127.0.0.1")

# twistd runs the object of this name.
application = Application("echo")
service = CoroutineService(endpoint, echo, grace=10, max_connections=1000)
service.setServiceParent(application)
