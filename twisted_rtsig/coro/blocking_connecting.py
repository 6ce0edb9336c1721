"""
Connecting for blocking sockets, with the addresses, limits and errors of the functions
of ``socket``.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from typing import Any, Final

from twisted_rtsig.coro.blocking_errors import as_os_error, os_error, unsupported
from twisted_rtsig.coro.errors import ConnectFailed
from twisted_rtsig.coro.opening import open_tcp, open_unix
from twisted_rtsig.coro.stacks import check_can_wait, wait
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.threads import in_thread

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

_EAI_ADDRFAMILY: Final[int] = getattr(socket, "EAI_ADDRFAMILY", socket.EAI_NONAME)


def connect_tcp(
    address: Any,
    family: int,
    kind: int,
    proto: int,
    timeout: float | None,
    source: tuple[str, int] | None,
) -> Stream:
    """
    Connect to an address of one family, as ``socket.socket.connect``.

    :param source: the host and the port of this side; None for any.
    """
    host, port = address[:2]
    if not isinstance(port, int):
        raise TypeError("a port must be an integer")
    if not 0 <= port < 1 << 16:
        raise OverflowError("connect(): port must be 0-65535.")
    # Resolve here, since only addresses of one family are allowed, and the scope of a
    # link-local address is given as a number.
    found = getaddrinfo(host, port, family, kind, proto)
    where = found[0][4]
    numeric = str(where[0])
    if len(address) == 4 and address[3] and "%" not in numeric:
        numeric = f"{numeric}%{address[3]}"
    return connect_to_host((numeric, port), timeout, source)


def connect_unix(address: Any, timeout: float | None) -> Stream:
    """Connect to a UNIX socket, as ``socket.socket.connect``."""
    limit = 1e9 if timeout is None else timeout
    path = os.fsdecode(address)
    try:
        return wait(open_unix(path, connect_timeout=limit))
    except ConnectFailed as error:
        raise as_os_error(error.errors[-1]) from None


def connect_to_host(
    address: tuple[str | None, int | str],
    timeout: float | None,
    source: tuple[str, int] | None,
    all_errors: bool = False,
) -> Stream:
    """Connect to the first address of a name, as ``socket.create_connection``."""
    check_can_wait()
    host, port = address
    number: Any = port
    if isinstance(port, str):
        # The port may be the name of a service.
        number = getaddrinfo(None, port, type=socket.SOCK_STREAM)[0][4][1]
    if not number:
        raise os_error(errno.ECONNREFUSED)
    try:
        return wait(
            open_tcp(
                host or "localhost",
                number,
                local_address=source,
                connect_timeout=timeout,
            )
        )
    except ConnectFailed as error:
        failed = error
    except ValueError as error:
        # The host is neither a name nor an address, or the port is out of range.
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from None
    error_to_raise = _of_create_connection(failed, source is not None, all_errors)
    try:
        raise error_to_raise
    finally:
        # The traceback refers to this frame.
        del failed, error_to_raise


def _of_create_connection(
    failed: ConnectFailed, bound: bool, all_errors: bool
) -> Exception:
    """The error that ``socket.create_connection`` raises."""
    if not failed.errors:
        code = _EAI_ADDRFAMILY if bound else socket.EAI_NONAME
        return socket.gaierror(code, str(failed))
    causes = [as_os_error(each) for each in failed.errors]
    if all_errors:
        return ExceptionGroup("create_connection failed", causes)
    return causes[-1]


def check_timeout(seconds: float | None) -> None:
    """
    Check a timeout for connecting.

    :raises ValueError: if it is negative.
    :raises io.UnsupportedOperation: if it is 0.
    """
    if seconds is None:
        return
    if not seconds >= 0:
        raise ValueError("Timeout value out of range")
    if not seconds:
        raise unsupported(
            "a socket of the reactor cannot connect with the timeout 0: set it later"
        )


# Names: the functions of socket, in a thread of the reactor


def getaddrinfo(
    host: bytes | str | None,
    port: bytes | str | int | None,
    family: int = 0,
    type: int = 0,
    proto: int = 0,
    flags: int = 0,
) -> list[tuple[Any, Any, int, str, Any]]:
    """As ``socket.getaddrinfo``; a thread asks the resolver, and the task waits."""
    try:
        # A numeric address needs no resolver.
        return socket.getaddrinfo(
            host, port, family, type, proto, flags | socket.AI_NUMERICHOST
        )
    except socket.gaierror:
        if flags & socket.AI_NUMERICHOST:
            raise
    return wait(in_thread(socket.getaddrinfo, host, port, family, type, proto, flags))
