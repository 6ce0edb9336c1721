"""How the supervisor reads what its workers log."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from tests.support import spin_with_timers
from twisted_rtsig.workers.logs import LogPipe, make_pipe


def test_the_end_of_a_worker_does_not_wait_for_a_child_that_writes_on(
    reactor: Any,
) -> None:
    reading, writing = make_pipe()
    os.set_blocking(writing, False)
    written = received = 0

    def fill() -> None:
        nonlocal written
        with contextlib.suppress(BlockingIOError):
            while True:
                written += os.write(writing, b"a line of the child\n" * 1000)

    def receive(data: bytes) -> None:
        nonlocal received
        received += len(data)
        # Without a limit to the reading, this goes on without end.
        assert received < 64 << 20
        if child_runs:
            fill()

    child_runs = True
    pipe = LogPipe(reactor, reading, receive)
    pipe.start()
    fill()
    own = written
    pipe.finish()
    assert own <= received < written
    child_runs = False
    os.close(writing)
    spin_with_timers(reactor, lambda: pipe.fileno() < 0)
    assert received - written in (0, 1)
