"""
A kit for tests of protocols that are coroutines, without sockets and without a reactor.

See ``docs/testing.md``.
"""

from twisted_rtsig.coro.testing.cancellation import cancel_everywhere
from twisted_rtsig.coro.testing.conformance import (
    STREAM_CHECKS,
    MakePair,
    StreamCheck,
)
from twisted_rtsig.coro.testing.pairs import stream_pair
from twisted_rtsig.coro.testing.running import in_task
from twisted_rtsig.coro.testing.sans_io import SansIO

__all__ = [
    "STREAM_CHECKS",
    "MakePair",
    "SansIO",
    "StreamCheck",
    "cancel_everywhere",
    "in_task",
    "stream_pair",
]
