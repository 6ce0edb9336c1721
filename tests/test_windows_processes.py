"""Children on the completion-port reactor."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "win32":
    pytest.skip("completion ports exist on Windows only", allow_module_level=True)

from twisted.internet.error import (
    ProcessDone,
    ProcessExitedAlready,
    ProcessTerminated,
)
from twisted.internet.protocol import ProcessProtocol
from twisted.python import log
from twisted.python.failure import Failure

from tests.coro.support import run
from tests.support import settle, spin
from twisted_rtsig.coro import open_process, run_process, timeout
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.iocpreactor import CompletionPortReactor


@pytest.fixture
def reactor_class() -> type[EngineReactor]:
    return CompletionPortReactor


class Child(ProcessProtocol):
    """Records the output of a child, and its end."""

    def __init__(self) -> None:
        self.output = {1: b"", 2: b""}
        self.closed: list[int] = []
        self.exited: list[Failure] = []
        self.ended: list[Failure] = []

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.output[childFD] += data

    def childConnectionLost(self, childFD: int) -> None:
        self.closed.append(childFD)

    def processExited(self, reason: Failure) -> None:
        self.exited.append(reason)

    def processEnded(self, reason: Failure) -> None:
        self.ended.append(reason)


def spawn(
    reactor: CompletionPortReactor,
    code: str,
    *arguments: str,
    child: Any = None,
    **options: Any,
) -> Any:
    child = child or Child()
    reactor.spawnProcess(
        child,
        sys.executable,
        [sys.executable, "-u", "-c", textwrap.dedent(code), *arguments],
        **options,
    )
    return child


READ_AND_ANSWER = """
import sys
while data := sys.stdin.buffer.read1(65536):
    sys.stdout.buffer.write(data)
