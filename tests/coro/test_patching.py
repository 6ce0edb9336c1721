"""Libraries with blocking sockets, in modules that are patched."""

from __future__ import annotations

import gc
import selectors
import socket
import ssl
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("greenlet", reason="it is for the extra [greenlet]")

from tests.coro.support import run, spin
from tests.coro.test_blocking_sockets import Files, Peer, until_closed
from tests.coro.test_blocking_sockets import (
    files_of_certificate as files_of_certificate,
)
from tests.coro.test_blocking_sockets import peer as peer
from tests.coro.test_blocking_sockets import tls_peer as tls_peer
from tests.coro.test_examples import reactor as reactor
from tests.support import DEADLINE, ON_PYPY
from twisted_rtsig.coro import Event, Task, TaskGroup, in_thread, sleep, spawn
from twisted_rtsig.coro.stackful import (
    BlockingSocket,
    BlockingSSLSocket,
    in_stackful,
    patched,
    spawn_stackful,
    wait,
)

pytestmark = pytest.mark.skipif(
    ON_PYPY, reason="PyPy has greenlets and sockets of its own"
)

# A library, as people write them.
LIBRARY = """
import select, selectors, socket, ssl, time
import socket as the_socket
from select import poll
from socket import create_connection, getaddrinfo
from socket import socket as Socket
from ssl import SSLContext, create_default_context
from time import sleep

def say_hello(address):
    with socket.create_connection(address, 20) as sock:
        sock.sendall(b"say hello\\n")
        return type(sock), sock.recv(100)
"""


def make_library(name: str = "library") -> Any:
    module = types.ModuleType(name)
    exec(LIBRARY, vars(module))
    return module


@pytest.fixture
def library() -> Any:
    return make_library()


def test_patched_affects_only_the_module_and_the_block(
    reactor: Any, library: Any, peer: Peer
) -> None:
    before = dict(vars(library))
    other = make_library("other")

    def use() -> None:
        assert library.socket is socket
        with patched(library):
            kind, said = library.say_hello(peer.address)
            assert (kind, said) == (BlockingSocket, b"hello\n")
            assert isinstance(library.socket.socket(), BlockingSocket)
            assert library.the_socket.socket().type == library.socket.SOCK_STREAM
            assert library.create_connection is not socket.create_connection
            with library.create_connection(peer.address) as sock:
                assert isinstance(sock, BlockingSocket)
                assert isinstance(sock, library.socket.socket)
                assert isinstance(sock, library.Socket)
                assert not isinstance(sock, library.ssl.SSLSocket)
            # What is not replaced is as it was, and so is all else.
            assert library.socket.AF_INET is socket.AF_INET
            assert library.socket.gaierror is socket.gaierror
            assert library.time.monotonic is time.monotonic
            assert "has_ipv6" in dir(library.socket)
            assert "sockets of the reactor" in repr(library.socket)
            with pytest.raises(AttributeError, match="no_such"):
                library.socket.no_such  # noqa: B018
            assert other.socket is socket
            assert socket.create_connection is before["create_connection"]
        assert vars(library) == before

    run(reactor, in_stackful, use)
    assert vars(library) == before
    until_closed(reactor)


def test_nested_and_simultaneous_blocks(reactor: Any, library: Any, peer: Peer) -> None:
    before = dict(vars(library))
    other = make_library("other")
    at_once = Event()

    def use() -> None:
        with patched(library):
            with patched(other, library):
                wait(at_once.wait())
                assert other.say_hello(peer.address)[0] is BlockingSocket
            # It may be patched for other tasks still.
            assert other.socket.create_connection is socket.create_connection
            assert library.say_hello(peer.address)[0] is BlockingSocket

    async def main() -> None:
        async with TaskGroup() as group:
            for _ in range(3):
                group.spawn(in_stackful, use)
            await sleep(0)
            # What is not in a block has sockets of the operating system: a task of
            # another kind, and a thread.
            assert library.socket is not socket
            kind, said = await in_thread(library.say_hello, peer.address)
            assert (kind, said) == (socket.socket, b"hello\n")
            assert library.socket.create_connection is socket.create_connection
            assert library.socket.socket is socket.socket
            assert type(library.create_default_context()) is ssl.SSLContext
            with library.Socket() as sock:
                assert type(sock) is socket.socket
                assert isinstance(sock, library.Socket)
            assert issubclass(socket.socket, library.Socket)
            at_once.set()
        # The tasks that are spawned in a block are in it.
        with patched(library):
            task = spawn_stackful(library.say_hello, peer.address)
            thread = in_thread(library.say_hello, peer.address)
            assert (await task)[0] is BlockingSocket
            assert (await thread)[0] is socket.socket

    run(reactor, main)
    # The thread may still have the context of its last function.
    spin(reactor, lambda: vars(library) == before)
    until_closed(reactor)


