"""Threads, datagrams and child processes, from tasks."""

from __future__ import annotations

import contextvars
import gc
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import ProcessEndpoint, TCP4ServerEndpoint
from twisted.internet.error import CannotListenError, ConnectionLost, MessageLengthError

from tests.coro.support import (
    INSTALLS,
    STYLES,
    WAITS_FOR_EVER,
    client_endpoint,
    installs,
    output_of,
    run,
    run_for_real,
)
from twisted_rtsig.coro import (
    BusyResourceError,
    IncompleteRead,
    Process,
    Server,
    Stopped,
    Stream,
    StreamError,
    TaskGroup,
    connect,
    from_thread,
    in_thread,
    open_datagrams,
    open_process,
    run_group,
    serve,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.files import open_file

# Threads


def test_in_thread_and_from_thread(reactor: Any) -> None:
    variable = contextvars.ContextVar("variable", default="none")

    async def doubled(number: int) -> tuple[int, int]:
        await sleep(0)
        return number * 2, threading.get_ident()

    def blocking(number: int) -> tuple[int, int, int, str]:
        twice, home = from_thread(doubled, number)
        return twice, home, threading.get_ident(), variable.get()

    async def main() -> Any:
        variable.set("of the task")
        return await in_thread(blocking, 21)

    twice, home, away, value = run_for_real(reactor, main)
    assert (twice, home, value) == (42, threading.get_ident(), "of the task")
    assert away != home


def test_from_thread_runs_a_task(reactor: Any) -> None:
    def generator(value: str) -> Generator[Any, Any, str]:
        with pytest.raises(TimeoutError), timeout(0.01):
            yield sleep(60)
        return value

    async def main() -> Any:
        return await in_thread(from_thread, generator, "in time")

    assert run_for_real(reactor, main) == "in time"


def test_an_error_in_a_thread(reactor: Any) -> None:
    async def fails() -> None:
        raise KeyError("why")

    async def main() -> None:
        with pytest.raises(KeyError, match="why"):
            await in_thread(from_thread, fails)

    run_for_real(reactor, main)


def test_from_thread_in_another_thread_raises() -> None:
    with pytest.raises(RuntimeError, match="only in a function that in_thread"):
        from_thread(sleep, 0)


# If a reactor that stops does not end the calls of threads, this waits for ever.
STOPS = (
    WAITS_FOR_EVER
    + """
def wait():
    try:
        from_thread(never)
    except ReactorNotRunning as error:
        print("told:", error, flush=True)
    try:
        from_thread(sleep, 0)
    except ReactorNotRunning as error:
        print("told again", flush=True)

def grace():
    # As long as services stop, the reactor runs.
    return spawn(in_thread, from_thread, sleep, 0.01).as_deferred().addCallback(
        lambda _: print("stopped in grace", flush=True)
    )

async def main():
    {pool}
    waiting = spawn(in_thread, wait)
    await begun.wait()
    {abandon}
    reactor.addSystemEventTrigger("before", "shutdown", grace)
    reactor.stop()

reactor.callWhenRunning(spawn, main)
reactor.run()
print("the end")
"""
)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "pool", "abandon"),
    [
        *((name, "pass", "pass") for name in INSTALLS),
        # The pool may be there before the first call of in_thread().
        *((name, "reactor.callInThread(len, '')", "pass") for name in INSTALLS),
        ("select", "await in_thread(len, '')", "pass"),
        ("select", "pass", "waiting.cancel()"),
    ],
)
def test_calls_of_threads_fail_when_the_reactor_stops(
    name: str, pool: str, abandon: str
) -> None:
    program = STOPS.format(install=installs(name), pool=pool, abandon=abandon)
    first, *middle, last = output_of(program).splitlines()
    assert (first, last) == ("stopped in grace", "the end")
    # Two threads write these.
    assert sorted(middle) == [
        "cancelled",
        "told again",
        "told: a thread has asked for a task, and the reactor has stopped: it runs no "
        "more tasks",
    ]


