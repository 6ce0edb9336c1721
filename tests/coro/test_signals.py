"""Signals that a task receives."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.coro.support import STYLES, cancel, run, run_for_real, running
from tests.support import DEADLINE, ON_PYPY
from twisted_rtsig.coro import (
    BusyResourceError,
    SignalReceiver,
    format_tasks,
    open_signal_receiver,
    sleep,
    spawn,
    timeout,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

if sys.platform != "win32":
    ONE, TWO = signal.SIGUSR1, signal.SIGUSR2


@pytest.fixture(autouse=True)
def seen() -> Iterator[list[int]]:
    """What the handlers get that were there before; they are there afterwards."""
    got: list[int] = []

    def handler(number: int, frame: object) -> None:
        got.append(number)

    before = {each: signal.signal(each, handler) for each in (ONE, TWO)}
    try:
        yield got
        for each in before:
            assert signal.getsignal(each) is handler
    finally:
        for each, previous in before.items():
            signal.signal(each, previous)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("style", STYLES)
def test_in_each_style(reactor: Any, seen: list[int], style: str) -> None:
    async def main() -> None:
        got: list[Any] = []
        with open_signal_receiver(ONE, TWO) as receiver:
            send(TWO)
            STYLES[style](reactor, [receiver.receive] * 2, got)
            while len(got) < 1:
                await sleep(0)
            send(ONE)
            while len(got) < 2:
                await sleep(0)
            assert got == [TWO, ONE]
            assert repr(got[0]) == repr(signal.SIGUSR2)
        assert seen == []
        send(ONE)
        assert seen == [ONE]

    run_for_real(reactor, main)


class _Calls:
    """The part of a reactor that a receiver needs."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def callWhenRunning(self, function: Any) -> None:
        """It never runs."""

    def callFromThread(self, function: Any) -> None:
        self.calls.append(function)


def _interrupted(point: int, function: Any) -> bool:
    """
    Call a function, and let a second signal come before one of the instructions of the
    receiver; return whether it has so many.
    """
    left = point

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_globals["__name__"] != SignalReceiver.__module__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if not left:
                signal.raise_signal(TWO)
        return trace

    before = sys.gettrace()
    # CPython 3.12 traces no instructions if no frame has asked for it by now.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return left <= 0


@pytest.mark.parametrize("waits", [False, True])
def test_a_signal_at_each_point_of_the_receiver(seen: list[int], waits: bool) -> None:
    """Handlers interrupt the receiver between any two instructions."""
    for point in itertools.count(1):
        reactor = _Calls()
        got: list[int] = []
        with open_signal_receiver(ONE, TWO, reactor=reactor) as receiver:
            if waits:
                receiver.receive().addCallback(got.append)
            signal.raise_signal(ONE)

            def receive() -> None:
                if waits:
                    reactor.calls.pop(0)()
                else:
                    receiver.receive().addCallback(got.append)

            reached = _interrupted(point, receive)
            receiver.receive().addCallback(got.append)
            while reactor.calls:
                reactor.calls.pop(0)()
            assert got == ([ONE, TWO] if reached else [ONE])
        if not reached:
            break
    assert point > 20
    assert seen == []


def test_a_signal_that_arrives_several_times(reactor: Any, seen: list[int]) -> None:
    async def main() -> None:
        with open_signal_receiver(ONE, TWO) as receiver:
            send(ONE, TWO, ONE, ONE, TWO)
            got = []
            with contextlib.suppress(TimeoutError), timeout(0.01):
                async for number in receiver:
                    got.append(number)
            assert got == [ONE, TWO]
            # The wait that was given up has taken nothing.
            send(ONE)
            assert await receiver.receive() == ONE

    run_for_real(reactor, main)
    assert seen == []


def test_unreceived_signals_go_to_the_previous_handler(
    reactor: Any, seen: list[int]
) -> None:
    async def main() -> None:
        with open_signal_receiver(ONE, TWO) as outer:
            with open_signal_receiver(TWO) as inner:
                send(TWO, ONE)
            assert inner is not outer
            assert [await outer.receive(), await outer.receive()] == [ONE, TWO]
            send(TWO)
        assert seen == [TWO]

    run_for_real(reactor, main)


def test_the_last_opened_receiver_gets_the_signal(
    reactor: Any, seen: list[int]
) -> None:
    async def main() -> None:
        with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
            outer = first.enter_context(open_signal_receiver(ONE))
            inner = second.enter_context(open_signal_receiver(ONE, TWO))
            send(ONE)
            assert await inner.receive() == ONE
            # In the other order than they were opened.
            first.close()
            send(ONE)
            assert await inner.receive() == ONE
            with pytest.raises(RuntimeError, match="is not open"):
                await outer.receive()
            second.close()
            send(ONE)
        assert seen == [ONE]

    run_for_real(reactor, main)


