"""
The part of asyncio in the server of the soak test, on a reactor that is an asyncio
event loop as well: servers with and without TLS, children, threads, signals and
cancellations.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import ssl
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure

from tests.soak import CHUNK, pattern

IDLE_TIMEOUT = 10.0

_LOST = (OSError, EOFError, asyncio.TimeoutError, ssl.SSLError)


class Complaints(logging.Handler):
    """Reports the warnings and errors that asyncio logs."""

    def __init__(self, errors: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self._errors(f"{record.name}: {self.format(record)}")


class Ending(ProcessProtocol):
    """Gives the exit status of a child to a future."""

    def __init__(self, ended: asyncio.Future[int]) -> None:
        self._ended = ended

    def processEnded(self, reason: Failure) -> None:
        status: Any = reason.value
        self._ended.set_result(status.exitCode or 0)


class AsyncioSide:
    """
    The servers of asyncio.

    :param errors: called with the text of each fault.
    :ivar connections: the number of open connections.
    """

    def __init__(self, reactor: Any, errors: Callable[[str], None]) -> None:
        self._reactor = reactor
        self._loop: asyncio.AbstractEventLoop = reactor._asyncioEventloop
        self._errors = errors
        self.connections = 0
        self._servers: list[asyncio.Server] = []
        # The futures of commands that wait for SIGUSR1.
        self._waiters: list[asyncio.Future[None]] = []
        self._commands: dict[bytes, Callable[[int], Awaitable[bytes]]] = {
            b"CHILD": self.child,
            b"EXIT": self.exit,
            b"THREAD": self.thread,
            b"SIGNAL": self.signal,
            b"HANDLER": self.handler,
            b"CANCEL": self.cancel,
            b"KILL": self.kill,
            b"SPAWN": self.spawn,
            b"TWISTED": self.twisted,
        }

    async def start(self, certificate: Path, key: Path) -> dict[str, Any]:
        """
        Listen.

        :return: the addresses.
        """
        logging.getLogger("asyncio").addHandler(Complaints(self._errors))
        self._loop.add_signal_handler(signal.SIGUSR1, self._signalled)
        self._one_handler = asyncio.Lock()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        addresses = {}
        for name, secure in (("asyncio", None), ("asyncio tls", context)):
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=secure)
            self._servers.append(server)
            addresses[name] = server.sockets[0].getsockname()
        self._address = addresses["asyncio"]
        return addresses

    def tasks(self) -> int:
        return len(asyncio.all_tasks(self._loop))

    def timers(self) -> int:
        scheduled: list[asyncio.TimerHandle] = vars(self._loop)["_scheduled"]
        return sum(not each.cancelled() for each in scheduled)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        try:
            with contextlib.suppress(*_LOST):
                await self._answer(reader, writer)
        finally:
            self.connections -= 1
            writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while line := await asyncio.wait_for(reader.readline(), IDLE_TIMEOUT):
            verb, *arguments = line.rstrip(b"\n").split(b" ")
            if verb == b"ECHO":
                answer = line.rstrip(b"\n")
            elif verb == b"TAKE":
                answer = await self.take(reader, int(arguments[0]))
            elif verb == b"SEND":
                for start in range(0, int(arguments[0]), CHUNK):
                    size = min(CHUNK, int(arguments[0]) - start)
                    writer.write(pattern(start, size))
                    await asyncio.wait_for(writer.drain(), IDLE_TIMEOUT)
                continue
            elif verb in self._commands:
                answer = await self._commands[verb](int(arguments[0]))
            else:
                return
            writer.write(answer + b"\n")
            await asyncio.wait_for(writer.drain(), IDLE_TIMEOUT)

    async def take(self, reader: asyncio.StreamReader, size: int) -> bytes:
        """Receive ``size`` bytes, and answer with their digest."""
        digest = hashlib.sha256()
        while size:
            data = await asyncio.wait_for(reader.read(min(size, CHUNK)), IDLE_TIMEOUT)
            if not data:
                raise EOFError
            size -= len(data)
            digest.update(data)
        return digest.hexdigest().encode()

    async def child(self, size: int) -> bytes:
        """Pass data through ``cat``, and answer with the digest of its output."""
        cat = await asyncio.create_subprocess_exec("cat", stdin=PIPE, stdout=PIPE)
        output, _ = await cat.communicate(pattern(0, size))
        return hashlib.sha256(output).hexdigest().encode()

    async def exit(self, status: int) -> bytes:
        """The exit status of a child."""
        child = await asyncio.create_subprocess_exec(
            *("sh", "-c", f"exit {status}"), stdin=DEVNULL
        )
        return b"%d" % await child.wait()

    async def thread(self, size: int) -> bytes:
        """Answer with a digest that a thread makes, which calls the loop meanwhile."""

        async def answer() -> int:
            await asyncio.sleep(0.001)
            return size

        def work() -> str:
            asked = asyncio.run_coroutine_threadsafe(answer(), self._loop)
            return hashlib.sha256(pattern(0, asked.result())).hexdigest()

        return (await self._loop.run_in_executor(None, work)).encode()

    async def signal(self, number: int) -> bytes:
        """Wait for a signal to this process."""
        self._waiters.append(self._loop.create_future())
        os.kill(os.getpid(), signal.SIGUSR1)
        await self._waiters[-1]
        return b"%d" % number

    def _signalled(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def handler(self, number: int) -> bytes:
        """Set a handler for a signal, wait for the signal, and remove the handler."""
        async with self._one_handler:
            came = asyncio.Event()
            self._loop.add_signal_handler(signal.SIGUSR2, came.set)
            os.kill(os.getpid(), signal.SIGUSR2)
            await came.wait()
            self._loop.remove_signal_handler(signal.SIGUSR2)
        return b"%d" % number

    async def cancel(self, number: int) -> bytes:
        """Cancel a task that is connected to this server, or still connects to it."""

        async def wait_for_nothing() -> None:
            reader, writer = await asyncio.open_connection(*self._address)
            try:
                writer.write(b"ECHO x\n")
                await reader.readline()
                await reader.readline()
            finally:
                writer.close()

        task = asyncio.ensure_future(wait_for_nothing())
        await asyncio.sleep(number % 5 / 1000)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if not task.cancelled():
            self._errors("a task was not cancelled")
        return b"%d" % number

    async def kill(self, number: int) -> bytes:
        """Cancel tasks that wait beside a child, which each task then kills."""

        async def wait_for_child() -> None:
            child = await asyncio.create_subprocess_exec("cat", stdin=PIPE)
            try:
                await asyncio.sleep(60)
            finally:
                child.kill()
                await child.wait()

        tasks = [asyncio.ensure_future(wait_for_child()) for _ in range(3)]
        await asyncio.sleep(0.001)
        for each in tasks:
            each.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        if not all(isinstance(each, asyncio.CancelledError) for each in outcomes):
            self._errors(f"not all tasks were cancelled: {outcomes}")
        return b"%d" % number

    async def spawn(self, status: int) -> bytes:
        """Answer with the exit status of a child that Twisted has started."""
        ended: asyncio.Future[int] = self._loop.create_future()
        script = ["sh", "-c", f"exit {status}"]
        self._reactor.spawnProcess(Ending(ended), "/bin/sh", script)
        return b"%d" % await ended

    async def twisted(self, number: int) -> bytes:
        """Answer with the result of a timer and of a thread of Twisted."""
        delayed = deferLater(self._reactor, 0.001, lambda: number)
        pool = self._reactor.getThreadPool()
        in_thread = deferToThreadPool(self._reactor, pool, lambda: number)
        later = await delayed.asFuture(self._loop)
        return b"%d" % ((later + await in_thread.asFuture(self._loop)) // 2)
