"""Connections to the name of a host, and to UNIX sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import TCP4ServerEndpoint, UNIXServerEndpoint
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import IHostnameResolver, IReactorUNIX
from twisted.internet.ssl import PrivateCertificate, optionsForClientTLS
from zope.interface import implementer

from tests.coro.support import STYLES, listen, run, run_for_real, spin, tls_endpoint
from tests.support import DEADLINE, refusing_port
from twisted_rtsig.coro import (
    ConnectFailed,
    Stream,
    TLSError,
    open_tcp,
    open_unix,
    serve,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.interfaces import Address

# Twisted and pyOpenSSL hold different opinions on what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NAME = "host.example"

has_ipv6 = False
if socket.has_ipv6:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        has_ipv6 = True


@implementer(IHostnameResolver)
class Resolver:
    """Knows the addresses of every name; or keeps silent, if these are None."""

    def __init__(self, reactor: Any, addresses: list[str] | None) -> None:
        self.addresses = addresses
        self.asked: list[str] = []
        reactor.installNameResolver(self)

    def resolveHostName(
        self,
        resolutionReceiver: Any,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Any = None,
        transportSemantics: str = "TCP",
    ) -> Any:
        self.asked.append(hostName)
        resolutionReceiver.resolutionBegan(None)
        if self.addresses is None:
            return
        for each in self.addresses:
            host, _, zone = each.partition("%")
            resolutionReceiver.addressResolved(
                IPv6Address("TCP", host, portNumber, 0, int(zone or 0))
                if ":" in host
                else IPv4Address("TCP", host, portNumber)
            )
        resolutionReceiver.resolutionComplete()


async def greet(stream: Stream) -> None:
    await stream.write(b"hello\n")


def ip_of(address: Address) -> str:
    """That of an address of TCP."""
    assert not isinstance(address, UNIXAddress)
    return str(address.host)


def port_of(server: Any) -> int:
    port: int = server.port.getHost().port
    return port


@contextlib.contextmanager
def silent_host() -> Iterator[tuple[str, int]]:
    """An address that answers no attempt to connect: its backlog is full."""
    with contextlib.ExitStack() as sockets:
        port = sockets.enter_context(socket.socket())
        port.bind(("127.0.0.1", 0))
        port.listen(0)
        while True:
            client = sockets.enter_context(socket.socket())
            client.settimeout(0.1)
            try:
                client.connect(port.getsockname())
            except TimeoutError:
                break
        yield port.getsockname()


def open_sockets() -> set[str]:
    """The sockets of this process: reactors open other descriptors when they run."""
    found = set()
    for each in os.listdir("/proc/self/fd"):
        # That of the folder is closed by now.
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{each}"))
    return {each for each in found if each.startswith("socket:")}


needs_silent_host = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="other systems refuse connections when the backlog is full",
)


# Which addresses are tried, and when


@pytest.mark.parametrize("style", STYLES)
def test_in_each_style(reactor: Any, style: str) -> None:
    server = run(reactor, listen, reactor, greet)
    got: list[Any] = []
    STYLES[style](reactor, [lambda: open_tcp("127.0.0.1", port_of(server))], got)
    spin(reactor, lambda: got)
    (stream,) = got

    async def main() -> None:
        assert await stream.read_line() == b"hello"
        assert ip_of(stream.peer) == "127.0.0.1"
        await stream.close()
        await server.stop()

    run(reactor, main)


def test_a_name_of_this_machine(reactor: Any) -> None:
    async def main() -> None:
        server = await listen(reactor, greet)
        # Perhaps an IPv6 address as well, where nothing listens.
        async with await open_tcp("localhost", port_of(server)) as stream:
            assert await stream.read_line() == b"hello"
        await server.stop()

    # The resolver needs threads.
    run_for_real(reactor, main)


@pytest.mark.skipif(not has_ipv6, reason="there is no IPv6")
@pytest.mark.parametrize("host", ["::1", NAME])
def test_ipv6(reactor: Any, host: str) -> None:
    Resolver(reactor, ["::1", "127.0.0.1"])

    async def main() -> None:
        endpoint = TCP4ServerEndpoint(reactor, 0, interface="::1")
        server = await serve(endpoint, greet)
        async with await open_tcp(host, port_of(server)) as stream:
            assert ip_of(stream.peer) == "::1"
            assert await stream.read_line() == b"hello"
        await server.stop()

    run(reactor, main)


def test_after_a_failed_attempt_the_next_one_begins_at_once(reactor: Any) -> None:
    Resolver(reactor, ["127.0.0.2", "::1", "127.0.0.1"])

    async def main() -> None:
        server = await listen(reactor, greet)
        opening = open_tcp(NAME, port_of(server), happy_eyeballs_delay=10 * DEADLINE)
        async with await opening as stream:
            assert await stream.read_line() == b"hello"
        await server.stop()

    run(reactor, main)


def test_the_families_take_turns(reactor: Any) -> None:
    # The last two are for documentation, and are not tried twice.
    Resolver(reactor, ["::1", "::2", "::1", "::3", "127.0.0.2", "127.0.0.1"])

    async def main(port: int) -> None:
        # A port of IPv4 to refuse may be an open one of IPv6: bind none.
        with pytest.raises(ConnectFailed) as caught:
            await open_tcp(NAME, port, happy_eyeballs_delay=None, connect_timeout=0.05)
        tried = [each.split(": ")[0] for each in reasons(caught.value)]
        assert tried == ["::1", "127.0.0.2", "::2", "127.0.0.1", "::3"]

    with refusing_port() as port:
        run(reactor, main, port)


def reasons(error: ConnectFailed) -> list[str]:
    return str(error).partition(f"port {error.port}: ")[2].split("; ")


@needs_silent_host
def test_a_silent_address_does_not_delay_the_next_one(reactor: Any) -> None:
    async def main() -> None:
        with silent_host() as (silent, port):
            Resolver(reactor, [silent, "127.0.0.3"])
            before = open_sockets()
            endpoint = TCP4ServerEndpoint(reactor, port, interface="127.0.0.3")
            server = await serve(endpoint, greet)
            opening = open_tcp(NAME, port, happy_eyeballs_delay=0.01)
            async with await opening as stream:
                assert ip_of(stream.peer) == "127.0.0.3"
                # The other attempt is given up: what is open more than before is the
                # two sides of the connection, and the port.
                assert len(open_sockets() - before) == 3
            await server.stop()

    run(reactor, main)


@needs_silent_host
def test_cancelling_gives_up_all_attempts(reactor: Any) -> None:
    async def main() -> None:
        with silent_host() as (silent, port):
            resolver = Resolver(reactor, [silent])
            before = open_sockets()
            opening = spawn(open_tcp, NAME, port)
            while open_sockets() == before:
                await sleep(0.001)
            with pytest.raises(TimeoutError), timeout(0.01):
                await open_tcp(silent, port)
            opening.cancel()
            with pytest.raises(CancelledError):
                await opening
            assert open_sockets() == before
            # Also while the name is being resolved.
            resolver.addresses = None
            with pytest.raises(TimeoutError), timeout(0.01):
                await open_tcp(NAME, port)

    run(reactor, main)


@needs_silent_host
def test_each_attempt_has_a_limit(reactor: Any) -> None:
    async def main() -> None:
        with silent_host() as host, pytest.raises(ConnectFailed, match="timeout"):
            await open_tcp(*host, connect_timeout=0.01)

    run(reactor, main)


def test_the_address_of_this_side(reactor: Any) -> None:
    Resolver(reactor, ["::1", "127.0.0.1"])

    async def main() -> None:
        server = await listen(reactor, greet)
        port = port_of(server)
        async with await open_tcp(NAME, port, local_address="127.0.0.5") as stream:
            assert ip_of(stream.host) == "127.0.0.5"
        with pytest.raises(ConnectFailed, match=r"of the family of 127\.0\.0\.5"):
            await open_tcp("::1", port, local_address=("127.0.0.5", 0))
        await server.stop()

    run(reactor, main)


# What goes wrong


def test_all_attempts_fail(reactor: Any) -> None:
    async def main(port: int) -> None:
        Resolver(reactor, ["127.0.0.1"])
        with pytest.raises(ConnectFailed) as caught:
            await open_tcp(NAME, port)
        error = caught.value
        assert isinstance(error, OSError)
        assert isinstance(error, ConnectError)
        assert (error.host, error.port) == (NAME, port)
        assert str(error).startswith(
            f"cannot connect to '{NAME}', port {port}: 127.0.0.1: Connection was "
            "refused"
        )
        assert [error.__cause__] == error.errors
        Resolver(reactor, ["127.0.0.1", "127.0.0.2"])
        with pytest.raises(ConnectFailed) as caught:
            await open_tcp(NAME, port)
        assert len(reasons(caught.value)) == len(caught.value.errors) == 2
        cause: Any = caught.value.__cause__
        assert list(cause.exceptions) == caught.value.errors

    with refusing_port() as port:
        run(reactor, main, port)


def test_a_name_without_addresses(reactor: Any) -> None:
    async def main() -> None:
        Resolver(reactor, [])
        with pytest.raises(ConnectFailed) as caught:
            await open_tcp(NAME, 80)
        assert str(caught.value) == (
            f"cannot connect to '{NAME}', port 80: the name has no address"
        )

    run(reactor, main)


def test_internationalized_names(reactor: Any) -> None:
    async def main() -> None:
        resolver = Resolver(reactor, [])
        for name in ("Bücher.example", "straße.example", "with_underscore", "a.b."):
            with pytest.raises(ConnectFailed, match=name):
                await open_tcp(name, 80)
        assert resolver.asked == [
            "xn--bcher-kva.example",
            # By IDNA 2003 it would be strasse.example.
            "xn--strae-oqa.example",
            "with_underscore",
            "a.b.",
        ]

    run(reactor, main)


@pytest.mark.skipif(not has_ipv6, reason="there is no IPv6")
def test_the_zone_of_an_address(reactor: Any) -> None:
    zone = socket.if_nameindex()[0]

    async def main() -> None:
        for host in (f"fe80::1%{zone[1]}", f"fe80::1%{zone[0]}"):
            with pytest.raises(ConnectFailed) as caught:
                await open_tcp(host, 9, connect_timeout=0.05)
            assert reasons(caught.value)[0].startswith(f"{host}: ")
            # This is what the kernel says without a zone.
            assert "Invalid argument" not in str(caught.value)
        Resolver(reactor, [f"fe80::1%{zone[0]}"])
        with pytest.raises(ConnectFailed) as caught:
            await open_tcp(NAME, 9, connect_timeout=0.05)
        assert reasons(caught.value)[0].startswith(f"fe80::1%{zone[0]}: ")

    run(reactor, main)


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("", "no name of a host"),
        ("[::1]", "an address as"),
        ("a..b", "no name of a host"),
        ("x" * 64, "no name of a host"),
        ("example.com\n", "no name of a host"),
        ("example.com:80", "no name of a host"),
        ("\N{SNOWMAN WITHOUT SNOW}\N{ZERO WIDTH SPACE}..", "no name of a host"),
    ],
)
def test_bad_hosts_are_refused(reactor: Any, host: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        open_tcp(host, 80)


@pytest.mark.parametrize(
    "options",
    [
        {"port": 0},
        {"port": 1 << 16},
        {"happy_eyeballs_delay": -1},
        {"connect_timeout": float("nan")},
        {"server_hostname": "localhost"},
        {"tls": True, "server_hostname": "not a name"},
    ],
)
def test_arguments_out_of_range(reactor: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(options)):
        open_tcp(**{"host": "localhost", "port": 80, **options})


def test_a_host_of_another_type_is_refused(reactor: Any) -> None:
    with pytest.raises(TypeError, match="as a str"):
        open_tcp(b"localhost", 80)  # type: ignore[arg-type]


# TLS


def test_tls(
    reactor: Any,
    certificate: PrivateCertificate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(certificate.dump(1))

    async def main() -> None:
        server = await serve(tls_endpoint(reactor, certificate), greet)
        port = port_of(server)
        with pytest.raises(TLSError, match="verify failed"):
            await open_tcp("127.0.0.1", port, tls=True)
        # The authorities that OpenSSL trusts.
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        async with await open_tcp("127.0.0.1", port, tls=True) as stream:
            assert stream.tls is not None
            assert await stream.read_line() == b"hello"
        with pytest.raises(TLSError):
            await open_tcp("127.0.0.1", port, tls=True, server_hostname=NAME)
        Resolver(reactor, ["127.0.0.1"])
        opening = open_tcp(NAME, port, tls=True, server_hostname="127.0.0.1")
        async with await opening as stream:
            assert await stream.read_line() == b"hello"
        options = optionsForClientTLS("127.0.0.1", certificate)
        async with await open_tcp(NAME, port, tls=options) as stream:
            assert await stream.read_line() == b"hello"
        with pytest.raises(ValueError, match="give the name to"):
            open_tcp(NAME, port, tls=options, server_hostname=NAME)
        await server.stop()

    run(reactor, main)


def test_a_missing_handshake_times_out(reactor: Any) -> None:
    async def quiet(stream: Stream) -> None:
        ended.append(await stream.read_until_regex(b"(?s).*never"))

    ended: list[bytes] = []

    async def main() -> None:
        server = await listen(reactor, quiet)
        port = port_of(server)
        with pytest.raises(TLSError, match="handshake"):
            await open_tcp("127.0.0.1", port, tls=True, handshake_timeout=0.01)
        # To cancel it ends the connection.
        with pytest.raises(TimeoutError), timeout(0.01):
            await open_tcp("127.0.0.1", port, tls=True)
        while server.factory.connections:
            await sleep(0.001)
        await server.stop()

    run(reactor, main)


def test_without_pyopenssl() -> None:
    program = (
        "import sys\n"
        "sys.modules['OpenSSL'] = None\n"
        "from twisted_rtsig.coro import open_tcp\n"
        "try:\n"
        "    open_tcp('localhost', 443, tls=True)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "TLS needs pyOpenSSL: pip install twisted-rtsig[tls]\n"


# UNIX sockets


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """The path of a UNIX socket may not be long."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_unix_socket(reactor: Any, short_folder: Path) -> None:
    path = short_folder / "socket"
    if not IReactorUNIX.providedBy(reactor):
        with pytest.raises(NotImplementedError, match="open_tcp"):
            open_unix(path)
        return

    async def main() -> None:
        server = await serve(UNIXServerEndpoint(reactor, str(path)), greet)
        async with await open_unix(path) as stream:
            assert await stream.read_line() == b"hello"
        await server.stop()
        with pytest.raises(ConnectFailed, match=r"socket'.*No such file") as caught:
            await open_unix(path)
        assert caught.value.port is None

    run(reactor, main)


def test_cancelling_after_the_connection_closes_it(
    reactor: Any,
) -> None:
    async def handler(stream: Stream) -> None:
        await stream.read()

    async def main() -> None:
        server = await listen(reactor, handler)
        opening = spawn(open_tcp, "127.0.0.1", port_of(server))
        while not server.factory.connections:
            await sleep(0)
        opening.cancel()
        with contextlib.suppress(CancelledError):
            # It was too late to cancel it.
            await (await opening).close()
        while server.factory.connections:
            await sleep(0.001)
        await server.stop()

    run(reactor, main)
