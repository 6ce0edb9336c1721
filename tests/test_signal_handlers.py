"""
What a signal handler asks for is done at once, wherever it interrupts the loop on its
way to sleep.

A signal cannot be sent at a chosen line.  So a trace function does what a handler would
do, at each line from the timers to the sleep.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from tests.support import DEADLINE, Recorder, RecorderFactory, Watcher, reactor_classes
from twisted_rtsig.engine.reactor import EngineReactor

if sys.platform == "win32" or not reactor_classes():
    pytest.skip("it is for Linux, BSD and macOS", allow_module_level=True)

from tests.test_asyncioreactor import MakeReactor, make
from twisted_rtsig.asyncio_support.selector import EngineSelector
from twisted_rtsig.asyncioreactor import AsyncioEngineReactor

assert make  # A fixture.

LOOP = {
    EngineReactor._pass.__code__,
    EngineReactor._send_queued.__code__,
    EngineSelector._run_passes.__code__,
}


class Interruption:
    """
    Calls a function at one line of the loop, or when the loop sleeps.

    :ivar slept: whether it was called as late as in the sleep.
    """

    def __init__(
        self,
        reactor: EngineReactor,
        function: Callable[[], object],
        send: Callable[[], object],
    ) -> None:
        self._sleep = type(reactor._notifier).wait.__code__
        self._send = send
        self._function = function
        self.slept = False

    def arm(self, lines: int) -> None:
        """Interrupt after a number of lines.  Before, there is something to send."""
        self._send()
        self._left = lines
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code in LOOP:
                frame.f_trace = self._trace
            frame = frame.f_back
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "call" and frame.f_code is self._sleep:
            self.slept = True
            self._interrupt()
        elif event == "line":
            self._left -= 1
            if self._left < 0:
                self._interrupt()
        return self._trace if frame.f_code in LOOP else None

    def _interrupt(self) -> None:
        sys.settrace(None)
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frame.f_trace = None
            frame = frame.f_back
        self._function()


def interrupt_everywhere(
    reactor: EngineReactor,
    peer: socket.socket,
    function: Callable[[], object],
    send: Callable[[], object],
) -> None:
    """
    Interrupt at each line, one after the other, with a function that lets the peer
    receive one byte.

    :param send: lets another transport send.
    """
    interruption = Interruption(reactor, function, send)
    received = []

    def receive() -> None:
        try:
            lines = 0
            while not interruption.slept:
                reactor.callFromThread(interruption.arm, lines)
                received.append(peer.recv(2))
                lines += 1
        finally:
            reactor.callFromThread(reactor.stop)

    thread = threading.Thread(target=receive)
    reactor.callWhenRunning(thread.start)
    reactor.run(installSignalHandlers=False)
    thread.join()
    assert interruption.slept
    assert received == [b"x"] * len(received)
    assert len(received) > 10


@pytest.mark.parametrize("by", ["write", "addReader"])
def test_a_handler_of_a_signal_interrupts_the_reactor(
    reactor: EngineReactor, by: str
) -> None:
    factory = RecorderFactory(Recorder)
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    address = ("127.0.0.1", port.getHost().port)
    with (
        socket.create_connection(address, DEADLINE) as peer,
        socket.create_connection(address, DEADLINE),
    ):
        while len(factory.connections) < 2:
            reactor.iterate(0.01)
        transport: Any
        further: Any
        transport, further = (each.transport for each in factory.connections)
        one, other = socket.socketpair()
        with one, other:
            one.send(b"input")
            watcher = Watcher(reactor, other.fileno())

            def read() -> None:
                reactor.removeReader(watcher)
                transport.write(b"x")

            watcher.on_read = read
            function = (
                (lambda: transport.write(b"x"))
                if by == "write"
                else (lambda: reactor.addReader(watcher))
            )
            interrupt_everywhere(reactor, peer, function, lambda: further.write(b"y"))


def test_a_handler_of_a_signal_interrupts_the_loop_of_asyncio(
    make: MakeReactor,
) -> None:
    reactor: AsyncioEngineReactor = make()
    loop: Any = reactor._asyncioEventloop

    async def connect() -> tuple[Any, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            peer = socket.create_connection(listening.getsockname(), DEADLINE)
            ours, _ = listening.accept()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        return transport, peer

    transport, peer = loop.run_until_complete(connect())
    further, other = loop.run_until_complete(connect())
    with peer, other:
        interrupt_everywhere(
            *(reactor, peer), lambda: transport.write(b"x"), lambda: further.write(b"y")
        )
    for each in (transport, further):
        each.abort()
    loop.run_until_complete(asyncio.sleep(0))