def test_tasks_that_outlive_the_block(reactor: Any, library: Any, peer: Peer) -> None:
    """What was spawned in it has sockets of the reactor until it ends."""
    before = dict(vars(library))

    def spawns() -> Task[Any]:
        with patched(library), patched(make_library("inner")):
            # It begins when this one waits.
            return spawn_stackful(library_says_hello)

    def library_says_hello() -> Any:
        wait(sleep(0.001))
        return library.say_hello(peer.address)

    async def main() -> None:
        task = await in_stackful(spawns)
        assert library.socket.socket is socket.socket
        assert (await task)[0] is BlockingSocket

    run(reactor, main)
    assert vars(library) == before
    until_closed(reactor)


def test_a_task_freed_in_the_block(reactor: Any, library: Any) -> None:
    before = dict(vars(library))

    async def coroutine() -> None:
        with patched(library):
            await Event().wait()

    def function() -> None:
        with patched(library):
            wait(Event().wait())

    makes: list[Callable[[], Any]] = [coroutine]
    # Before, it stays until the process ends.
    if sys.version_info >= (3, 11):
        makes.append(lambda: in_stackful(function))
    for make in makes:
        task: Any = spawn(make())
        assert vars(library) != before
        del task
        gc.collect()
        assert vars(library) == before


def test_other_values_of_a_module_are_kept(library: Any) -> None:
    class Odd:
        """As a proxy that knows nothing outside of a request."""

        def __hash__(self) -> int:
            raise RuntimeError

    library.odd = odd = Odd()
    with patched(library):
        assert library.odd is odd
        assert library.socket is not socket


def test_values_set_in_the_block_stay(library: Any) -> None:
    mine = object()
    with patched(library):
        library.socket = mine
        library.time.set_through_the_module = 1
        assert time.set_through_the_module == 1  # type: ignore[attr-defined]
        del library.time.set_through_the_module
    assert not hasattr(time, "set_through_the_module")
    assert library.socket is mine
    with pytest.raises(TypeError, match="takes modules"):
        patched("library").__enter__()  # type: ignore[arg-type]
    # An error restores everything as well.
    with pytest.raises(KeyError), patched(library):
        raise KeyError
    assert library.time is time


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = make_library("a_package")
    package.__path__ = []
    inner = make_library("a_package.inner")
    beside = make_library("a_package_beside")
    for module in (package, inner, beside):
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    with patched(package):
        assert inner.socket is not socket
        assert beside.socket is socket
    assert inner.socket is socket


def test_name_lookups_and_sleeps_do_not_block_the_reactor(
    reactor: Any, library: Any
) -> None:
    turns = 0

    def use() -> None:
        with patched(library):
            assert library.socket.gethostbyname("localhost") == "127.0.0.1"
            assert library.socket.gethostbyname_ex("127.0.0.1")[2] == ["127.0.0.1"]
            assert library.socket.gethostbyaddr("127.0.0.1")
            assert library.socket.getfqdn("127.0.0.1") == socket.getfqdn("127.0.0.1")
            assert library.socket.getnameinfo(("127.0.0.1", 80), 0)
            places: list[tuple[str | None, str | int]] = [
                *(("127.0.0.1", 80), ("localhost", "http"), (None, 1)),
            ]
            for host, port in places:
                found = library.getaddrinfo(host, port)
                assert found == socket.getaddrinfo(host, port)
            with pytest.raises(socket.gaierror):
                library.getaddrinfo("localhost", 80, flags=socket.AI_NUMERICHOST)
            with pytest.raises(OSError, match="serve"):
                library.socket.create_server(("127.0.0.1", 0))
            before = turns
            library.time.sleep(0.01)
            library.sleep(0)
            assert turns > before

    async def main() -> None:
        async def turn() -> None:
            nonlocal turns
            while True:
                await sleep(0.001)
                turns += 1

        async with TaskGroup() as group:
            group.spawn(turn)
            await in_stackful(use)
            group.cancel()

    run(reactor, main)


