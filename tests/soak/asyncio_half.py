"""
The half of the soak's server that is asyncio's, where the reactor has its event loop:
connections, children, threads, signals and cancellations of asyncio's, and children of
Twisted's among them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from typing import Any

from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from tests.soak import pattern


class Half:
    """
    A server that answers commands, one a line, in order.

    :param reactor: a reactor with an asyncio event loop.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._loop: asyncio.AbstractEventLoop = reactor._asyncioEventloop
        # What waits for the next signal.
        self._waiting: list[asyncio.Future[None]] = []
        # Commands that have set the handler, and have not come to their end.
        self._signalling = 0

    async def listen(self) -> Any:
        """Its address."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return server.sockets[0].getsockname()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        commands = {
            b"TAKE": self._take,
            b"CHILD": self._child,
            b"SPAWN": self._spawn,
            b"THREAD": self._thread,
            b"SIGNAL": self._signal,
            b"CANCEL": self._cancel,
        }
        while line := await reader.readline():
            verb, _, argument = line.strip().partition(b" ")
            answer = await commands[verb](reader, int(argument))
            writer.write(b"%s\n" % answer)
            await writer.drain()
        writer.close()

    async def _take(self, reader: asyncio.StreamReader, size: int) -> bytes:
        """The digest of what comes."""
        return _digest(await reader.readexactly(size))

    async def _child(self, reader: asyncio.StreamReader, size: int) -> bytes:
        """The digest of what a child of asyncio's gives back."""
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec("cat", stdin=pipe, stdout=pipe)
        output, _ = await child.communicate(pattern(0, size))
        return _digest(output)

    async def _spawn(self, reader: asyncio.StreamReader, status: int) -> bytes:
        """The exit status of a child of Twisted's."""
        ended: asyncio.Future[int] = self._loop.create_future()
        script = ["sh", "-c", f"exit {status}"]
        self._reactor.spawnProcess(Ending(ended), "/bin/sh", script)
        return b"%d" % await ended

    async def _thread(self, reader: asyncio.StreamReader, size: int) -> bytes:
        """A digest by a thread, which asks both the loop and the reactor in between."""
        loop = self._loop
        asked = loop.create_future()

        def work() -> bytes:
            loop.call_soon_threadsafe(asked.set_result, None)
            return _digest(pattern(0, size))

        called = loop.create_future()
        self._reactor.callInThread(
            self._reactor.callFromThread, called.set_result, None
        )
        digest = await loop.run_in_executor(None, work)
        await asked
        await called
        return digest

    async def _signal(self, reader: asyncio.StreamReader, number: int) -> bytes:
        """Comes back after a signal, for which it has set a handler."""
        loop = self._loop
        came: asyncio.Future[None] = loop.create_future()
        self._waiting.append(came)
        self._signalling += 1
        loop.add_signal_handler(signal.SIGUSR1, self._on_signal)
        await loop.run_in_executor(None, os.kill, os.getpid(), signal.SIGUSR1)
        await came
        self._signalling -= 1
        if not self._signalling:
            loop.remove_signal_handler(signal.SIGUSR1)
        return b"%d" % number

    def _on_signal(self) -> None:
        # Signals that come at the same time are one.
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.set_result(None)

    async def _cancel(self, reader: asyncio.StreamReader, number: int) -> bytes:
        """Counts the tasks that were cancelled in the middle of what they did."""
        tasks = [asyncio.create_task(self._wait()) for _ in range(number)]
        await asyncio.sleep(0.001)
        for each in tasks:
            each.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        return b"%d" % sum(isinstance(e, asyncio.CancelledError) for e in outcomes)

    async def _wait(self) -> None:
        child = await asyncio.create_subprocess_exec(
            "cat", stdin=asyncio.subprocess.PIPE
        )
        try:
            await asyncio.sleep(60)
        finally:
            child.kill()
            await child.wait()


class Ending(ProcessProtocol):
    """Tells a future the exit status of a child."""

    def __init__(self, ended: asyncio.Future[int]) -> None:
        self._ended = ended

    def processEnded(self, reason: Failure) -> None:
        status: Any = reason.value
        self._ended.set_result(status.exitCode or 0)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
