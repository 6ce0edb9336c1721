"""
Connecting by the name of a host, or by the path of a UNIX socket.

Twisted's ``HostnameEndpoint`` tries all addresses of a name as well.  It is not used
here for four reasons: after a failed attempt it waits for the rest of the delay; it
tries the addresses in the order of the resolver, family by family; it loses the zone of
an IPv6 address; and it reports only the last error.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, Final

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    UNIXClientEndpoint,
    wrapClientTLS,
)
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import (
    IOpenSSLClientConnectionCreator,
    IReactorUNIX,
    IResolutionReceiver,
)
from zope.interface import implementer

from twisted_rtsig.coro.clients import connect
from twisted_rtsig.coro.errors import ConnectFailed
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.groups import TaskGroup
from twisted_rtsig.coro.handshakes import DEFAULT_TLS_LIMITS
from twisted_rtsig.coro.locks import Event
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.selection import Deadline, select
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.tasks import raise_if_cancelled

HAPPY_EYEBALLS_DELAY: Final = 0.25
"""Seconds between two attempts: the value that RFC 8305, section 8, recommends."""

CONNECT_TIMEOUT: Final = 30.0
"""How many seconds an attempt to connect may take, by default."""

_Address = IPv4Address | IPv6Address


@must_be_awaited
def open_tcp(
    host: str,
    port: int,
    *,
    tls: bool | IOpenSSLClientConnectionCreator = False,
    server_hostname: str | None = None,
    local_address: str | tuple[str, int] | None = None,
    happy_eyeballs_delay: float | None = HAPPY_EYEBALLS_DELAY,
    connect_timeout: float | None = CONNECT_TIMEOUT,
    handshake_timeout: float | None = DEFAULT_TLS_LIMITS.handshake,
    close_timeout: float | None = DEFAULT_TLS_LIMITS.close,
    reactor: Any | None = None,
) -> Deferred[Stream]:
    """
    Connect to a host by TCP, or by TLS over TCP::

        async with await open_tcp("example.com", 443, tls=True) as stream:
            await stream.write(b"GET / HTTP/1.0\\r\\n\\r\\n")

    If the name has several addresses, they are tried as RFC 8305 ("Happy Eyeballs")
    says: IPv6 and IPv4 take turns, the next attempt begins when the last one has failed
    or ``happy_eyeballs_delay`` has passed, and the first connection wins.  The other
    attempts are cancelled.  If this is cancelled, all attempts are.

    :param host: a name, which may be an internationalized one; or an IPv4 or IPv6
        address.  A link-local IPv6 address has a zone (``"fe80::1%eth0"``).
    :param port: 1 to 65535.
    :param tls: True to encrypt the connection, and to verify the certificate of the
        host by the authorities that this system trusts; or the result of
        ``twisted.internet.ssl.optionsForClientTLS``.  With TLS the stream is returned
        when the handshake is done.
    :param server_hostname: the name that the certificate must be for, with
        ``tls=True``; by default ``host``.
    :param local_address: the address of this side, or the address and the port.  Only
        addresses of the same family are tried.
    :param happy_eyeballs_delay: seconds from the begin of one attempt to the next; None
        for one attempt after the other.
    :param connect_timeout: how many seconds each attempt may take; None for the limit
        of the operating system.
    :param handshake_timeout: as for :func:`connect`.
    :param close_timeout: as for :func:`connect`.
    :param reactor: an ``IReactorTCP`` provider; by default that of the task.
    :raises ConnectFailed: if the name has no address, or all attempts have failed.  It
        is an ``OSError``, and a ``ConnectError`` of Twisted.
    :raises TLSError: if the handshake fails, for example because the certificate is for
        another host.
    :raises ValueError: if an argument is out of range, or ``host`` is neither a name
        nor an address.
    :raises ImportError: if TLS is asked for, and pyOpenSSL is not installed.
    """
    name, literal = _check_host(host)
    if not 0 < port < 1 << 16:
        raise ValueError(f"port={port}: the ports of TCP are 1 to 65535")
    for what, seconds in (
        ("happy_eyeballs_delay", happy_eyeballs_delay),
        ("connect_timeout", connect_timeout),
    ):
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"{what}={seconds}: it must not be negative, or None")
    options = _tls_options(tls, server_hostname, name)
    if isinstance(local_address, str):
        local_address = local_address, 0
    reactor = scheduler_for(reactor).reactor
    # Twisted takes None, though its annotation does not say so.
    limit: Any = connect_timeout

    def attempt(address: _Address) -> Deferred[Stream]:
        kind = (
            TCP6ClientEndpoint
            if isinstance(address, IPv6Address)
            else TCP4ClientEndpoint
        )
        endpoint: Any = kind(reactor, address.host, address.port, limit, local_address)
        if options is not None:
            endpoint = wrapClientTLS(options, endpoint)
        return connect(
            endpoint,
            reactor,
            handshake_timeout=handshake_timeout,
            close_timeout=close_timeout,
        )

    async def open_stream() -> Stream:
        if literal is None:
            addresses = _interleaved(await _resolve(reactor, name, port))
        else:
            addresses = [literal("TCP", name, port)]
        if not addresses:
            raise ConnectFailed(host, port, ["the name has no address"])
        if local_address is not None:
            family = IPv6Address if ":" in local_address[0] else IPv4Address
            addresses = [each for each in addresses if isinstance(each, family)]
            if not addresses:
                why = f"no address is of the family of {local_address[0]}"
                raise ConnectFailed(host, port, [why])
        race = _Race()
        stream = await race.run(addresses, attempt, happy_eyeballs_delay)
        if stream is None:
            raise ConnectFailed(host, port, race.reasons(), race.errors)
        return await _ready(stream, encrypted=options is not None)

    return spawn(
        open_stream, name=f"open_tcp({host!r}, {port})", reactor=reactor
    ).as_deferred()


async def _ready(stream: Stream, encrypted: bool = False) -> Stream:
    """
    Return a stream that was connected, once its handshake is done; abort it if that
    fails, or if the task was cancelled meanwhile.
    """
    try:
        if encrypted:
            await stream.handshake()
        raise_if_cancelled()
    except BaseException:
        stream.abort()
        raise
    return stream


class _Race:
    """
    Attempts to connect, of which the first to succeed wins.

    :ivar errors: the errors of the failed attempts, in the order of the failures.
    """

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self._failed: list[_Address] = []
        self._winner: Stream | None = None

    async def run(
        self,
        addresses: Sequence[_Address],
        attempt: Any,
        delay: float | None,
    ) -> Stream | None:
        """Return the stream of the first connection; None if all attempts failed."""
        try:
            async with TaskGroup() as group:
                for address in addresses:
                    failed = Event()
                    group.spawn(
                        self._try,
                        attempt,
                        address,
                        failed,
                        group,
                        name=f"attempt to connect to {address.host}",
                    )
                    if delay is None:
                        await failed.wait()
                    elif address is not addresses[-1]:
                        await select(failed, Deadline(delay))
        except BaseException:
            if self._winner is not None:
                self._winner.abort()
            raise
        winner, self._winner = self._winner, None
        return winner

    async def _try(
        self, attempt: Any, address: _Address, failed: Event, group: TaskGroup
    ) -> None:
        try:
            stream = await attempt(address)
        except Exception as error:
            # The frames of the traceback lead back to this object.
            self.errors.append(error.with_traceback(None))
            self._failed.append(address)
            failed.set()
        else:
            if self._winner is not None:
                # Two attempts have succeeded in one turn of the reactor.
                stream.abort()
                return
            self._winner = stream
            group.cancel()

    def reasons(self) -> list[str]:
        """Why each attempt has failed."""
        return [
            f"{address.host}: {str(error).rstrip('.')}"
            for address, error in zip(self._failed, self.errors, strict=True)
        ]


# Names and addresses


def _check_host(
    host: str, what: str = "host"
) -> tuple[str, type[IPv4Address | IPv6Address] | None]:
    """
    Return the host as the resolver takes it, in ASCII; and the type of the address, or
    None if the host is a name.
    """
    if not isinstance(host, str):
        raise TypeError(f"{what}={host!r}: give the name or the address as a str")
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return host, IPv4Address if literal.version == 4 else IPv6Address
    name = host
    if not name.isascii():
        try:
            name = _idna(name)
        except UnicodeError as error:
            raise ValueError(f"{what}={host!r} is no name of a host: {error}") from None
    labels = name.removesuffix(".").split(".")
    if (
        not all(0 < len(label) < 64 for label in labels)
        or len(name) > 254
        or any(not each.isprintable() or each in " []:/@%" for each in name)
    ):
        raise ValueError(
            f"{what}={host!r} is no name of a host, and no address: give a name as "
            "'example.com', or an address as '192.0.2.1' or '2001:db8::1'"
        )
    return name, None


def _idna(name: str) -> str:
    """
    Return a name in the ASCII form of the DNS, for both the resolver and TLS.  Python's
    resolver would use IDNA 2003, which encodes some names in another way.
    """
    try:
        import idna
    except ImportError:
        return name.encode("idna").decode("ascii")
    return idna.encode(name, uts46=True).decode("ascii")


@implementer(IResolutionReceiver)
class _Receiver:
    """Gathers the addresses of a name."""

    def __init__(self) -> None:
        self.addresses: list[_Address] = []
        self.complete: Operation[None] = Operation()

    def resolutionBegan(self, resolutionInProgress: Any) -> None:
        """See ``IResolutionReceiver.resolutionBegan``."""

    def addressResolved(self, address: Any) -> None:
        """See ``IResolutionReceiver.addressResolved``."""
        if isinstance(address, IPv6Address) and address.scopeID:
            # The endpoint takes the host only, so the zone becomes a part of it.
            zoned = f"{address.host.partition('%')[0]}%{address.scopeID}"
            address = IPv6Address("TCP", zoned, address.port)
        if (
            isinstance(address, IPv4Address | IPv6Address)
            and address not in self.addresses
        ):
            self.addresses.append(address)

    def resolutionComplete(self) -> None:
        """See ``IResolutionReceiver.resolutionComplete``."""
        # Unless the wait was cancelled: Twisted's resolver cannot be.
        if not self.complete.called:
            self.complete.succeed(None)


async def _resolve(reactor: Any, name: str, port: int) -> list[_Address]:
    receiver = _Receiver()
    reactor.nameResolver.resolveHostName(receiver, name, portNumber=port)
    await receiver.complete
    return receiver.addresses


def _interleaved(addresses: Sequence[_Address]) -> list[_Address]:
    """
    The addresses, so that the families take turns, beginning with the family of the
    first address: see RFC 8305, section 4.  The resolver has sorted the addresses of
    each family (RFC 6724).
    """
    if not addresses:
        return []
    first = type(addresses[0])
    pairs = zip_longest(
        (each for each in addresses if isinstance(each, first)),
        (each for each in addresses if not isinstance(each, first)),
    )
    return [each for each in chain.from_iterable(pairs) if each is not None]


# TLS


def _tls_options(
    tls: bool | IOpenSSLClientConnectionCreator, server_hostname: str | None, name: str
) -> IOpenSSLClientConnectionCreator | None:
    if tls is False:
        if server_hostname is not None:
            raise ValueError(
                f"server_hostname={server_hostname!r} needs tls=True: without TLS "
                "there is no certificate"
            )
        return None
    try:
        from twisted.internet.ssl import optionsForClientTLS
    except ImportError as error:
        raise ImportError(
            "TLS needs pyOpenSSL: pip install twisted-rtsig[tls]"
        ) from error
    if tls is not True:
        if server_hostname is not None:
            raise ValueError(
                f"server_hostname={server_hostname!r} needs tls=True: give the name to "
                "optionsForClientTLS() instead"
            )
        return tls
    if server_hostname is not None:
        name, _ = _check_host(server_hostname, "server_hostname")
    # A certificate has an address without its zone, and a name without the final dot
    # that makes it absolute.
    verified = name.partition("%")[0].removesuffix(".")
    try:
        made: IOpenSSLClientConnectionCreator = optionsForClientTLS(verified)
    except UnicodeError as error:
        raise ValueError(
            f"no certificate can be for {verified!r}: {error}; give the name that the "
            "certificate is for as server_hostname"
        ) from None
    return made


# UNIX sockets


@must_be_awaited
def open_unix(
    path: str | os.PathLike[str],
    *,
    connect_timeout: float = CONNECT_TIMEOUT,
    reactor: Any | None = None,
) -> Deferred[Stream]:
    """
    Connect to a UNIX socket.

    :param path: the path of the socket; on Linux ``"\\0name"`` is a socket in the
        abstract namespace.
    :param connect_timeout: how many seconds the attempt may take.
    :param reactor: an ``IReactorUNIX`` provider; by default that of the task.
    :raises ConnectFailed: if the attempt fails.  It is an ``OSError``, and a
        ``ConnectError`` of Twisted.
    :raises NotImplementedError: if the reactor has no UNIX sockets, as on Windows.
    """
    reactor = scheduler_for(reactor).reactor
    if not IReactorUNIX.providedBy(reactor):
        raise NotImplementedError(
            f"{type(reactor).__name__} has no UNIX sockets on {sys.platform}: use "
            "open_tcp() on the loopback interface"
        )
    where = os.fspath(path)

    async def open_stream() -> Stream:
        endpoint = UNIXClientEndpoint(reactor, where, connect_timeout)
        try:
            stream = await connect(endpoint, reactor)
        except ConnectError as error:
            reason = str(error).rstrip(".")
            raise ConnectFailed(where, None, [reason], [error]) from None
        return await _ready(stream)

    return spawn(
        open_stream, name=f"open_unix({where!r})", reactor=reactor
    ).as_deferred()