# One task ends as another one is cancelled.
STOPS_THREE = """
from twisted.internet import reactor
from twisted.internet.error import ReactorNotRunning
from twisted_rtsig.coro import Event, from_thread, in_thread, sleep, spawn

set_by_first = Event()
begun = []

async def first():
    begun.append(first)
    try:
        await Event().wait()
    finally:
        set_by_first.set()

async def second():
    begun.append(second)
    await set_by_first.wait()

async def third():
    begun.append(third)
    await Event().wait()

def wait(function):
    try:
        from_thread(function)
    except ReactorNotRunning:
        print(function.__name__ + "\\n", end="", flush=True)

async def main():
    for function in (first, second, third):
        spawn(in_thread, wait, function)
        while function not in begun:
            await sleep(0.001)
    reactor.stop()

reactor.callWhenRunning(spawn, main)
reactor.run()
"""


def test_each_thread_that_waits_fails_when_the_reactor_stops() -> None:
    assert sorted(output_of(STOPS_THREE).splitlines()) == ["first", "second", "third"]


STANDARD_IO = """
import sys
from twisted.internet import reactor
from twisted.internet.endpoints import StandardIOEndpoint
from twisted_rtsig.coro import serve, spawn

async def handler(stream):
    async for line in stream.lines():
        await stream.write(line.upper() + b"\\n")
    await stream.write(b"the end\\n")

async def main():
    server = await serve(StandardIOEndpoint(reactor), handler)
    await server.stop(60)
    reactor.stop()

reactor.callWhenRunning(spawn, main)
reactor.run()
"""


def test_standard_io() -> None:
    """Over pipes: the end of the input ends the handler, which ends the program."""
    output = output_of(STANDARD_IO, input="one\ntwo\n")
    assert output == "ONE\nTWO\nthe end\n"


# Datagrams


def test_datagrams(reactor: Any) -> None:
    async def main() -> None:
        async with (
            open_datagrams(interface="127.0.0.1") as server,
            open_datagrams(interface="127.0.0.1") as client,
        ):

            async def echo() -> None:
                async for data, address in server:
                    await server.send_to(data.upper(), address)

            task = spawn(echo)
            to = ("127.0.0.1", server.host.port)
            for word in (b"one", b"two"):
                await client.send_to(word, to)
                data, address = await client.receive_from()
                assert (data, address) == (word.upper(), to)
            task.cancel()

    run(reactor, main)


def test_a_block_of_datagrams_that_is_garbage(reactor: Any) -> None:
    """Its end cannot wait until the port is closed."""
    opened: list[Any] = []

    async def body() -> None:
        async with open_datagrams(interface="127.0.0.1") as socket:
            opened.append(socket)
            await socket.receive_from()

    async def main() -> None:
        abandoned = body()
        task = spawn(abandoned)
        await sleep(0)
        # As the garbage collector does.
        abandoned.close()
        with pytest.raises(RuntimeError, match="already awaited"):
            await task
        assert opened[0].transport not in reactor.getReaders()

    run(reactor, main)


def test_datagrams_are_queued(reactor: Any) -> None:
    """A few wait here, some more in the kernel, and none for ever."""

    async def main() -> None:
        async with open_datagrams(interface="127.0.0.1") as receiver:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.connect(("127.0.0.1", receiver.host.port))
                for number in range(200):
                    sender.send(b"%d" % number)
            await sleep(0.05)
            for number in range(200):
                data, _ = await receiver.receive_from()
                assert int(data) == number
            reading = receiver.receive_from()
            with pytest.raises(BusyResourceError):
                receiver.receive_from()
            with pytest.raises(TimeoutError), timeout(0.01):
                await reading

    run(reactor, main)


