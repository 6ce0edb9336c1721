"""
Blocking sockets in stackful tasks.

Most tests have the same conversation with a socket of the operating system, in a
thread, and with one of the reactor, and compare what the calls return and raise.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import itertools
import select
import socket
import ssl
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("greenlet", reason="it is for the extra [greenlet]")

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IHostnameResolver
from twisted.internet.tcp import Connection
from zope.interface import directlyProvides

from tests.coro.support import connected, run, spin
from tests.coro.test_examples import reactor as reactor
from tests.coro.test_garbage import garbage, without_collector
from tests.coro.test_opening import needs_silent_host, silent_host
from tests.support import DEADLINE, ON_PYPY, RESET, make_certificate, refusing_port
from twisted_rtsig.coro import Stream, blocking_sockets, in_thread, sleep, timeout
from twisted_rtsig.coro.stackful import (
    BlockingSocket,
    BlockingSSLSocket,
    ClientSocket,
    NoStackError,
    allow_blocking_sockets,
    create_connection,
    in_stackful,
    spawn_stackful,
)
from twisted_rtsig.coro.testing import cancel_everywhere

pytestmark = pytest.mark.skipif(
    ON_PYPY, reason="PyPy has greenlets and sockets of its own"
)

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

# The server


class Peer:
    """
    A server in threads, which does what its clients tell it to, line by line.

    :ivar received: how many bytes came behind each ``count``.
    """

    def __init__(self, listening: socket.socket, context: Any = None) -> None:
        self.received: list[int] = []
        self._listening = listening
        self._context = context
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        self.address = listening.getsockname()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                connection.settimeout(DEADLINE)
                thread = threading.Thread(
                    target=self._serve, args=[connection], daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
                stack.callback(connection.close)
            self._obey(connection)

    def _obey(self, connection: Any) -> None:
        commands = b""
        while True:
            while b"\n" not in commands:
                data = connection.recv(65536)
                if not data:
                    return
                commands += data
            line, _, commands = commands.partition(b"\n")
            verb, _, rest = line.decode("latin-1").partition(" ")
            if verb == "say":
                connection.sendall(rest.encode("latin-1") + b"\n")
            elif verb == "flood":
                connection.sendall(b"x" * int(rest))
            elif verb == "end":
                connection.shutdown(socket.SHUT_WR)
            elif verb == "close":
                return
            elif verb == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                return
            elif verb == "unwrap":
                connection = connection.unwrap()
            elif verb == "count":
                size = len(commands)
                while data := connection.recv(65536):
                    size += len(data)
                self.received.append(size)
                return
            # To anything else it says nothing.

    def close(self) -> None:
        # Closing alone does not wake a thread that accepts.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def peer() -> Iterator[Peer]:
    it = Peer(socket.create_server(("127.0.0.1", 0)))
    yield it
    it.close()


# Both kinds of sockets

# What a conversation uses: of the operating system, and of the reactor.
REAL = SimpleNamespace(
    socket=socket.socket,
    create_connection=socket.create_connection,
    context=lambda context: context,
)
OURS = SimpleNamespace(
    socket=ClientSocket,
    create_connection=create_connection,
    context=allow_blocking_sockets,
)


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns or raises, so that two of them can be compared."""
    try:
        result = function(*args, **kwargs)
    except OSError as error:
        return type(error), error.errno
    except Exception as error:
        return type(error)
    return result


def connections_of(reactor: Any) -> list[Any]:
    """The connections that a reactor watches; paused ones are not among them."""
    watched = [*reactor.getReaders(), *reactor.getWriters()]
    return [each for each in watched if isinstance(each, Connection)]


def until_closed(reactor: Any) -> None:
    """Let the reactor close what was closed: no connection and no timer is left."""
    spin(
        reactor,
        lambda: not connections_of(reactor) and not reactor.getDelayedCalls(),
    )


def both(
    reactor: Any, conversation: Callable[..., Any], peer: Any, *args: Any
) -> list[Any]:
    """Have a conversation with each kind of socket; return the results of its calls."""
    address = getattr(peer, "address", peer)
    real = run(reactor, in_thread, conversation, REAL, address, *args)
    ours = run(reactor, in_stackful, conversation, OURS, address, *args)
    until_closed(reactor)
    assert ours == real
    # A conversation without results cannot fail.
    assert real
    return list(real)


