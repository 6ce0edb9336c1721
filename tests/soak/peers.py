"""
The peers of the soak test: threads with plain blocking sockets.  They check every byte
that they receive.  Some of them leave in the middle of an operation.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import ssl
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from tests.soak import CHUNK, FILE_NAME, FILE_SIZE, pattern
from tests.support import RESET

PATIENCE = 60.0
"""Seconds that a peer waits for an answer.  A missing answer is a failure."""

SLOW_READ = 1 << 15
SLOW_PAUSE = 0.01

LEFT_EARLY = [
    b"",
    b"half a li",
    b"ECHO x\n" * 1000,
    b"TAKE 100000\n" + bytes(50_000),
    b"CHILD 300000\n",
    b"THREAD 1000\n",
]
"""Commands of all servers whose answers some peers do not wait for."""

Talk = Callable[["Peer"], None]


class Connection:
    """A socket, and the input that has arrived and was not used yet."""

    def __init__(self, handle: socket.socket) -> None:
        self.handle = handle
        self._rest = b""

    def send(self, data: bytes) -> None:
        self.handle.sendall(data)

    def line(self) -> bytes:
        while b"\n" not in self._rest:
            self._rest += self._more()
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def exactly(self, size: int) -> bytes:
        pieces, missing = [self._rest[:size]], size - len(self._rest)
        self._rest = self._rest[size:]
        while missing > 0:
            pieces.append(self._more(missing))
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def _more(self, size: int = CHUNK) -> bytes:
        data = self.handle.recv(min(size, CHUNK))
        if not data:
            raise EOFError("the server has closed the connection")
        return data

    def reset(self) -> None:
        """Reset the connection."""
        with contextlib.suppress(OSError):
            # A UNIX socket does not have this option.
            self.handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.handle.close()


class Peer:
    """
    A thread that calls ``talk`` again and again.

    :ivar random: the seeded source of all random choices, so that they are repeatable.
    """

    def __init__(self, talk: Talk, addresses: dict[str, Any], seed: int) -> None:
        self.talk = talk
        self.random = Random(f"{talk.__name__} {seed}")
        self.addresses = addresses
        self.stopping = threading.Event()
        self.times = 0
        self.failure = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()

    def join(self) -> None:
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self.failure = self.failure or "it did not end"

    def _run(self) -> None:
        try:
            while not self.stopping.is_set():
                self.talk(self)
                self.times += 1
        except BaseException:
            self.failure = traceback.format_exc()

    # Helpers of the talks

    def connect(self, *services: str) -> contextlib.closing[socket.socket]:
        """A connection to one of these services."""
        service = self.random.choice(services)
        address = self.addresses[service]
        if service == "unix":
            handle = socket.socket(socket.AF_UNIX)
            handle.settimeout(PATIENCE)
            handle.connect(address)
        else:
            handle = socket.create_connection(tuple(address), PATIENCE)
        if service in ("tls", "asyncio tls"):
            handle = self.secure(handle)
        return contextlib.closing(handle)

    def secure(self, handle: socket.socket) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.addresses["certificate"])
        return context.wrap_socket(handle, server_hostname="127.0.0.1")

    def part_of_the_file(self) -> tuple[int, int]:
        offset = self.random.randrange(FILE_SIZE)
        most = min(FILE_SIZE - offset, self.random.choice([100, 100_000, FILE_SIZE]))
        return offset, self.random.randint(1, most)


def digest(size: int) -> bytes:
    return hashlib.sha256(pattern(0, size)).hexdigest().encode()


def expect(got: object, wanted: object) -> None:
    if got != wanted:
        raise AssertionError(f"got {got!r:.200}, and not {wanted!r:.200}")


def echo_lines(peer: Peer, connection: Connection, most: int) -> None:
    """Send lines, up to four at a time, and receive them back."""
    for turn in range(peer.random.randint(1, most)):
        several = [b"ECHO %d.%d" % (turn, each) for each in range(turn % 4 + 1)]
        connection.send(b"".join(line + b"\n" for line in several))
        for line in several:
            expect(connection.line(), line)


def use_child_and_thread(peer: Peer, connection: Connection) -> int:
    """
    Let a child and a thread of the server work.

    :return: the size of their work.
    """
    size = peer.random.choice([1, 1000, 300_000])
    for verb in (b"CHILD", b"THREAD"):
        connection.send(b"%s %d\n" % (verb, size))
        expect(connection.line(), digest(size))
    return size


def send_pattern(connection: Connection, size: int) -> None:
    """Send bytes that the server has to read, and check that it has got them."""
    connection.send(b"TAKE %d\n" % size + pattern(0, size))
    expect(connection.line(), digest(size))


def leave_after(peer: Peer, connection: Connection, commands: list[bytes]) -> None:
    """Send one of these, receive a part of the answer or nothing, and leave."""
    with contextlib.suppress(OSError, EOFError):
        connection.send(peer.random.choice(commands))
        if peer.random.random() < 0.5:
            connection.handle.settimeout(0.05)
            connection.exactly(peer.random.choice([1, 1000, 100_000]))
    connection.reset()


# Peers that finish their operations


def lines(peer: Peer) -> None:
    """A conversation line by line, some lines at a time."""
    with peer.connect("tcp", "tls", "unix", "lines") as handle:
        echo_lines(peer, Connection(handle), 50)


def files(peer: Peer) -> None:
    """Parts of a file, which the server sends as a file or reads."""
    with peer.connect("tcp", "tls", "unix") as handle:
        connection = Connection(handle)
        for _ in range(peer.random.randint(1, 10)):
            offset, size = peer.part_of_the_file()
            verb = peer.random.choice([b"SEND", b"READ"])
            connection.send(b"%s %d %d\nECHO next\n" % (verb, offset, size))
            expect(connection.exactly(size) == pattern(offset, size), True)
            expect(connection.line(), b"ECHO next")


def slow_reader(peer: Peer) -> None:
    """A whole file, which is read so slowly that the server has to wait."""
    verb = peer.random.choice([b"SEND", b"READ"])
    with peer.connect("tcp", "tls", "unix") as handle:
        connection = Connection(handle)
        connection.send(b"%s 0 %d\n" % (verb, FILE_SIZE))
        for offset in range(0, FILE_SIZE, SLOW_READ):
            data = connection.exactly(SLOW_READ)
            expect(data == pattern(offset, SLOW_READ), True)
            peer.stopping.wait(SLOW_PAUSE)


def uploads(peer: Peer) -> None:
    """Data that the server has to read."""
    with peer.connect("tcp", "tls", "unix") as handle:
        send_pattern(Connection(handle), peer.random.choice([1, 1000, 2_000_000]))


def children_and_threads(peer: Peer) -> None:
    """Children of each kind, and threads."""
    with peer.connect("tcp", "tls", "unix") as handle:
        connection = Connection(handle)
        for _ in range(5):
            size = use_child_and_thread(peer, connection)
            connection.send(b"LEAVE %d\n" % size)
            expect(connection.line(), b"first")
            connection.send(b"SPAWN %d\n" % (size % 200))
            expect(connection.line(), b"%d" % (size % 200))


def start_tls(peer: Peer) -> None:
    """A connection that becomes encrypted in the middle."""
    with peer.connect("tcp") as handle:
        connection = Connection(handle)
        connection.send(b"ECHO plain\nSTARTTLS\n")
        expect(connection.line(), b"ECHO plain")
        expect(connection.line(), b"ready")
        with contextlib.closing(peer.secure(handle)) as encrypted:
            send_pattern(Connection(encrypted), peer.random.choice([1, 200_000]))


def web(peer: Peer) -> None:
    """Parts of the file by HTTP, and a file that is missing, over one connection."""
    host, port = peer.addresses["http"]
    client = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    with contextlib.closing(client):
        for _ in range(peer.random.randint(1, 5)):
            offset, size = peer.part_of_the_file()
            headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
            client.request("GET", f"/{FILE_NAME}", headers=headers)
            response = client.getresponse()
            expect(response.status, 206)
            expect(response.read() == pattern(offset, size), True)
        client.request("GET", "/no%20such%20file")
        response = client.getresponse()
        expect(response.status, 404)
        response.read()


def datagrams(peer: Peer) -> None:
    """Datagrams that the server sends back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        handle.settimeout(PATIENCE)
        handle.connect(tuple(peer.addresses["udp"]))
        for turn in range(50):
            handle.send(b"%d" % turn)
            expect(handle.recv(100), b"%d" % turn)