sys.stderr.write("the end")
sys.exit(3)
"""


def test_a_child_answers_line_by_line(reactor: CompletionPortReactor) -> None:
    child = spawn(reactor, READ_AND_ANSWER)
    for turn in (b"1", b"12", b"123"):
        child.transport.write(turn[-1:])
        spin(reactor, lambda: child.output[1] == turn)
    # The reactor does not poll for the child.
    assert reactor.getDelayedCalls() == []
    child.transport.closeStdin()
    spin(reactor, lambda: child.ended)
    assert child.output[2] == b"the end"
    assert sorted(child.closed) == [0, 1, 2]
    assert child.ended[0].check(ProcessTerminated)
    assert child.ended[0].value.exitCode == 3
    assert child.exited[0].value.exitCode == 3
    with pytest.raises(ProcessExitedAlready):
        child.transport.signalProcess("KILL")


def test_input_and_output_that_do_not_fit_into_a_pipe(
    reactor: CompletionPortReactor,
) -> None:
    child = spawn(reactor, READ_AND_ANSWER)
    data = bytes(range(256)) * 4096
    child.transport.writeSequence([data, b"", data])
    child.transport.closeStdin()
    spin(reactor, lambda: child.ended)
    assert child.output[1] == data + data


def test_the_arguments_environment_and_folder_of_a_child(
    reactor: CompletionPortReactor, tmp_path: Path
) -> None:
    arguments = ["", "two words", 'a "quoted" one', "back\\slash\\", "Zürich"]
    child = spawn(
        reactor,
        """
        import os, sys
        names = sorted(os.environ)
        print(ascii((sys.argv[1:], os.environ["COLOUR"], "PATH" in names, os.getcwd())))
        """,
        *arguments,
        env={b"COLOUR": b"blue"},
        path=str(tmp_path),
    )
    spin(reactor, lambda: child.ended)
    assert child.ended[0].check(ProcessDone), child.output
    output = ast.literal_eval(child.output[1].decode())
    assert output == (arguments, "blue", True, str(tmp_path))


def test_a_child_is_killed(reactor: CompletionPortReactor) -> None:
    child = spawn(reactor, READ_AND_ANSWER)
    child.transport.write(b"x")
    spin(reactor, lambda: child.output[1] == b"x")
    child.transport.signalProcess("TERM")
    spin(reactor, lambda: child.ended)
    assert child.ended[0].value.exitCode == 1


def test_a_producer_is_paused_if_the_child_does_not_read(
    reactor: CompletionPortReactor,
) -> None:
    class Producer:
        paused = False
        stopped = False

        def pauseProducing(self) -> None:
            self.paused = True

        def resumeProducing(self) -> None:
            self.paused = False

        def stopProducing(self) -> None:
            self.stopped = True

    child = spawn(reactor, "import time; time.sleep(60)")
    producer = Producer()
    child.transport.registerProducer(producer, True)
    written = 0
    # More than any pipe holds.
    while not producer.paused and written < 1 << 24:
        child.transport.write(bytes(1 << 16))
        written += 1 << 16
        settle(reactor)
    assert producer.paused
    child.transport.signalProcess("KILL")
    spin(reactor, lambda: child.ended)
    assert producer.stopped


def test_output_waits_while_it_is_paused(reactor: CompletionPortReactor) -> None:
    child = spawn(reactor, READ_AND_ANSWER)
    child.transport.write(b"1")
    spin(reactor, lambda: child.output[1] == b"1")
    child.transport.pauseProducing()
    # A read is under way.  Its data is not passed on either.
    child.transport.write(b"2")
    settle(reactor)
    child.transport.write(b"3")
    child.transport.closeStdin()
    spin(reactor, lambda: child.exited)
    settle(reactor)
    assert child.output == {1: b"1", 2: b""}
    assert not child.ended
    child.transport.resumeProducing()
    assert child.output[1] == b"1"
    spin(reactor, lambda: child.ended)
    assert child.output[1] == b"123"


def test_output_is_paused_from_the_beginning(
    reactor: CompletionPortReactor,
) -> None:
    class Paused(Child):
        def connectionMade(self) -> None:
            transport: Any = self.transport
            transport.pauseProducing()

    child = Paused()
    spawn(reactor, "print('something')", child=child)
    spin(reactor, lambda: child.exited)
    settle(reactor)
    assert child.output[1] == b""
    transport: Any = child.transport
    transport.resumeProducing()
    spin(reactor, lambda: child.ended)
    assert child.output[1].split() == [b"something"]


@pytest.mark.parametrize(
    "method", ["connectionMade", "childDataReceived", "childConnectionLost"]
)
def test_a_protocol_that_fails_is_told_of_the_end(
    reactor: CompletionPortReactor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exceptions are logged."""
    logged: list[Any] = []
    monkeypatch.setattr(log, "err", lambda *_: logged.append(sys.exc_info()[1]))
    failing = Child()

    def fail(*_: object) -> None:
        raise ZeroDivisionError(method)

    setattr(failing, method, fail)
    spawn(reactor, "print('something')", child=failing)
    spin(reactor, lambda: failing.ended)
    assert failing.ended[0].check(ProcessDone)
    times = 3 if method == "childConnectionLost" else 1
    assert [type(each) for each in logged] == [ZeroDivisionError] * times


def test_a_child_outlives_a_run(reactor: CompletionPortReactor) -> None:
    """As long as its pipes are open, the reactor keeps its completion port."""
    child = spawn(reactor, READ_AND_ANSWER)
    for turn in (b"1", b"12"):
        child.transport.write(turn[-1:])
        reactor.callLater(0, reactor.crash)
        reactor.run(installSignalHandlers=False)
        spin(reactor, lambda: child.output[1] == turn)
    reactor.callLater(0, reactor.crash)
    reactor.run(installSignalHandlers=False)
    child.transport.closeStdin()
    spin(reactor, lambda: child.ended)


def test_all_pipes_are_closed(reactor: CompletionPortReactor) -> None:
    child = spawn(reactor, READ_AND_ANSWER)
    child.transport.loseConnection()
    spin(reactor, lambda: child.ended)
    assert sorted(child.closed) == [0, 1, 2]


def test_a_missing_program_is_an_error(reactor: CompletionPortReactor) -> None:
    with pytest.raises(OSError, match=r"cannot find|Error|No such"):
        reactor.spawnProcess(Child(), "Z:\\no\\such\\program.exe", ["program"])