def receive(net: Any, address: Any) -> list[Any]:
    got = []
    with net.create_connection(address, timeout=DEADLINE) as sock:
        sock.sendall(b"say hello, world\n")
        got.append(sock.recv(3))
        got.append(sock.recv(0))
        got.append(sock.recv(2, socket.MSG_PEEK))
        buffer = bytearray(4)
        got.append((sock.recv_into(buffer, 2), bytes(buffer)))
        got.append((sock.recv_into(buffer), bytes(buffer)))
        got.append((sock.recv_into(memoryview(buffer)[2:]), bytes(buffer)))
        got.append(outcome(sock.recv, -1))
        got.append(outcome(sock.recv_into, buffer, -1))
        got.append(outcome(sock.recv_into, buffer, 5))
        got.append(outcome(sock.recv))
        # These take nothing.
        got.append(outcome(sock.recv, 1.5))
        got.append(outcome(sock.recv_into, b"read-only"))
        got.append(outcome(sock.send, "text"))
        sock.settimeout(None)
        got.append(sock.recv(2, socket.MSG_WAITALL))
        sock.sendall(b"say 1234567\nend\n")
        got.append(sock.recv(3, socket.MSG_WAITALL))
        # Of the rest there is less.
        got.append(sock.recv(100, socket.MSG_WAITALL))
        got.append(sock.recv(10))
        got.append(sock.send(b""))
        got.append(sock.sendall(b""))
    return got


def at_the_end(net: Any, address: Any) -> list[Any]:
    got = []
    with net.create_connection(address, DEADLINE) as sock:
        sock.sendall(b"say last words\nclose\n")
        got.append(sock.makefile("rb").read())
        got.append(sock.recv(10))
        got.append(sock.recv(10))
        # The first is answered by a reset.
        for _ in range(1000):
            sent = outcome(sock.send, b"x" * 1000)
            if sent != 1000:
                break
        got.append(sent)
        got.append(outcome(sock.sendall, b"x"))
        got.append(outcome(sock.recv, 10))
        got.append(outcome(sock.shutdown, socket.SHUT_WR))
        got.append(outcome(sock.getpeername))
    return got


def reset(net: Any, address: Any) -> list[Any]:
    with net.create_connection(address, DEADLINE) as sock:
        sock.sendall(b"reset\n")
        return [
            outcome(sock.recv, 10),
            outcome(sock.recv, 10),
            outcome(sock.send, b"x"),
            outcome(sock.sendall, b"x"),
            outcome(sock.shutdown, socket.SHUT_RDWR),
        ]


def time_out(net: Any, address: Any) -> list[Any]:
    got = []
    with net.create_connection(address) as sock:
        got.append(sock.gettimeout())
        got.append(sock.timeout)
        sock.settimeout(0.02)
        got.append(sock.gettimeout())
        try:
            sock.recv(10)
        except TimeoutError as error:
            got.append(error.args)
        got.append(outcome(sock.recv, 10))
        # It can be used after that.
        sock.settimeout(DEADLINE)
        sock.sendall(b"say I am here\n")
        got.append(sock.recv(100))
        got.append(outcome(sock.settimeout, -1))
        got.append(outcome(sock.settimeout, "soon"))
        # A file cannot, as it may have lost something.
        file = sock.makefile("rb")
        sock.settimeout(0.02)
        got.append(outcome(file.readline))
        got.append(outcome(file.readline))
        # The peer does not read what is sent.
        sock.sendall(b"flood 100000000\n")
        got.append(outcome(sock.sendall, b"x" * 50_000_000))
        # So that the end does not wait until it does.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return got


def at_once(net: Any, address: Any) -> list[Any]:
    got = []
    with net.create_connection(address, DEADLINE) as sock:
        sock.setblocking(False)
        got += [sock.getblocking(), sock.gettimeout()]
        got.append(outcome(sock.recv, 10))
        got.append(outcome(sock.recv, 1, socket.MSG_PEEK))
        got.append(outcome(sock.makefile("rb", 0).read, 1))
        sock.setblocking(True)
        got += [sock.getblocking(), sock.gettimeout()]
        if hasattr(socket, "MSG_DONTWAIT"):
            got.append(outcome(sock.recv, 10, socket.MSG_DONTWAIT))
        sock.sendall(b"say something\n")
        got.append(sock.recv(4, socket.MSG_PEEK))
        sock.settimeout(0)
        got.append(sock.recv(4))
        got.append(sock.recv(100))
        got.append(outcome(sock.recv, 100))
        got.append(sock.send(b"close\n"))
        sock.settimeout(DEADLINE)
        got.append(sock.recv(10))
        sock.settimeout(0)
        got.append(sock.recv(10))
    return got