# Peers of asyncio's servers

ASYNCIO_VERBS = (
    *(b"EXIT", b"SPAWN", b"SIGNAL", b"HANDLER"),
    *(b"CANCEL", b"KILL", b"TWISTED"),
)
"""Commands that answer with their argument."""


def asyncio_lines(peer: Peer) -> None:
    """A conversation line by line, some lines at a time, and larger data."""
    with peer.connect("asyncio", "asyncio tls") as handle:
        connection = Connection(handle)
        echo_lines(peer, connection, 30)
        size = peer.random.choice([1, 1000, 1_000_000])
        send_pattern(connection, size)
        connection.send(b"SEND %d\nECHO next\n" % size)
        expect(connection.exactly(size) == pattern(0, size), True)
        expect(connection.line(), b"ECHO next")


def asyncio_work(peer: Peer) -> None:
    """Children, threads, signals, cancellations, and calls of Twisted."""
    with peer.connect("asyncio", "asyncio tls") as handle:
        connection = Connection(handle)
        for _ in range(5):
            use_child_and_thread(peer, connection)
            for verb in ASYNCIO_VERBS:
                number = peer.random.randrange(200)
                connection.send(b"%s %d\n" % (verb, number))
                expect(connection.line(), b"%d" % number)


def asyncio_leavers(peer: Peer) -> None:
    """Resets during the operations of asyncio."""
    commands = [b"SEND 3000000\n", b"SIGNAL 1\nHANDLER 1\nCANCEL 1\n"]
    with peer.connect("asyncio", "asyncio tls") as handle:
        leave_after(peer, Connection(handle), LEFT_EARLY + commands)


