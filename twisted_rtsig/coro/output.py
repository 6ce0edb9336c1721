"""
What lies below a stream: the output that the peer has not taken yet, the input that
was not read yet, and TLS.
"""

from __future__ import annotations

import struct
import sys
from typing import Any, Final

_SIZE: Final = struct.Struct("i")

if sys.platform != "win32":
    import fcntl
    import termios

    # By the beginning of sys.platform: the ioctl(2) request for the number of bytes in
    # the send queue of a socket.  Of TCP these are the bytes that the peer has not
    # acknowledged.
    _REQUESTS: Final = {
        # SIOCOUTQ, which tcp(7) and unix(7) describe, has the number of TIOCOUTQ.
        "linux": termios.TIOCOUTQ,
        # FIONWRITE, _IOR('f', 119, int) in <sys/filio.h>; and as NetBSD numbers it.
        "freebsd": 0x40046677,
        "netbsd": 0x40046679,
    }
    _REQUEST: Final = next(
        (each for name, each in _REQUESTS.items() if sys.platform.startswith(name)),
        None,
    )

# The same as a socket option of macOS, in <sys/socket.h>.
_SO_NWRITE: Final = 0x1024


def pending_output(transport: Any) -> tuple[int, int] | None:
    """
    How much of what was written to ``transport`` the peer has not taken yet.

    :return: how many bytes the transport holds back; and how many are in the send queue
        of the kernel, which is 0 where the kernel does not tell, as on Windows and
        OpenBSD.  The kernel of the peer takes from there what fits into its receive
        buffer.  None if there is neither a transport that tells nor a socket.
    """
    lowest = _lowest(transport)
    queue = _send_queue(lowest)
    buffer = getattr(lowest, "dataBuffer", None)
    if buffer is None:
        return None if queue is None else (0, queue)
    return len(buffer) - lowest.offset + lowest._tempDataLen, queue or 0


def unread_input(transport: Any) -> int | None:
    """
    How many bytes the kernel has received for ``transport`` that were not read yet, the
    encryption of TLS included.

    :return: None if the kernel does not tell: there is no socket or pipe, for example.
    """
    number = descriptor(transport)
    if number is None or number < 0:
        return None
    if sys.platform == "win32":
        from twisted_rtsig.windows.calls import bytes_to_read

        return bytes_to_read(number)
    try:
        answer = fcntl.ioctl(number, termios.FIONREAD, bytes(_SIZE.size))
    except OSError:
        return None
    return int(_SIZE.unpack(answer)[0])


def descriptor(transport: Any) -> int | None:
    """The descriptor of a transport's socket, or of the pipe that it reads."""
    try:
        number: int = _lowest(transport).fileno()
    except (AttributeError, OSError, ValueError):
        return None
    return number


def unsent_output(transport: Any) -> int:
    """How many bytes ``transport`` holds back, below TLS."""
    lowest = _lowest(transport)
    held = len(getattr(lowest, "dataBuffer", b"")) - getattr(lowest, "offset", 0)
    more: int = getattr(lowest, "_tempDataLen", 0)
    return held + more


def _lowest(transport: Any) -> Any:
    while (below := getattr(transport, "transport", None)) is not None:
        transport = below
    return transport


def _send_queue(transport: Any) -> int | None:
    try:
        if sys.platform == "win32":
            return None
        if sys.platform == "darwin":
            import socket

            size: int = transport.socket.getsockopt(socket.SOL_SOCKET, _SO_NWRITE)
            return size
        if _REQUEST is None:
            return None
        answer = fcntl.ioctl(transport.fileno(), _REQUEST, bytes(_SIZE.size))
    except (AttributeError, OSError, ValueError):
        # It has no socket, or none any more.
        return None
    return int(_SIZE.unpack(answer)[0])


def below_tls(transport: Any) -> Any:
    """The transport that carries TLS; or ``transport``, if there is no TLS."""
    layer = tls_layer(transport)
    return transport if layer is None else layer.transport


def tls_is_over(transport: Any) -> bool:
    """Whether there is TLS, and it has ended or failed, so that it drops writes."""
    layer = tls_layer(transport)
    return layer is not None and layer._lostTLSConnection


def handshake_is_done(transport: Any) -> bool | None:
    """
    Whether the TLS handshake is done, and the certificate of the peer accepted; None if
    there is no TLS.
    """
    layer = tls_layer(transport)
    if layer is None:
        return None
    # Twisted 23.10 verifies the name that the certificate is for at the end of the
    # handshake, which it reports nevertheless; and aborts the connection.
    return bool(layer._handshakeDone and not layer._aborted)


def tls_layer(transport: Any) -> Any:
    """The ``TLSMemoryBIOProtocol`` that encrypts ``transport``; None without TLS."""
    # It cannot be imported where pyOpenSSL is missing.
    tls = sys.modules.get("twisted.protocols.tls")
    while tls is not None and transport is not None:
        # After startTLS the layer is the protocol of the transport.
        for each in (transport, getattr(transport, "protocol", None)):
            if isinstance(each, tls.TLSMemoryBIOProtocol):
                return each
        transport = getattr(transport, "transport", None)
    return None