def shut_down(net: Any, address: Any) -> list[Any]:
    got = []
    with net.create_connection(address, DEADLINE) as sock:
        sock.sendall(b"say before\n")
        got.append(sock.shutdown(socket.SHUT_WR))
        got.append(outcome(sock.send, b"more"))
        got.append(sock.makefile("r").read())
    with net.create_connection(address, DEADLINE) as sock:
        got.append(sock.shutdown(socket.SHUT_WR))
        got.append(outcome(sock.shutdown, 17))
        got.append(sock.recv(10))
    with net.create_connection(address, DEADLINE) as sock:
        got.append(sock.shutdown(socket.SHUT_RD))
        got.append(sock.recv(10))
        got.append(sock.recv(10))
        got.append(sock.send(b"say it\n"))
    with net.socket() as sock:
        got.append(outcome(sock.shutdown, socket.SHUT_RDWR))
    return got


def close(net: Any, address: Any) -> list[Any]:
    got = []
    sock = net.create_connection(address, DEADLINE)
    sock.close()
    got.append(sock.fileno())
    got.append(sock.close())
    for function, *args in [
        (sock.recv, 1),
        (sock.recv_into, bytearray(1)),
        (sock.send, b"x"),
        (sock.sendall, b"x"),
        (sock.shutdown, socket.SHUT_WR),
        (sock.getpeername,),
        (sock.getsockname,),
        (sock.getsockopt, socket.SOL_SOCKET, socket.SO_TYPE),
        (sock.setsockopt, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (sock.connect, address),
    ]:
        got.append(outcome(function, *args))
    # Its files keep it open.
    sock = net.create_connection(address, DEADLINE)
    with sock:
        reader, writer = sock.makefile("rb"), sock.makefile("wb")
    writer.write(b"say still there\n")
    writer.flush()
    writer.close()
    got.append(reader.readline())
    reader.close()
    got.append(outcome(sock.recv, 1))
    got.append(sock.fileno())
    return got


def files(net: Any, address: Any) -> list[Any]:
    got: list[Any] = []
    with net.create_connection(address, DEADLINE) as sock:
        for mode, buffering in [
            *(("rwb", None), ("rb", None), ("wb", None), ("rb", 0), ("rwb", 0)),
            *(("r", None), ("w", None), ("rw", None), ("", None), ("b", None)),
            *(("x", None), ("r", 0), ("rb", 1), ("wb", 3)),
        ]:
            file = outcome(sock.makefile, mode, buffering)
            if isinstance(file, type):
                got.append(file)
                continue
            with file:
                got.append((type(file), file.readable(), file.writable()))
                got.append(getattr(file, "mode", None))
        with sock.makefile("rwb") as file:
            file.write(b"say one\nsay two\n")
            file.flush()
            got += [file.read(2), file.readline(), file.peek()[:1], file.read1(1)]
            buffer = bytearray(3)
            got += [file.readinto(buffer), bytes(buffer)]
        text = sock.makefile("rw", encoding="utf-8", newline="\n")
        with text:
            text.write("say f\xfcr dich\nsay und mich\nend\n")
            text.flush()
            got += [text.readline(), list(text), text.encoding]
        got.append(outcome(file.read))
    return got


def options(net: Any, address: Any) -> list[Any]:
    got = []
    nodelay = socket.IPPROTO_TCP, socket.TCP_NODELAY
    keepalive = socket.SOL_SOCKET, socket.SO_KEEPALIVE
    with net.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        got.append(sock.getsockopt(*nodelay))
        sock.setsockopt(*nodelay, 1)
        sock.setsockopt(*keepalive, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3))
        got.append(bool(sock.getsockopt(*nodelay)))
        got.append(outcome(sock.setsockopt, socket.IPPROTO_TCP, 9999, 1))
        got.append(outcome(sock.getsockopt, socket.IPPROTO_TCP, 9999))
        sock.settimeout(DEADLINE)
        sock.connect(address)
        got += [bool(sock.getsockopt(*nodelay)), bool(sock.getsockopt(*keepalive))]
        got.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        got.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE))
        got.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        sock.setsockopt(*nodelay, 0)
        got.append(sock.getsockopt(*nodelay))
        got.append(outcome(sock.setsockopt, socket.IPPROTO_TCP, 9999, 1))
        got += [sock.family, sock.type, sock.proto]
        got += [sock.getpeername(), sock.getsockname()[0]]
    return got