def test_unreceived_datagrams_are_limited(reactor: Any) -> None:
    """Few are queued here, however many arrive; the transport is paused only once."""

    async def main() -> None:
        async with open_datagrams(interface="127.0.0.1") as receiver:
            held_up: list[str] = []
            transport = receiver.transport

            def tell(name: str, function: Callable[[], None]) -> None:
                held_up.append(name)
                function()

            for name in ("pauseProducing", "resumeProducing"):
                setattr(transport, name, partial(tell, name, getattr(transport, name)))
            for number in range(100):
                receiver.feed(b"%d" % number, ("127.0.0.1", 1))
            assert held_up == ["pauseProducing"]
            for number in range(100):
                assert held_up == ["pauseProducing"]
                assert (await receiver.receive_from())[0] == b"%d" % number
            assert held_up == ["pauseProducing", "resumeProducing"]
            with pytest.raises(TimeoutError), timeout(0.01):
                await receiver.receive_from()
            # No cancelled receiver takes it away.
            receiver.feed(b"kept", ("127.0.0.1", 1))
            assert (await receiver.receive_from())[0] == b"kept"

    run(reactor, main)


def test_bad_datagrams_are_refused(reactor: Any) -> None:
    async def main() -> None:
        async with open_datagrams(interface="127.0.0.1") as used:
            port = used.host.port
            with pytest.raises(MessageLengthError):
                await used.send_to(bytes(70_000), ("127.0.0.1", port))
            waiting = spawn(used.receive_from)
            await sleep(0)
        with pytest.raises(StreamError, match="after close"):
            await waiting
        with pytest.raises(StreamError, match="after close"):
            await used.send_to(b"x", ("127.0.0.1", port))
        with pytest.raises(StreamError, match="after close"):
            await used.receive_from()
        async with open_datagrams(interface="127.0.0.1") as client:
            client.transport.connect("127.0.0.1", port)
            client.send_to(b"is anybody there?")
            # Twisted's epoll reactor takes that for the end of the port.
            refused = (ConnectionRefusedError, StreamError)
            with pytest.raises(refused, match=r"nothing receives|after close"):
                await client.receive_from()

    run(reactor, main)


# Twisted leaves the socket that it could not bind to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_port_in_use(reactor: Any) -> None:
    async def main() -> None:
        async with open_datagrams(interface="127.0.0.1") as used:
            with pytest.raises(CannotListenError):
                open_datagrams(used.host.port, "127.0.0.1")
            gc.collect()

    run(reactor, main)


# Processes


def test_a_filter(reactor: Any) -> None:
    async def main() -> Any:
        async with open_process(["sort", "-n"]) as sort:
            await sort.stream.write(b"3\n1\n2\n")
            await sort.stream.write_eof()
            lines = [line async for line in sort.stream.lines()]
            return lines, await sort.wait(), await sort.wait()

    assert run_for_real(reactor, main) == ([b"1", b"2", b"3"], 0, 0)


def test_the_exit_status_of_a_process(reactor: Any) -> None:
    async def main() -> Any:
        script = "echo $WORD >&2; pwd; exit 3"
        process = open_process(["sh", "-c", script], env={"WORD": "hello"}, cwd="/")
        async with process:
            errors = await process.errors.read_line()
            output = await process.stream.read_line()
            status = await process.wait()
        assert process.pid is None
        with pytest.raises(ProcessLookupError, match="has ended already"):
            process.send_signal("TERM")
        return errors, output, status

    assert run_for_real(reactor, main) == (b"hello", b"/", 3)


def test_signals(reactor: Any) -> None:
    async def main() -> None:
        async with open_process(["sh", "-c", "echo; exec sleep 60"]) as process:
            # Before it runs the program, it still has the handlers of this one.
            await process.stream.read_line()
            process.send_signal("TERM")
            assert await process.wait() == -signal.SIGTERM
        with pytest.raises(TimeoutError), timeout(0.01):
            async with open_process(["sleep", "60"]) as process:
                await process.wait()
        assert await process.wait() == -signal.SIGTERM

    run_for_real(reactor, main)


def test_leaving_the_block_ends_the_process(reactor: Any) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError), timeout(0.01):
            async with open_process(["sleep", "60"]) as process:
                pass
        assert await process.wait() == -signal.SIGTERM
        # It gets all that was written before, though no write was awaited.
        async with open_process(["sh", "-c", "test $(wc -c) = 1048576"]) as process:
            process.stream.write(bytes(1 << 20))
        assert await process.wait() == 0

    run_for_real(reactor, main)


