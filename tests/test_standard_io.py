"""
Twisted's ``StandardIO`` on every reactor of this package: what a program has
written comes out, also when its input ends first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("Twisted has another StandardIO there", allow_module_level=True)

from twisted.internet import stdio
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.support import DEADLINE, Recorder, settle, spin, spin_with_timers
from twisted_rtsig.engine.reactor import EngineReactor

pytestmark = pytest.mark.processes

# Far more than a pipe holds.
MUCH = b"x" * 1_000_000


class Pipes:
    """The standard input and output of a program, from outside."""

    def __init__(self) -> None:
        self.stdin, self.input = os.pipe()
        self.output, self.stdout = os.pipe()
        self.open = {self.stdin, self.input, self.output, self.stdout}
        os.set_blocking(self.output, False)

    def close(self, descriptor: int) -> None:
        self.open.remove(descriptor)
        os.close(descriptor)

    def read(self) -> bytes:
        """What has come out."""
        read = b""
        try:
            while data := os.read(self.output, 1 << 16):
                read += data
        except BlockingIOError:
            pass
        return read


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    it = Pipes()
    yield it
    for each in list(it.open):
        it.close(each)


def connect(program: Recorder, pipes: Pipes, reactor: EngineReactor) -> None:
    # mypy takes it to be the one of Windows.
    standard_io: Any = stdio.StandardIO
    standard_io(program, pipes.stdin, pipes.stdout, reactor)


class Much(Recorder):
    """Answers with more than the pipe holds."""

    transport: Any

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self.transport.write(MUCH)


@implementer(IHalfCloseableProtocol)
class HalfClosing(Much):
    """Hears the end of its input, and goes on."""

    input_ended = 0

    def readConnectionLost(self) -> None:
        self.input_ended += 1

    def writeConnectionLost(self) -> None:
        """Nothing: it has no more to say."""


@pytest.mark.parametrize("source", ["pipe", "file", "nothing"])
@pytest.mark.parametrize("target", ["pipe", "file"])
def test_a_program_that_ends_with_its_input(
    reactor_class: Any, tmp_path: Path, source: str, target: str
) -> None:
    """``printf 'a\\nb\\n' | program > file``, and its relatives."""
    given = b"" if source == "nothing" else b"a\nb\n"
    greeting = "hello" if source == "nothing" else ""
    code = f"""
        from {reactor_class.__module__} import install
        install()
        from twisted.internet import protocol, reactor, stdio

        class Shout(protocol.Protocol):
            def connectionMade(self):
                self.transport.write(b"{greeting}")
            def dataReceived(self, data):
                self.transport.write(data.upper())
            def connectionLost(self, reason):
                reactor.stop()

        stdio.StandardIO(Shout())
        reactor.run()
    """
    (tmp_path / "in").write_bytes(given)
    with (tmp_path / "in").open("rb") as stdin, (tmp_path / "out").open("wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            **({"stdin": stdin} if source == "file" else {"input": given}),
            stdout=stdout if target == "file" else subprocess.PIPE,
            timeout=60,
            check=True,
        )
    output = (tmp_path / "out").read_bytes() if target == "file" else done.stdout
    assert output == greeting.encode() + given.upper()


def test_output_that_does_not_fit_into_the_pipe(
    reactor: EngineReactor, pipes: Pipes
) -> None:
    """The end of the input waits until what reads the output has taken it."""
    program = Much()
    connect(program, pipes, reactor)
    os.write(pipes.input, b"x")
    pipes.close(pipes.input)
    spin(reactor, lambda: program.data)
    settle(reactor)
    assert not program.lost
    # The one that is still to be told of the end.
    assert (
        len([each for each in reactor.getReaders() if each.fileno() == pipes.stdin])
        == 1
    )
    output = b""

    def ended() -> list[Failure]:
        nonlocal output
        output += pipes.read()
        return program.lost

    spin_with_timers(reactor, ended)
    assert output + pipes.read() == MUCH
    settle(reactor)
    assert len(program.lost) == 1
    assert not reactor.removeAll()


def test_what_reads_the_output_goes_away(reactor: EngineReactor, pipes: Pipes) -> None:
    """Then the output is lost, and the program ends."""
    program = Much()
    connect(program, pipes, reactor)
    os.write(pipes.input, b"x")
    pipes.close(pipes.input)
    spin(reactor, lambda: program.data)
    settle(reactor)
    assert not program.lost
    pipes.close(pipes.output)
    spin_with_timers(reactor, lambda: program.lost)
    settle(reactor)
    assert len(program.lost) == 1
    assert not reactor.removeAll()


def test_the_reactor_stops_meanwhile(reactor: Any, pipes: Pipes) -> None:
    """The program is told once that its connection is lost."""
    program = Much()
    connect(program, pipes, reactor)
    os.write(pipes.input, b"x")
    pipes.close(pipes.input)
    reactor.callLater(DEADLINE, reactor.crash)

    def stop_when_held() -> None:
        if program.data:
            # By then the end of the input was met.
            reactor.callLater(0.01, reactor.stop)
        else:
            reactor.callLater(0, stop_when_held)

    reactor.callWhenRunning(stop_when_held)
    reactor.run(installSignalHandlers=False)
    assert len(program.lost) == 1


def test_half_close_is_told_at_once(reactor: EngineReactor, pipes: Pipes) -> None:
    """A protocol that takes half closes need not wait for its output."""
    program = HalfClosing()
    connect(program, pipes, reactor)
    os.write(pipes.input, b"x")
    pipes.close(pipes.input)
    spin(reactor, lambda: program.input_ended)
    assert not program.lost
    program.transport.loseConnection()
    output = b""

    def ended() -> list[Failure]:
        nonlocal output
        output += pipes.read()
        return program.lost

    spin_with_timers(reactor, ended)
    assert output + pipes.read() == MUCH
    assert program.input_ended == 1


@implementer(IPushProducer)
class Endless(Recorder):
    """Writes for as long as there is room."""

    transport: Any
    stopped = False

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)
        self.resumeProducing()

    def resumeProducing(self) -> None:
        self.transport.write(MUCH)

    def pauseProducing(self) -> None:
        """Nothing: it writes only when it is resumed."""

    def stopProducing(self) -> None:
        self.stopped = True


def test_a_producer_without_end(reactor: EngineReactor, pipes: Pipes) -> None:
    """Only what was queued at the end of the input is waited for."""
    program = Endless()
    connect(program, pipes, reactor)
    pipes.close(pipes.input)
    settle(reactor)
    assert not program.lost
    output = b""

    def ended() -> list[Failure]:
        nonlocal output
        output += pipes.read()
        return program.lost

    spin_with_timers(reactor, ended)
    assert program.stopped
    assert len(output) >= len(MUCH)


def test_paused_and_resumed_meanwhile(reactor: EngineReactor, pipes: Pipes) -> None:
    """The end is told once."""
    program = Much()
    connect(program, pipes, reactor)
    os.write(pipes.input, b"x")
    pipes.close(pipes.input)
    spin(reactor, lambda: program.data)
    settle(reactor)
    transport: Any = program.transport
    transport.pauseProducing()
    settle(reactor)
    transport.resumeProducing()
    settle(reactor)
    assert not program.lost
    size = 0

    def ended() -> list[Failure]:
        nonlocal size
        size += len(pipes.read())
        return program.lost

    spin_with_timers(reactor, ended)
    settle(reactor)
    assert size + len(pipes.read()) == len(MUCH)
    assert len(program.lost) == 1