def connect(net: Any, address: Any) -> list[Any]:
    got = []
    with net.socket() as sock:
        sock.settimeout(DEADLINE)
        got += [sock.family, sock.type, sock.proto]
        got.append(outcome(sock.recv, 1))
        got.append(outcome(sock.getpeername))
        got.append(sock.getsockname())
        got.append(outcome(sock.connect, (address[0], 1 << 16)))
        got.append(outcome(sock.connect, (address[0], "echo")))
        got.append(sock.connect(address))
        sock.sendall(b"say connected\n")
        got.append(sock.recv(100))
    with net.socket(socket.AF_INET) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(("localhost", address[1]))
        got.append(sock.getsockname()[0])
        got.append(outcome(sock.bind, ("127.0.0.1", 0)))
    with net.create_connection(address, source_address=("127.0.0.3", 0)) as sock:
        got.append(sock.getsockname()[0])
    with net.create_connection(("localhost", str(address[1])), DEADLINE) as sock:
        got.append(sock.getpeername()[1] == address[1])
    return got


def fail_to_connect(net: Any, address: Any) -> list[Any]:
    got = []
    for port in (address[1], 0):
        got.append(outcome(net.create_connection, (address[0], port), 5))
        with net.socket() as sock:
            got.append(outcome(sock.connect, (address[0], port)))
            got.append(sock.connect_ex((address[0], port)))
    # It is no address of this family.
    with net.socket(socket.AF_INET6) as sock:
        got.append(outcome(sock.connect_ex, address))
    try:
        if sys.version_info >= (3, 11):
            net.create_connection(address, all_errors=True)
    except Exception as error:
        got += [type(error), str(error)]
        got += [type(each) for each in error.exceptions]  # type: ignore[attr-defined]
    got.append(outcome(net.create_connection, address, source_address=("::1", 0)))
    return got


def send_files(net: Any, address: Any, path: Path) -> list[Any]:
    got = []
    with net.create_connection(address, DEADLINE) as sock, path.open("rb") as file:
        sock.sendall(b"count\n")
        got.append((sock.sendfile(file), file.tell()))
        got.append((sock.sendfile(file, 5, 10), file.tell()))
        got.append((sock.sendfile(file, 10**9), file.tell()))
        got.append(outcome(sock.sendfile, file, 0, 0))
        with path.open() as text:
            got.append(outcome(sock.sendfile, text))
        sock.settimeout(0)
        got.append(outcome(sock.sendfile, file))
        sock.settimeout(DEADLINE)
        sock.shutdown(socket.SHUT_WR)
        got.append(sock.recv(1))
    return got


CONVERSATIONS = [
    *(receive, at_the_end, reset, time_out, at_once, shut_down, close, files),
    *(options, connect),
]


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda each: each.__name__)
def test_sockets_behave_as_those_of_a_thread(
    reactor: Any, peer: Peer, conversation: Callable[..., Any]
) -> None:
    both(reactor, conversation, peer)


def test_failing_connections(reactor: Any) -> None:
    with refusing_port() as port:
        both(reactor, fail_to_connect, ("127.0.0.1", port))


def get_no_answer(net: Any, address: Any) -> list[Any]:
    got = []
    for connect in ("connect", "connect_ex"):
        with net.socket() as sock:
            sock.settimeout(0.02)
            got.append(outcome(getattr(sock, connect), address))
    got.append(outcome(net.create_connection, address, 0.02))
    return got


@needs_silent_host
def test_unanswered_connections_time_out(reactor: Any) -> None:
    with silent_host() as address:
        both(reactor, get_no_answer, address)


def test_sendfile(reactor: Any, peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * 50_000)
    both(reactor, send_files, peer, path)
    assert peer.received == [500_010] * 2


def over_unix(net: Any, address: str) -> list[Any]:
    got = []
    with net.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        got.append(sock.getsockname())
        got.append(outcome(sock.connect, address + ".none"))
        sock.settimeout(DEADLINE)
        got.append(sock.connect(address))
        sock.sendall(b"say hello\n")
        got.append(sock.recv(100))
        got += [sock.getpeername() == address, sock.getsockname(), sock.family]
        sock.sendall(b"close\n")
        got.append(sock.recv(100))
    return got