def test_a_script_runs_in_its_interpreter(
    reactor: CompletionPortReactor, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!{sys.executable}\nimport sys; print(sys.argv[1:])\n")
    child = Child()
    reactor.spawnProcess(child, str(script), ["script", "one"])
    spin(reactor, lambda: child.ended)
    assert child.output[1].split() == [b"['one']"]
    script.write_text("echo no shebang\n")
    with pytest.raises(OSError, match="nor a script with a shebang line"):
        reactor.spawnProcess(Child(), str(script), ["script"])


@pytest.mark.parametrize(
    "asked", [{"uid": 1}, {"gid": 1}, {"usePTY": True}, {"childFDs": {3: "r"}}]
)
def test_options_that_windows_does_not_have_are_refused(
    reactor: CompletionPortReactor, asked: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"[Uu]nsupported|not supported"):
        spawn(reactor, "", **asked)


def test_standard_io_of_a_child(reactor: CompletionPortReactor) -> None:
    """The child uses Twisted's own StandardIO, which polls, on the same reactor."""
    child = spawn(
        reactor,
        """
        from twisted_rtsig import iocpreactor
        iocpreactor.install()

        from twisted.internet import reactor, stdio
        from twisted.internet.protocol import Protocol

        class Shout(Protocol):
            def dataReceived(self, data):
                if data == b"quit":
                    self.transport.loseConnection()
                else:
                    self.transport.write(data.upper())
            def connectionLost(self, reason):
                reactor.stop()

        stdio.StandardIO(Shout())
        reactor.run()
        """,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    child.transport.write(b"hello")
    spin(reactor, lambda: child.output[1] == b"HELLO")
    child.transport.write(b"quit")
    spin(reactor, lambda: child.ended)
    assert child.ended[0].check(ProcessDone), child.output


# Children of the functions for coroutines


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", textwrap.dedent(code)]


COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "output": ("print('out'); import sys; print('err', file=sys.stderr)", {}),
    "status": ("import sys; sys.exit(3)", {}),
    "input": (
        "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())",
        {"input": b"hello"},
    ),
    "text": ("print(input()); print(input())", {"input": "one\ntwo\n", "text": True}),
    "merged": (
        "import sys; print('err', file=sys.stderr)",
        {"stderr": subprocess.STDOUT},
    ),
    "nothing": ("print('out')", {"stdout": subprocess.DEVNULL}),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands_of_coroutines(reactor: CompletionPortReactor, case: str) -> None:
    code, options = COMMANDS[case]
    plain = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    if "input" not in options:
        plain["stdin"] = subprocess.DEVNULL
    expected = subprocess.run(python(code), check=False, **plain)
    done = run(reactor, lambda: run_process(python(code), check=False, **options))
    assert (done.returncode, done.stdout, done.stderr) == (
        *(expected.returncode, expected.stdout, expected.stderr),
    )


def test_a_child_with_streams(reactor: CompletionPortReactor) -> None:
    async def main() -> None:
        async with open_process(python(READ_AND_ANSWER)) as process:
            await process.stream.write(b"one\n")
            assert await process.stream.read_line() == b"one"
            process.stream.write(bytes(300_000))
            assert await process.stream.read_exactly(300_000) == bytes(300_000)
            await process.stream.write_eof()
            assert await process.errors.read_exactly(7) == b"the end"
            assert await process.wait() == 3
        with pytest.raises(TimeoutError), timeout(0.5):
            async with open_process(python(READ_AND_ANSWER)) as process:
                await process.stream.read()
        assert process.returncode == 1

    run(reactor, main)


def test_a_child_with_files(reactor: CompletionPortReactor, tmp_path: Path) -> None:
    path = tmp_path / "file"

    async def main() -> None:
        with path.open("wb") as file:
            await run_process(python("print('hello')"), stdout=file)

    run(reactor, main)
    assert path.read_bytes().split() == [b"hello"]


@pytest.mark.parametrize(
    "options",
    [
        *({"pass_fds": [3]}, {"start_new_session": True}, {"process_group": 0}),
        *({"signal_group": True}, {"user": 1}, {"group": 1}, {"umask": 0}),
    ],
)
def test_options_of_coroutines_that_windows_does_not_have(
    reactor: CompletionPortReactor, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="Windows does not support it"):
        open_process([sys.executable], reactor=reactor, **options)


def test_signals_that_windows_does_not_have(reactor: CompletionPortReactor) -> None:
    async def main() -> None:
        async with open_process(python(READ_AND_ANSWER)) as process:
            for name in ("HUP", 1):
                with pytest.raises(ValueError, match="only end a process"):
                    process.send_signal(name)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 1

    run(reactor, main)