def test_only_one_task_receives_at_a_time(reactor: Any) -> None:
    async def main() -> None:
        with open_signal_receiver(ONE) as receiver:
            first = spawn(receiver.receive)
            await sleep(0)
            assert "a signal to <receiver of SIGUSR1>" in format_tasks(reactor)
            with pytest.raises(BusyResourceError):
                receiver.receive()
            send(ONE)
            assert await first == ONE
            waiting = spawn(receiver.receive)
            await sleep(0)
        with pytest.raises(RuntimeError, match="is not open"):
            await waiting

    run(reactor, main)


def test_a_cancelled_task_restores_the_handlers(reactor: Any) -> None:
    async def receive() -> None:
        with open_signal_receiver(ONE) as receiver:
            await receiver.receive()

    async def main() -> None:
        await cancel(spawn(receive))

    run(reactor, main)


# What cannot be received


@pytest.mark.skipif(ON_PYPY, reason="PyPy lets SIGKILL have a handler")
def test_bad_signals_are_refused(reactor: Any) -> None:
    with pytest.raises(TypeError, match="needs signals"):
        open_signal_receiver()
    with pytest.raises(ValueError, match="no signal 4000"):
        open_signal_receiver(4000)
    receiver = open_signal_receiver(ONE, signal.SIGKILL)
    with pytest.raises(OSError, match="no process can receive SIGKILL"), receiver:
        pass


def test_a_receiver_is_not_opened_twice(reactor: Any) -> None:
    receiver = open_signal_receiver(ONE)
    with receiver, pytest.raises(RuntimeError, match="open already"):
        receiver.__enter__()
    with receiver:
        pass


def test_opening_a_receiver_in_another_thread_raises(reactor: Any) -> None:
    errors: list[str] = []

    def use(receiver: SignalReceiver) -> None:
        try:
            receiver.__enter__()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=use, args=(open_signal_receiver(ONE),))
    thread.start()
    thread.join()
    assert "only in the main thread" in errors[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="this is about Linux")
def test_signals_that_the_reactor_needs_are_refused(reactor: Any) -> None:
    async def main() -> None:
        # The reactor blocks its signals when it first waits.
        await sleep(0.001)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        if type(reactor).__name__ != "RealtimeSignalReactor":
            return
        needed = [each for each in blocked if each >= signal.SIGRTMIN]
        assert needed
        with pytest.raises(ValueError, match="the reactor uses it"):
            open_signal_receiver(*needed)
        free = next(
            each
            for each in range(signal.SIGRTMIN, signal.SIGRTMAX)
            if each not in blocked
        )
        with open_signal_receiver(free) as receiver:
            send(free)
            assert await receiver.receive() == free

    run_for_real(reactor, main)


# With the handlers of the reactor

PROGRAM = """
import signal
{install}
installed.install()
from twisted.internet import reactor
from twisted_rtsig.coro import open_signal_receiver, sleep, spawn

async def main():
    with open_signal_receiver(signal.SIGTERM, signal.SIGINT) as receiver:
        await sleep(0)
        print("ready", flush=True)
        async for number in receiver:
            print(number.name, flush=True)
            if number == signal.SIGINT:
                break
    print("closed", flush=True)

{start}
reactor.addSystemEventTrigger("after", "shutdown", print, "stopped")
reactor.run()
"""

INSTALLS = {
    "select": "from twisted.internet import selectreactor as installed",
    "asyncio": "from twisted.internet import asyncioreactor as installed",
}
if sys.platform.startswith("linux"):
    INSTALLS |= {
        "epoll": "from twisted.internet import epollreactor as installed",
        "rtsig": "from twisted_rtsig import rtsigreactor as installed",
        "rtsig-epoll": "from twisted_rtsig import epollreactor as installed",
    }
STARTS = {
    "before it runs": "spawn(main, reactor=reactor)",
    "when it runs": "reactor.callWhenRunning(spawn, main)",
}


@pytest.mark.processes
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", INSTALLS)
def test_a_reactor_does_not_stop_while_sigterm_is_received(
    name: str, start: str
) -> None:
    """And it wakes up for a signal: it has nothing else to do."""
    text = PROGRAM.format(install=INSTALLS[name], start=STARTS[start])
    with running(text) as program:
        assert program.stdout is not None
        for number, expected in [
            (None, "ready"),
            (signal.SIGTERM, "SIGTERM"),
            (signal.SIGTERM, "SIGTERM"),
            (signal.SIGINT, "SIGINT"),
            (None, "closed"),
        ]:
            if number is not None:
                program.send_signal(number)
            assert program.stdout.readline().strip() == expected
        program.send_signal(signal.SIGTERM)
        rest, errors = program.communicate(timeout=DEADLINE)
    assert rest == "stopped\n"
    assert errors == ""
