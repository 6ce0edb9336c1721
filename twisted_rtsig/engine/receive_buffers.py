"""What the kernel has received and the program has not read yet."""

from __future__ import annotations

import struct
import sys
from typing import Final

if sys.platform != "win32":
    import fcntl
    import termios

_SIZE: Final = struct.Struct("i")


def bytes_to_read(descriptor: int) -> int | None:
    """
    The number of bytes that a socket or a pipe can read at once.

    :return: None if the kernel does not tell, or if the descriptor is closed.
    """
    if sys.platform == "win32":
        from twisted_rtsig.windows import calls

        return calls.bytes_to_read(descriptor)
    try:
        # For sockets it is called SIOCINQ in tcp(7) and unix(7).
        answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(_SIZE.size))
    except (OSError, ValueError):
        # A descriptor of -1 is a ValueError.
        return None
    return int(_SIZE.unpack(answer)[0])


__all__ = ["bytes_to_read"]