# Peers that leave or send wrong data


def leavers(peer: Peer) -> None:
    """Resets during all operations."""
    offset, size = peer.part_of_the_file()
    commands = [
        b"SEND %d %d\n" % (offset, size),
        b"READ %d %d\n" % (offset, size),
        b"LEAVE 300000\n",
        b"STARTTLS\n",
        b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % FILE_NAME.encode(),
    ]
    with peer.connect("tcp", "tls", "unix", "lines", "http") as handle:
        leave_after(peer, Connection(handle), LEFT_EARLY + commands)


def garbage(peer: Peer) -> None:
    """Data that is not TLS where the server expects TLS, and TLS that ends early."""
    service = peer.random.choice(["tls", "tcp"])
    address = tuple(peer.addresses[service])
    with socket.create_connection(address, PATIENCE) as handle:
        connection = Connection(handle)
        with contextlib.suppress(OSError, EOFError):
            if service == "tcp":
                connection.send(b"STARTTLS\n")
                expect(connection.line(), b"ready")
            connection.send(
                peer.random.choice(
                    [
                        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                        peer.random.randbytes(300),
                        b"\x16\x03\x01\x00\xff",
                    ]
                )
            )
            if peer.random.random() < 0.5:
                handle.shutdown(socket.SHUT_WR)
            while handle.recv(CHUNK):
                pass


def strangers(peer: Peer) -> None:
    """TLS clients that do not trust the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    address = tuple(peer.addresses["tls"])
    with socket.create_connection(address, PATIENCE) as handle:
        try:
            context.wrap_socket(handle, server_hostname="127.0.0.1")
        except ssl.SSLCertVerificationError:
            return
        raise AssertionError("it was trusted")


def sleepers(peer: Peer) -> None:
    """Clients that send nothing more, until the server closes the connection."""
    with peer.connect("tcp", "tls", "unix") as handle:
        connection = Connection(handle)
        connection.send(b"ECHO x\n")
        expect(connection.line(), b"ECHO x")
        try:
            data = handle.recv(1)
        except ConnectionError:
            return
        expect(data, b"")


TALKS: dict[Talk, int] = {
    lines: 2,
    files: 1,
    slow_reader: 3,
    uploads: 1,
    children_and_threads: 1,
    start_tls: 1,
    web: 1,
    datagrams: 1,
    leavers: 2,
    garbage: 1,
    strangers: 1,
    sleepers: 4,
}
"""The talks of the peers, and how many peers hold each of them at once."""

ASYNCIO_TALKS: dict[Talk, int] = {
    asyncio_lines: 2,
    asyncio_work: 2,
    asyncio_leavers: 1,
}
"""Further talks with a server that runs asyncio's servers as well."""


def talks_of(addresses: dict[str, Any]) -> dict[Talk, int]:
    """The talks with a server that has these addresses."""
    return {**TALKS, **ASYNCIO_TALKS} if "asyncio" in addresses else TALKS


class Crowd:
    """All peers at once."""

    def __init__(self, addresses: dict[str, Any]) -> None:
        self._peers = [
            Peer(talk, addresses, each)
            for talk, number in talks_of(addresses).items()
            for each in range(number)
        ]

    def failures(self) -> list[str]:
        return [
            f"{each.talk.__name__}: {each.failure}"
            for each in self._peers
            if each.failure
        ]

    def leave(self) -> Counter[str]:
        """
        Wait until all peers have finished their talks.

        :return: how often each talk was held.
        """
        for peer in self._peers:
            peer.stop()
        for peer in self._peers:
            peer.join()
        times: Counter[str] = Counter()
        for peer in self._peers:
            times[peer.talk.__name__] += peer.times
        return times
