"""
A soak test: mixed load on one server for a given time.  Some peers finish their
operations, others leave early or send wrong data.

``python -m tests.soak --help`` shows how to run it.  The server (``server.py``) is a
process of its own, on the reactor that is tested.  The peers (``peers.py``) are threads
with plain blocking sockets.
"""

from __future__ import annotations

CHUNK = 1 << 16
FILE_NAME = "file"
FILE_SIZE = 4 << 20

_PERIOD = bytes(range(251)) * 300


def pattern(offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on.  All files and messages have this content."""
    whole = bytearray()
    while len(whole) < size:
        start = (offset + len(whole)) % 251
        whole += _PERIOD[start : start + size - len(whole)]
    return bytes(whole)
