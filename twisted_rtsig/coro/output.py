"""
The bytes that are under way below a stream, in the transport and in the kernel: the
output that the peer has not taken yet, and the input that was not read yet.
"""

from __future__ import annotations

import struct
import sys
from typing import Any, Final

from twisted_rtsig.engine.receive_buffers import bytes_to_read

_SIZE: Final = struct.Struct("i")

if sys.platform != "win32":
    import fcntl
    import termios

    # The ioctl(2) request for the number of bytes in the send queue of a socket, by the
    # beginning of sys.platform.  On TCP these are the bytes that the peer has not
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

# On macOS it is a socket option, in <sys/socket.h>.
_SO_NWRITE: Final = 0x1024


def pending_output(transport: Any) -> tuple[int, int] | None:
    """
    How much of what was written to ``transport`` the peer has not taken yet.

    :return: how many bytes the transport holds; and how many are in the kernel's send
        queue, or 0 where the kernel does not tell, as on Windows and OpenBSD.  From
        there the kernel of the peer takes what fits into its receive buffer.  None if
        the transport does not tell and there is no socket.
    """
    lowest = _lowest(transport)
    queue = _send_queue(lowest)
    buffer = getattr(lowest, "dataBuffer", None)
    if buffer is None:
        return None if queue is None else (0, queue)
    return len(buffer) - lowest.offset + lowest._tempDataLen, queue or 0


def unread_input(transport: Any) -> int | None:
    """
    How many bytes the kernel has received for ``transport`` that were not read yet.  If
    there is TLS, these are encrypted bytes.

    :return: None if the kernel does not tell, for example because there is no socket
        and no pipe.
    """
    number = descriptor(transport)
    if number is None or number < 0:
        return None
    return bytes_to_read(number)


def descriptor(transport: Any) -> int | None:
    """
    The descriptor of a transport's socket, or of the pipe that it reads; None without
    one.
    """
    try:
        number: int = _lowest(transport).fileno()
    except (AttributeError, OSError, ValueError):
        return None
    return number


def unsent_output(transport: Any) -> int:
    """How many bytes ``transport`` holds, below TLS."""
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