def test_a_block_of_a_process_whose_coroutine_is_closed(reactor: Any) -> None:
    async def main() -> None:
        processes = []

        async def body() -> None:
            async with open_process(["sleep", "60"]) as process:
                processes.append(process)
                await process.wait()

        abandoned = body()
        task = spawn(abandoned)
        await sleep(0)
        # As the garbage collector does.
        abandoned.close()
        assert await processes[0].wait() == -signal.SIGKILL
        with pytest.raises(RuntimeError, match="already awaited"):
            await task

    run_for_real(reactor, main)


def test_a_missing_program(reactor: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no such program in PATH"):
        open_process(["no-such-program-anywhere"], reactor=reactor)


def test_a_child_that_does_not_read(reactor: Any) -> None:
    async def main() -> None:
        async with open_process(["sleep", "60"]) as process:

            async def write_without_end() -> None:
                while True:
                    await process.stream.write(bytes(10_000))

            with pytest.raises(TimeoutError), timeout(0.1):
                await write_without_end()
            process.send_signal("KILL")

    run_for_real(reactor, main)


def test_a_child_that_closes_its_input(reactor: Any) -> None:
    async def main() -> None:
        async with open_process(["sh", "-c", "exec <&-; echo; exec sleep 60"]) as child:
            await child.stream.read_line()

            async def write_without_end() -> None:
                while True:
                    await child.stream.write(bytes(10_000))

            with pytest.raises(ConnectionLost, match="peer has closed its input"):
                await write_without_end()
            child.send_signal("KILL")

    run_for_real(reactor, main)


def test_a_child_that_closes_its_input_during_a_write(reactor: Any) -> None:
    async def main() -> None:
        script = "read line; exec <&-; exec sleep 60"
        async with open_process(["sh", "-c", script]) as child:
            with pytest.raises(ConnectionLost, match="peer has closed its input"):
                # Far more than the pipe holds.
                await child.stream.write(b"\n" * (1 << 22))
            child.send_signal("KILL")

    run_for_real(reactor, main)


def test_the_buffered_output_of_a_child_is_limited(reactor: Any) -> None:
    async def main() -> int:
        async with open_process(["sh", "-c", "yes | head -c 10000000"]) as child:
            await sleep(0.1)
            assert len(await child.stream.peek(1 << 30)) < 1 << 20
            size = 0
            while data := await child.stream.read():
                size += len(data)
        return size

    assert run_for_real(reactor, main) == 10_000_000


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with programs in it that print their own path."""
    monkeypatch.chdir(tmp_path)
    for name, mode in {
        "tool": 0o755,
        "sub/tool": 0o755,
        "bin/tool": 0o755,
        "bin/only here": 0o755,
        "not executable/tool": 0o644,
        "folder/tool/file": 0o644,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f'#!/bin/sh\necho {name}; pwd; echo "$@"\n')
        path.chmod(mode)
    return tmp_path


def _found_programs(folder: Path) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Commands and options, which are to do the same as with ``subprocess``."""
    return {
        "relative to cwd": (["./tool"], {"cwd": "sub"}),
        "relative to an absolute cwd": (["./tool"], {"cwd": str(folder / "sub")}),
        "cwd is a Path": (["./tool"], {"cwd": folder / "sub"}),
        "cwd is bytes": ([b"./tool", b"an argument"], {"cwd": b"sub"}),
        "a Path": ([folder / "tool", Path("an argument")], {}),
        "above cwd": (["../bin/tool"], {"cwd": "sub"}),
        "not in cwd": (["./only here"], {"cwd": "sub"}),
        "in the PATH of env": (["only here"], {"env": {"PATH": str(folder / "bin")}}),
        "in bytes": ([b"only here"], {"env": {b"PATH": os.fsencode(folder / "bin")}}),
        "in a relative PATH": (["only here"], {"env": {"PATH": "bin"}}),
        "in one relative to cwd": (
            ["only here"],
            {"env": {"PATH": "../bin"}, "cwd": "sub"},
        ),
        "not in the PATH of env": (["sh", "-c", "echo"], {"env": {"PATH": "bin"}}),
        "no PATH in env": (["sh", "-c", "echo $WORD"], {"env": {"WORD": "hello"}}),
        "the first that can be executed": (
            ["tool"],
            {"env": {"PATH": "nowhere:not executable:bin:sub"}},
        ),
        "none can be executed": (
            ["tool"],
            {"env": {"PATH": "not executable:folder:nowhere"}},
        ),
        "not executable": (["not executable/tool"], {}),
        "a folder": (["folder/tool"], {}),
        "below a file": (["tool/tool"], {}),
        "nowhere": (["./nothing"], {}),
        "no name": ([""], {}),
        "no such cwd": (["./tool"], {"cwd": "nowhere"}),
        "cwd is a file": (["sh", "-c", "echo"], {"cwd": "tool"}),
        "a null byte": (["./tool", "\0"], {}),
    }


@pytest.mark.processes
def test_programs_are_found_as_subprocess_finds_them(
    reactor: Any, programs: Path
) -> None:
    found: dict[str, Any] = {}
    expected: dict[str, Any] = {}

    async def main() -> None:
        for case, (command, options) in _found_programs(programs).items():
            try:
                done = subprocess.run(command, capture_output=True, **options)
                expected[case] = done.stdout, done.returncode
            except Exception as error:
                expected[case] = type(error), getattr(error, "errno", None)
            try:
                async with open_process(command, **options) as process:
                    output = b""
                    while data := await process.stream.read():
                        output += data
                found[case] = output, await process.wait()
            except Exception as error:
                found[case] = type(error), getattr(error, "errno", None)

    # Twisted looks for children that have ended only where SIGCHLD tells it.
    run_for_real(reactor, main)
    assert found == expected
    assert found["relative to cwd"][0].startswith(b"sub/tool\n")
    assert found["none can be executed"][0] is PermissionError
    assert found["no such cwd"][0] is FileNotFoundError


def test_errors_name_what_is_wrong(reactor: Any, programs: Path) -> None:
    for options, name in (
        ({"cwd": "nowhere"}, "nowhere"),
        ({"cwd": b"tool"}, "tool"),
        ({"env": {"PATH": "not executable"}}, "tool"),
    ):
        command = ["tool", "argument"]
        with pytest.raises(OSError, match=name) as caught:
            open_process(command, reactor=reactor, **options)
        assert caught.value.filename == name
    with pytest.raises(ValueError, match="is empty"):
        open_process([], reactor=reactor)
    with pytest.raises(ValueError, match="null byte"):
        open_process(["./tool", "a\0b"], reactor=reactor)
    for text in ("ls -l", b"ls", Path("ls")):
        with pytest.raises(TypeError, match="as a list"):
            open_process(text, reactor=reactor)  # type: ignore[arg-type]


UNREAD = {
    "output": "echo first; exec head -c 1000000 /dev/zero",
    "errors": "echo first; exec head -c 1000000 /dev/zero >&2",
    "both": "echo first; head -c 1000000 /dev/zero >&2; exec head -c 1000000 /dev/zero",
    "endless output": "echo first; exec yes",
    "endless errors": "echo first; exec yes >&2",
}


@pytest.mark.parametrize("driver", ["task", "fromCoroutine"])
@pytest.mark.parametrize("script", UNREAD.values(), ids=UNREAD)
def test_leaving_a_block_with_unread_output(
    reactor: Any, script: str, driver: str
) -> None:
    async def block() -> Process:
        async with open_process(["sh", "-c", script], reactor=reactor) as process:
            assert await process.stream.read_line() == b"first"
        return process

    async def main() -> None:
        if driver == "task":
            process = await block()
        else:
            process = await Deferred.fromCoroutine(block())
        # The process has no output any more; or it had written everything before.
        assert await process.wait() in (0, -signal.SIGPIPE)

    run_for_real(reactor, main)


def test_leaving_a_block_whose_output_blocks_the_input(
    reactor: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(5_000_000))

    async def main() -> None:
        async with await open_file(tmp_path / "file") as file:
            async with open_process(["cat"]) as process:
                process.stream.write(bytes(1_000_000))
                process.stream.send_file(file)
                process.stream.write(b"the end")
            assert await process.wait() == -signal.SIGPIPE

    run_for_real(reactor, main)


def test_unread_errors_do_not_block_the_output(reactor: Any) -> None:
    script = "head -c 1000000 /dev/zero >&2; echo the end >&2; echo done"

    async def main() -> bytes:
        async with open_process(["sh", "-c", script]) as process:
            assert await process.stream.read_line() == b"done"
            assert await process.wait() == 0
            errors = b""
            while data := await process.errors.read():
                errors += data
        return errors

    errors = run_for_real(reactor, main)
    # The newest are kept, and what is still in the pipe.
    assert errors.strip(b"\0") == b"the end\n"
    assert 1 << 16 <= len(errors) <= (1 << 17) + (1 << 16)


def test_all_requested_errors_are_kept(reactor: Any) -> None:
    script = "echo started; head -c 1000000 /dev/zero >&2; echo done"

    async def main() -> int:
        async with open_process(["sh", "-c", script]) as process:
            errors = process.errors
            assert await process.stream.read_line() == b"started"
            # It is held up, and its output goes on when they are read.
            reading = process.stream.read_line()
            while len(await errors.peek(1 << 30)) <= 1 << 17:
                await sleep(0.001)
            assert not reading.called
            assert len(await errors.peek(1 << 30)) < 1 << 18
            size = 0
            while data := await errors.read():
                size += len(data)
            assert await reading == b"done"
        return size

    assert run_for_real(reactor, main) == 1_000_000


def test_a_process_endpoint(reactor: Any) -> None:
    async def main() -> bytes:
        endpoint = ProcessEndpoint(reactor, "/bin/cat", ["cat"])
        async with await connect(endpoint) as stream:
            await stream.write(b"through\nand thr")
            line = await stream.read_line()
            await stream.close()
            with pytest.raises(IncompleteRead):
                await stream.read_line()
        return line

    assert run_for_real(reactor, main) == b"through"


# All of it, in every style


@pytest.mark.parametrize("style", STYLES)
def test_every_wait_in_every_style(reactor: Any, style: str) -> None:
    """Each wait is a Deferred, also outside of a task."""
    got: list[Any] = []

    async def handler(stream: Stream) -> None:
        await stream.write(await stream.read_line())

    def body(group: TaskGroup) -> Generator[Any, Any, str]:
        group.spawn(sleep, 0)
        yield sleep(0)
        return "the group"

    def start() -> Iterator[Callable[[], Any]]:
        local = "127.0.0.1"
        yield lambda: serve(
            TCP4ServerEndpoint(reactor, 0, interface=local), handler, reactor=reactor
        )
        server: Server = got.pop()
        yield lambda: connect(client_endpoint(reactor, server), reactor)
        stream: Stream = got.pop()
        yield lambda: stream.write(b"line\n")
        yield stream.read
        yield stream.close
        yield lambda: server.stop(60)
        yield lambda: in_thread(int, "3")
        datagrams = open_datagrams(interface=local, reactor=reactor)
        yield lambda: datagrams.send_to(b"x", (local, datagrams.host.port))
        yield datagrams.receive_from
        yield datagrams.close
        process = open_process(["cat"], reactor=reactor)
        yield process.stream.write_eof
        yield process.stream.read
        yield process.wait
        yield process.stream.close
        yield process.errors.close
        yield lambda: sleep(0.001, reactor)
        yield lambda: spawn(sleep, 0, reactor=reactor).as_deferred()
        yield lambda: run_group(body)

    def steps() -> Iterator[Callable[[], Any]]:
        for step in start():

            def checked(step: Callable[[], Any] = step) -> Any:
                waiting = step()
                assert isinstance(waiting, Deferred)
                return waiting

            yield checked

    async def main() -> None:
        await STYLES[style](reactor, steps(), got)

    run_for_real(reactor, main)
    got[6] = got[6][0]
    assert got == [
        *(None, b"line", None, Stopped(0, 0, 0), 3, None, b"x", None),
        *(None, b"", 0, None, None, None, None, "the group"),
    ]