@pytest.mark.parametrize("secure", [False, True])
def test_readiness(
    reactor: Any, secure: bool, request: Any, files_of_certificate: Files
) -> None:
    """As select, poll and selectors tell it of sockets of the operating system."""
    peer: Peer = request.getfixturevalue("tls_peer" if secure else "peer")
    library = make_library()

    def conversation() -> list[Any]:
        got: list[Any] = []
        sock = library.create_connection(peer.address, DEADLINE)
        if secure:
            authority = str(files_of_certificate[0])
            context = library.ssl.create_default_context(cafile=authority)
            sock = context.wrap_socket(sock, server_hostname="127.0.0.1")
            # Of TLS 1.3 something comes after the handshake.
            sock.sendall(b"say first\n")
            assert sock.recv(6) == b"first\n"
        with sock:
            select = library.select.select
            got.append(select([sock], [sock], [sock], 0) == ([], [sock], []))
            got.append(select([sock], [], [], 0.01) == ([], [], []))
            got.append(select([], [sock], []) == ([], [sock], []))
            sock.sendall(b"say hello\n")
            got.append(select([sock], [], []) == ([sock], [], []))
            got.append(select([sock], [], [], 0) == ([sock], [], []))
            got.append(sock.recv(100))
            got.append(select([sock], [], [], 0) == ([], [], []))
            if hasattr(library.select, "poll"):
                poll = library.select.poll()
                poll.register(sock, library.select.POLLIN)
                got.append(poll.poll(0))
                sock.sendall(b"say hello\n")
                got.append([mask for _, mask in poll.poll(DEADLINE * 1000)])
                poll.modify(sock, library.select.POLLOUT)
                got.append([mask for _, mask in poll.poll()])
                poll.unregister(sock)
                got += [poll.poll(0), sock.recv(100)]
                with pytest.raises(OSError, match="No such file"):
                    poll.modify(sock, 1)
            with library.selectors.DefaultSelector() as selector:
                key = selector.register(sock, selectors.EVENT_READ, "data")
                got += [key.events, key.data, selector.select(0)]
                sock.sendall(b"say hello\n")
                got += [(key.data, events) for key, events in selector.select()]
                selector.modify(sock, selectors.EVENT_WRITE)
                got += [events for _, events in selector.select(DEADLINE)]
                got.append(selector.get_key(sock).events)
                with pytest.raises(KeyError):
                    selector.register(sock, selectors.EVENT_READ)
                with pytest.raises(ValueError, match="Invalid events"):
                    selector.register(sock, 0)
                selector.unregister(sock)
                with pytest.raises(KeyError):
                    selector.unregister(sock)
            got.append(sock.recv(100))
            sock.sendall(b"close\n")
            # The end can be read.
            got.append(select([sock], [], [], DEADLINE) == ([sock], [], []))
            got.append(sock.recv(100))
        return got

    def ours() -> list[Any]:
        with patched(library):
            return conversation()

    real = run(reactor, in_thread, conversation)
    assert run(reactor, in_stackful, ours) == real
    until_closed(reactor)


def test_polling_other_descriptors_raises(reactor: Any, library: Any) -> None:
    def use() -> None:
        with patched(library), socket.socket() as real:
            for poll in (
                lambda: library.select.select([real], [], [], 0),
                lambda: library.poll().register(real),
                lambda: library.selectors.SelectSelector().register(real, 1),
            ):
                with pytest.raises(OSError, match="BlockingSocket"):
                    poll()

    run(reactor, in_stackful, use)


def test_contexts_of_a_patched_module(
    reactor: Any, library: Any, tls_peer: Peer, files_of_certificate: Files
) -> None:
    """They take sockets of either kind; contexts of other modules take only one."""
    authority = str(files_of_certificate[0])

    def hello(context: ssl.SSLContext, sock: Any) -> Any:
        with context.wrap_socket(sock, server_hostname="127.0.0.1") as wrapped:
            wrapped.sendall(b"say hello\n")
            assert wrapped.recv(100) == b"hello\n"
            return wrapped

    def use() -> None:
        with patched(library):
            assert isinstance(ssl.create_default_context(), library.ssl.SSLContext)
            contexts = [
                library.ssl.create_default_context(cafile=authority),
                library.create_default_context(cafile=authority),
                library.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                library.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                library.ssl._create_stdlib_context(),
            ]
            for context in contexts:
                context.load_verify_locations(authority)
                assert isinstance(context, ssl.SSLContext)
                sock = library.create_connection(tls_peer.address, DEADLINE)
                wrapped = hello(context, sock)
                assert isinstance(wrapped, BlockingSSLSocket)
                assert isinstance(wrapped, library.ssl.SSLSocket)
            real = wait(in_thread(socket.create_connection, tls_peer.address))
            assert isinstance(wait(in_thread(hello, contexts[0], real)), ssl.SSLSocket)
            sock = library.create_connection(tls_peer.address, DEADLINE)
            with sock, pytest.raises(OSError, match="allow_blocking_sockets"):
                hello(ssl.create_default_context(cafile=authority), sock)

    run(reactor, in_stackful, use)
    until_closed(reactor)
