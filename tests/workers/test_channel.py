"""The control channel between the supervisor and a worker."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import reactor_classes, spin_with_timers
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.workers import channel as channel_module
from twisted_rtsig.workers.channel import ControlChannel

LIMIT = 10_000


@pytest.fixture(params=reactor_classes()[:1], ids=lambda each: each.__name__)
def reactor_class(request: Any) -> Callable[[], EngineReactor]:
    chosen: Callable[[], EngineReactor] = request.param
    return chosen


def test_memory_is_limited(
    reactor: EngineReactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Neither messages that the other end does not read nor an endless line fill memory.
    """
    monkeypatch.setattr(channel_module, "LIMIT", LIMIT)
    lost: list[None] = []
    one, other = socket.socketpair()
    with one, other:
        channel = ControlChannel(
            reactor, one, lambda message: None, lambda: lost.append(None)
        )
        channel.start()
        while channel.send({"type": "filler", "text": "x" * 1000}):
            assert len(channel._output) <= LIMIT
        # The channel stays open, and works again when the other end reads.
        assert not channel.closed
        other.setblocking(False)

        def read_all() -> bool:
            with contextlib.suppress(BlockingIOError):
                while other.recv(LIMIT):
                    pass
            return not channel._output

        spin_with_timers(reactor, read_all)
        assert channel.send({"type": "filler"})
        for _ in range(LIMIT // 1000 + 1):
            other.send(b"x" * 1000)
        spin_with_timers(reactor, lambda: lost)
        assert channel.closed
    assert lost == [None]
