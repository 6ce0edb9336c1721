"""
Twisted's ``StandardIO`` on every reactor of this package: the output of a program
arrives, even if its input ends first.
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

# Much more than a pipe holds.
MUCH = b"x" * 1_000_000


class Pipes:
    """The standard input and output of a program, and the other ends of both."""

    def __init__(self) -> None:
        self.stdin, self.input = os.pipe()
        self.output, self.stdout = os.pipe()
        self.open = {self.stdin, self.input, self.output, self.stdout}
        os.set_blocking(self.output, False)

    def close(self, descriptor: int) -> None:
        self.open.remove(descriptor)
        os.close(descriptor)

    def read(self) -> bytes:
        """The output that has arrived."""
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
    # mypy takes it for the class of Windows.
    standard_io: Any = stdio.StandardIO
    standard_io(program, pipes.stdin, pipes.stdout, reactor)


def connect_and_end_input(
    program: Recorder, pipes: Pipes, reactor: EngineReactor
) -> None:
    """Connect the program, send it a byte, and end its input."""
    connect(program, pipes, reactor)
    os.write(pipes.input, b"x")
    pipes.close(pipes.input)


def end_input_while_output_waits(
    program: Recorder, pipes: Pipes, reactor: EngineReactor
) -> None:
    """Afterwards the program has met the end of its input, and is not told yet."""
    connect_and_end_input(program, pipes, reactor)
    spin(reactor, lambda: program.data)
    settle(reactor)
    assert not program.lost


def output_until_lost(program: Recorder, pipes: Pipes, reactor: EngineReactor) -> bytes:
    """Read the output until the program has lost its connection."""
    output = b""

    def read_until_lost() -> list[Failure]:
        nonlocal output
        output += pipes.read()
        return program.lost

    spin_with_timers(reactor, read_until_lost)
    return output + pipes.read()


class Much(Recorder):
    """Answers with more than the pipe holds."""

    transport: Any

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self.transport.write(MUCH)


@implementer(IHalfCloseableProtocol)
class HalfClosing(Much):
    """Counts the ends of its input, and goes on."""

    input_ended = 0

    def readConnectionLost(self) -> None:
        self.input_ended += 1

    def writeConnectionLost(self) -> None:
        """This program writes nothing more."""


@pytest.mark.parametrize("source", ["pipe", "file", "nothing"])
@pytest.mark.parametrize("target", ["pipe", "file"])
def test_a_program_that_ends_with_its_input(
    reactor_class: Any, tmp_path: Path, source: str, target: str
) -> None:
    """``printf 'a\\nb\\n' | program > file``, and the same with other files."""
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


def test_output_that_does_not_fit_into_the_pipe_is_not_lost(
    reactor: EngineReactor, pipes: Pipes
) -> None:
    """The program is told of the end of its input when its output has been read."""
    program = Much()
    end_input_while_output_waits(program, pipes, reactor)
    # This reader has still to tell the program.
    assert (
        len([each for each in reactor.getReaders() if each.fileno() == pipes.stdin])
        == 1
    )
    assert output_until_lost(program, pipes, reactor) == MUCH
    settle(reactor)
    assert len(program.lost) == 1
    assert not reactor.removeAll()


def test_a_program_ends_when_the_reader_of_its_output_has_closed(
    reactor: EngineReactor, pipes: Pipes
) -> None:
    """The output is lost then."""
    program = Much()
    end_input_while_output_waits(program, pipes, reactor)
    pipes.close(pipes.output)
    spin_with_timers(reactor, lambda: program.lost)
    settle(reactor)
    assert len(program.lost) == 1
    assert not reactor.removeAll()


def test_the_reactor_stops_while_output_waits(reactor: Any, pipes: Pipes) -> None:
    """The program is told once that its connection is lost."""
    program = Much()
    connect_and_end_input(program, pipes, reactor)
    reactor.callLater(DEADLINE, reactor.crash)

    def stop_when_held() -> None:
        if program.data:
            # By then the end of the input was read.
            reactor.callLater(0.01, reactor.stop)
        else:
            reactor.callLater(0, stop_when_held)

    reactor.callWhenRunning(stop_when_held)
    reactor.run(installSignalHandlers=False)
    assert len(program.lost) == 1


def test_a_half_close_is_reported_at_once(reactor: EngineReactor, pipes: Pipes) -> None:
    """A protocol that handles half closes need not wait for its output."""
    program = HalfClosing()
    connect_and_end_input(program, pipes, reactor)
    spin(reactor, lambda: program.input_ended)
    assert not program.lost
    program.transport.loseConnection()
    assert output_until_lost(program, pipes, reactor) == MUCH
    assert program.input_ended == 1


@implementer(IPushProducer)
class Endless(Recorder):
    """Writes as long as there is room."""

    transport: Any
    stopped = False

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)
        self.resumeProducing()

    def resumeProducing(self) -> None:
        self.transport.write(MUCH)

    def pauseProducing(self) -> None:
        """It writes only when it is resumed."""

    def stopProducing(self) -> None:
        self.stopped = True


def test_the_input_of_an_endless_producer_ends(
    reactor: EngineReactor, pipes: Pipes
) -> None:
    """The end waits only for the output that was queued when the input ended."""
    program = Endless()
    connect(program, pipes, reactor)
    pipes.close(pipes.input)
    settle(reactor)
    assert not program.lost
    output = output_until_lost(program, pipes, reactor)
    assert program.stopped
    assert len(output) >= len(MUCH)


def test_a_program_pauses_and_resumes_after_the_end_of_its_input(
    reactor: EngineReactor, pipes: Pipes
) -> None:
    """The end is reported once."""
    program = Much()
    end_input_while_output_waits(program, pipes, reactor)
    transport: Any = program.transport
    transport.pauseProducing()
    settle(reactor)
    transport.resumeProducing()
    settle(reactor)
    assert not program.lost
    assert output_until_lost(program, pipes, reactor) == MUCH
    settle(reactor)
    assert len(program.lost) == 1