def test_unix_sockets(reactor: Any, tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    listening.listen()
    with contextlib.closing(Peer(listening)) as peer:
        both(reactor, over_unix, peer)


# TLS

Files = tuple[Path, Path]


@pytest.fixture(scope="session")
def files_of_certificate(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_certificate(tmp_path_factory.mktemp("blocking"))


@pytest.fixture
def tls_peer(files_of_certificate: Files) -> Iterator[Peer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files_of_certificate)
    context.set_alpn_protocols(["test/1"])
    it = Peer(socket.create_server(("127.0.0.1", 0)), context)
    yield it
    it.close()


def over_tls(net: Any, address: Any, authority: Path) -> list[Any]:
    got: list[Any] = []
    context = net.context(ssl.create_default_context(cafile=str(authority)))
    context.set_alpn_protocols(["other/2", "test/1"])
    plain = net.create_connection(address, DEADLINE)
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
        got += [plain.fileno(), outcome(plain.recv, 1), sock.gettimeout()]
        got += [sock.version(), sock.cipher(), sock.compression(), sock.pending()]
        got += [sock.getpeercert(), len(sock.getpeercert(True))]
        got += [sock.selected_alpn_protocol(), sock.session_reused]
        got += [sock.server_hostname, sock.server_side, sock.context is context]
        got.append(type(sock.session))
        got.append(outcome(sock.get_channel_binding, "none"))
        sock.sendall(b"say hello, world\nsay again\n")
        got += [sock.recv(4), sock.pending(), sock.read(2)]
        buffer = bytearray(4)
        got += [sock.recv_into(buffer), buffer, sock.recv_into(buffer, 2), buffer]
        got += [sock.recv_into(bytearray()), sock.write(b""), sock.send(b"")]
        for flags in (socket.MSG_PEEK, 1 << 30):
            got.append(outcome(sock.recv, 1, flags))
            got.append(outcome(sock.recv_into, buffer, 1, flags))
            got.append(outcome(sock.send, b"x", flags))
            got.append(outcome(sock.sendall, b"x", flags))
        with sock.makefile("rwb") as file:
            got.append(file.readline())
            got.append(file.readline())
            file.write(b"flood 3000000\n")
            file.flush()
            got.append(len(file.read(3_000_000)))
        sock.settimeout(0.02)
        try:
            sock.recv(1)
        except TimeoutError as error:
            got.append(error.args)
        sock.settimeout(0)
        got.append(outcome(sock.recv, 1))
        sock.settimeout(DEADLINE)
        sock.sendall(b"unwrap\n")
        same = sock.unwrap()
        got += [same is sock, outcome(sock.read, 1), sock.version()]
        sock.sendall(b"say in the clear\nclose\n")
        got.append(sock.makefile("rb").read())
        got.append(outcome(sock.unwrap))
    with context.wrap_socket(
        net.create_connection(address, DEADLINE), server_hostname="127.0.0.1"
    ) as sock:
        pass
    got += [sock.version(), sock.cipher(), sock.session_reused, sock.pending()]
    got += [outcome(sock.recv, 1), outcome(sock.send, b"x"), sock.fileno()]
    return got


def fail_over_tls(net: Any, address: Any, plain: Any, authority: Path) -> list[Any]:
    got: list[Any] = []
    trusting = net.context(ssl.create_default_context(cafile=str(authority)))
    other = net.context(ssl.create_default_context())
    for context, name in [(trusting, "example.com"), (other, "127.0.0.1")]:
        sock = net.create_connection(address, DEADLINE)
        try:
            context.wrap_socket(sock, server_hostname=name)
        except ssl.SSLCertVerificationError as error:
            got += [type(error), error.errno, error.reason, error.verify_message]
        got.append(sock.fileno())
    # It does not speak TLS.
    sock = net.create_connection(plain, DEADLINE)
    sock.sendall(b"say plain\n")
    try:
        trusting.wrap_socket(sock, server_hostname="127.0.0.1")
    except ssl.SSLError as error:
        got += [type(error), error.reason]
    # It says nothing.
    sock = net.create_connection(plain, DEADLINE)
    sock.sendall(b"silence\n")
    sock.settimeout(0.02)
    got.append(outcome(trusting.wrap_socket, sock, server_hostname="127.0.0.1"))
    with net.create_connection(address, DEADLINE) as sock:
        got.append(outcome(trusting.wrap_socket, sock))
        arguments: dict[str, Any]
        for arguments in [
            {"server_side": True, "server_hostname": "127.0.0.1"},
        ]:
            got.append(outcome(trusting.wrap_socket, sock, **arguments))
    # It ends without a word.
    sock = net.create_connection(address, DEADLINE)
    with trusting.wrap_socket(sock, server_hostname="127.0.0.1") as sock:
        sock.sendall(b"close\n")
        got += [sock.recv(1), sock.recv(1)]
    sock = net.create_connection(address, DEADLINE)
    with trusting.wrap_socket(
        sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False
    ) as sock:
        sock.sendall(b"close\n")
        got.append(outcome(sock.recv, 1))
    # Later, and by hand.
    nodelay = socket.IPPROTO_TCP, socket.TCP_NODELAY
    with net.socket() as sock:
        sock.setsockopt(*nodelay, 1)
        late = trusting.wrap_socket(
            sock, server_hostname="127.0.0.1", do_handshake_on_connect=False
        )
    with late:
        got.append(outcome(late.recv, 1))
        late.settimeout(DEADLINE)
        late.connect(address)
        got += [late.version(), bool(late.getsockopt(*nodelay))]
        got.append(late.do_handshake())
        late.sendall(b"say late\n")
        got.append(late.recv(100))
        got.append(late.shutdown(socket.SHUT_RDWR))
    return got


def test_tls(reactor: Any, tls_peer: Peer, files_of_certificate: Files) -> None:
    both(reactor, over_tls, tls_peer, files_of_certificate[0])


def test_failing_tls(
    reactor: Any, peer: Peer, tls_peer: Peer, files_of_certificate: Files
) -> None:
    both(reactor, fail_over_tls, tls_peer, peer.address, files_of_certificate[0])


# What only a socket of the reactor does


def test_two_tasks_on_one_socket(reactor: Any, peer: Peer) -> None:
    """One task reads and the other one writes; two that read take turns."""

    async def main() -> None:
        sock = await in_stackful(create_connection, peer.address, DEADLINE)
        with sock:
            first = spawn_stackful(sock.recv, 4)
            second = spawn_stackful(sock.recv, 4)
            await sleep(0)
            assert not first.done
            assert not second.done
            await in_stackful(sock.sendall, b"say 1234567\n")
            assert (await first, await second) == (b"1234", b"567\n")
            # One that gives up leaves the turn to the next one.
            sock.settimeout(0.02)
            first = spawn_stackful(sock.recv, 4)
            second = spawn_stackful(sock.recv, 4)
            for task in (first, second):
                with pytest.raises(TimeoutError):
                    await task
            sock.settimeout(DEADLINE)
            first = spawn_stackful(sock.recv, 4)
            second = spawn_stackful(sock.recv, 4)
            await sleep(0)
            first.cancel()
            await in_stackful(sock.sendall, b"say all\n")
            assert await second == b"all\n"
            # And a shutdown ends both.
            first = spawn_stackful(sock.recv, 4)
            second = spawn_stackful(sock.recv, 4)
            await sleep(0)
            sock.shutdown(socket.SHUT_RD)
            assert (await first, await second) == (b"", b"")

    run(reactor, main)


def test_two_tasks_over_tls(
    reactor: Any, tls_peer: Peer, files_of_certificate: Files
) -> None:
    context = ssl.create_default_context(cafile=str(files_of_certificate[0]))
    allow_blocking_sockets(context)

    def dial() -> BlockingSSLSocket:
        plain: Any = create_connection(tls_peer.address, DEADLINE)
        wrapped: Any = context.wrap_socket(plain, server_hostname="127.0.0.1")
        return cast(BlockingSSLSocket, wrapped)

    async def main() -> None:
        with await in_stackful(dial) as sock:
            first = spawn_stackful(sock.recv, 4)
            second = spawn_stackful(sock.recv, 4)
            await sleep(0)
            # Both are in one record, of which the first reader gets only a part.
            await in_stackful(sock.sendall, b"say 1234567\n")
            assert (await first, await second) == (b"1234", b"567\n")
            count = 200_000
            reading = spawn_stackful(sock.makefile("rb").read, count)
            await in_stackful(sock.sendall, b"flood %d\n" % count)
            assert len(await reading) == count

    run(reactor, main)


def test_a_socket_over_any_stream(reactor: Any) -> None:
    """Outside of a stackful task, its calls raise an error that says what to do."""

    async def main() -> None:
        async with connected(reactor) as (stream, peer):
            with BlockingSocket(stream) as sock:
                assert repr(sock) == f"<BlockingSocket to {stream.peer}>"
                assert sock.getpeername() == peer.getsockname()
                assert sock.getsockname() == peer.getpeername()
                peer.sendall(b"hello")
                assert await in_stackful(sock.recv, 10) == b"hello"
                with pytest.raises(NoStackError, match="in_stackful"):
                    sock.recv(10)
            assert stream._closing

    run(reactor, main)


def test_cancelling_a_call_without_a_timeout(reactor: Any, peer: Peer) -> None:
    """It does not block the next call."""

    async def main() -> None:
        sock = await in_stackful(create_connection, peer.address, DEADLINE)
        with sock:
            sock.settimeout(0)
            task = spawn_stackful(sock.recv, 10)
            # Now it waits for a turn of the reactor.
            await sleep(0)
            task.cancel()
            with pytest.raises(CancelledError):
                await task
            sock.settimeout(DEADLINE)
            sock.sendall(b"say hello\n")
            assert await in_stackful(sock.recv, 6) == b"hello\n"
            # Nor does it wait for another task that reads.
            task = spawn_stackful(sock.recv, 10)
            await sleep(0)
            sock.settimeout(0)
            with pytest.raises(BlockingIOError), timeout(DEADLINE):
                await in_stackful(sock.recv, 10)
            sock.sendall(b"say hello\n")
            assert await task == b"hello\n"

    run(reactor, main)
    until_closed(reactor)


def end_with(net: Any, address: Any, linger: bytes) -> list[Any]:
    with net.create_connection(address, DEADLINE) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sock.sendall(b"say hello\ncount\n")
        return [sock.recv(100)]


@pytest.mark.parametrize(("linger", "received"), [(RESET, []), (b"\0" * 8, [0, 0])])
@pytest.mark.skipif(sys.platform == "win32", reason="SO_LINGER has another form")
def test_close_and_reset(reactor: Any, linger: bytes, received: list[int]) -> None:
    """It sends a reset if SO_LINGER is set to 0 seconds."""
    listening = socket.create_server(("127.0.0.1", 0))
    with contextlib.closing(Peer(listening)) as peer:
        both(reactor, end_with, peer, linger)
    assert peer.received == received


def end_unsent(net: Any, address: Any) -> list[Any]:
    with net.create_connection(address, DEADLINE) as sock:
        sock.sendall(b"flood 100000000\n")
        sock.settimeout(0.02)
        return [outcome(sock.sendall, b"x" * 50_000_000)]


def test_closing_gives_up_when_the_peer_does_not_read(
    reactor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer reads nothing of the output that is left."""
    monkeypatch.setattr(blocking_sockets, "_LINGER", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        both(reactor, end_unsent, listening.getsockname())


def test_a_socket_closed_while_it_connects(reactor: Any, peer: Peer) -> None:
    async def main() -> None:
        sock = ClientSocket()
        task = spawn_stackful(sock.connect, peer.address)
        await sleep(0)
        assert not task.done
        sock.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            await task

    run(reactor, main)
    until_closed(reactor)


def test_errors_leave_no_frames_in_cycles(
    reactor: Any, tls_peer: Peer, files_of_certificate: Files
) -> None:
    context = ssl.create_default_context(cafile=str(files_of_certificate[0]))
    allow_blocking_sockets(context)

    def fail(refusing: int) -> None:
        for kind in (ConnectionRefusedError, ExceptionGroup):
            with pytest.raises(kind):
                create_connection(
                    ("127.0.0.1", refusing), all_errors=kind is ExceptionGroup
                )
        plain: Any = create_connection(tls_peer.address, DEADLINE)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
            sock.settimeout(0.01)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.settimeout(0)
            with pytest.raises(ssl.SSLWantReadError):
                sock.recv(1)

    with refusing_port() as port:
        run(reactor, in_stackful, fail, port)
        with without_collector():
            run(reactor, in_stackful, fail, port)
            frames = [each for each in garbage() if each.startswith("frame: ")]
    assert frames == []
    until_closed(reactor)


def test_calls_outside_of_a_stackful_task_raise(reactor: Any, peer: Peer) -> None:
    """They read nothing, and open no connection."""

    async def main() -> None:
        for connect in (create_connection, ClientSocket().connect):
            with pytest.raises(NoStackError):
                connect(peer.address)
        assert not connections_of(reactor)
        sock = await in_stackful(create_connection, peer.address, DEADLINE)
        with sock:
            sock.sendall(b"say hello\n")
            for data in (b"h", b"e"):
                with pytest.raises(NoStackError):
                    sock.recv(1)
                with pytest.raises(NoStackError):
                    await in_thread(sock.recv, 1)
                assert await in_stackful(sock.recv, 1) == data

    run(reactor, main)
    until_closed(reactor)


def test_unsupported_calls_raise(reactor: Any, peer: Peer) -> None:
    def use() -> None:
        with create_connection(peer.address, DEADLINE) as sock:
            calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = [
                (sock.fileno, ()),
                (sock.recv, (1, socket.MSG_OOB)),
                (sock.send, (b"x", socket.MSG_OOB)),
                (sock.setsockopt, (socket.SOL_SOCKET, socket.SO_RCVTIMEO, b"")),
            ]
            for function, args in calls:
                with pytest.raises(io.UnsupportedOperation):
                    function(*args)
            for name in ("accept", "listen", "recvfrom", "sendmsg", "dup", "detach"):
                with pytest.raises(AttributeError, match="operating system"):
                    getattr(sock, name)
            with pytest.raises(AttributeError, match="no attribute 'no_such'"):
                sock.no_such  # type: ignore[attr-defined]  # noqa: B018
            # It must be neither polled nor taken over.
            with pytest.raises(ValueError, match="reactor reads"):
                select.select([sock], [], [], 0)
            with pytest.raises(OSError, match="allow_blocking_sockets"):
                ssl.create_default_context().wrap_socket(
                    sock,  # type: ignore[arg-type]
                    server_hostname="127.0.0.1",
                )
            assert outcome(sock.connect, peer.address) == (OSError, errno.EISCONN)
        for arguments in [
            (socket.AF_INET, socket.SOCK_DGRAM),
            (socket.AF_INET, socket.SOCK_STREAM, 0, 3),
            (12345,),
        ]:
            with pytest.raises(io.UnsupportedOperation):
                ClientSocket(*arguments)
        with ClientSocket() as sock:
            sock.settimeout(0)
            with pytest.raises(io.UnsupportedOperation, match="timeout 0"):
                sock.connect(peer.address)
        with pytest.raises(ValueError, match="out of range"):
            create_connection(peer.address, -1)

    run(reactor, in_stackful, use)
    until_closed(reactor)


def test_names_that_do_not_resolve(reactor: Any) -> None:
    class Resolver:
        def resolveHostName(self, receiver: Any, name: str, **_: Any) -> None:
            receiver.resolutionBegan(None)
            receiver.resolutionComplete()

    resolver: Any = Resolver()
    directlyProvides(resolver, IHostnameResolver)
    reactor.installNameResolver(resolver)

    def use() -> None:
        for name in ("nowhere.example", "no name", "a..b"):
            with pytest.raises(socket.gaierror):
                create_connection((name, 80), DEADLINE)

    run(reactor, in_stackful, use)


@pytest.mark.parametrize("closed", [True, False])
def test_a_socket_that_is_not_closed_warns(
    reactor: Any, peer: Peer, closed: bool
) -> None:
    """Its connection ends, and Python warns, as of a socket of the operating system."""

    def use() -> None:
        sock = create_connection(peer.address, DEADLINE)
        sock.sendall(b"say hello\n")
        assert sock.recv(10) == b"hello\n"
        if closed:
            sock.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(reactor, in_stackful, use)
        gc.collect()
    told = [each for each in caught if each.category is ResourceWarning]
    assert [str(each.message).startswith("unclosed <Bl") for each in told] == (
        [] if closed else [True]
    )
    until_closed(reactor)


def test_cancellation_everywhere() -> None:
    async def peer(stream: Stream) -> None:
        async for line in stream.lines():
            await stream.write(line + b"\n")

    def session(stream: Stream) -> None:
        with BlockingSocket(stream) as sock, sock.makefile("rwb") as file:
            for line in (b"one\n", b"two\n"):
                file.write(line)
                file.flush()
                assert file.readline() == line
            sock.settimeout(5)
            sock.sendall((b"x" * 50_000 + b"\n") * 3)
            assert len(file.read(150_003)) == 150_003
            sock.shutdown(socket.SHUT_WR)
            assert file.read() == b""

    async def handler(stream: Stream) -> None:
        await in_stackful(session, stream)

    assert cancel_everywhere(handler, peer) > 3


@pytest.mark.parametrize("secure", [False, True])
def test_cancellation_in_any_turn(
    reactor: Any, secure: bool, request: Any, files_of_certificate: Files
) -> None:
    """Whenever it is cancelled, no connection stays open, and nothing warns."""
    peer: Peer = request.getfixturevalue("tls_peer" if secure else "peer")
    context = ssl.create_default_context(cafile=str(files_of_certificate[0]))
    allow_blocking_sockets(context)

    def talk(sock: BlockingSocket) -> None:
        sock.sendall(b"say hello\n")
        with sock.makefile("rb") as file:
            assert file.readline() == b"hello\n"
        sock.sendall(b"close\n")
        assert sock.recv(1) == b""

    def session() -> None:
        with create_connection(peer.address, DEADLINE) as sock:
            if not secure:
                talk(sock)
                return
            plain: Any = sock
            wrapped: Any = context.wrap_socket(plain, server_hostname="127.0.0.1")
            with wrapped:
                talk(wrapped)

    for turns in itertools.count():
        task = spawn_stackful(session, reactor=reactor)
        for _ in range(turns):
            reactor.iterate(0.001)
        ended = task.done
        task.cancel()
        spin(reactor, lambda: task.done)
        assert task.cancelled != ended
        until_closed(reactor)
        if ended:
            break
    assert turns > 1
