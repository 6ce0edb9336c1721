"""Whole programs under ``twisted_rtsig.run``: real processes and real signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import twisted_rtsig
from tests.support import DEADLINE

pytestmark = pytest.mark.processes

if sys.platform == "win32":
    pytest.skip("Windows has no kill(2)", allow_module_level=True)

CHECKOUT = Path(__file__).parents[1]
RUNNER = str(CHECKOUT / "twisted_rtsig" / "runner.py")

REACTORS = {
    "select": "SelectReactor",
    "poll": "PollReactor",
    "asyncio": "AsyncioSelectorReactor",
}
if sys.platform.startswith("linux"):
    REACTORS["epoll"] = "EPollReactor"
    REACTORS["rtsig"] = "RealtimeSignalReactor"
    REACTORS["rtsig-epoll"] = REACTORS["rtsig-auto"] = "EdgeEPollReactor"

every_reactor = pytest.mark.parametrize("name", REACTORS)
both_signals = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"]
)

# The beginning of each program.
IMPORTS = """
import asyncio, atexit, os, signal, sys, threading, time
from twisted.internet.defer import Deferred, succeed
from twisted_rtsig import run
from twisted_rtsig.coro import *

def say(*what):
    print(*what, flush=True)

event_class, events = Event, []

def Event():
    # Keep a reference.  If nothing referred to the event, the garbage collector would
    # end the tasks that wait for it.
    events.append(event_class())
    return events[-1]

def other(number):
    return signal.SIGTERM if number == signal.SIGINT else signal.SIGINT

"""


class Program:
    """A script in a process of its own, which is killed if it takes too long."""

    def __init__(self, folder: Path, code: str, *command: str) -> None:
        self.script = folder / "program.py"
        self.script.write_text(IMPORTS + textwrap.dedent(code))
        self.process = subprocess.Popen(
            command or [sys.executable, str(self.script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            start_new_session=True,
        )
        self.watchdog = threading.Timer(DEADLINE * 2, self.process.kill)
        self.watchdog.start()

    def line(self) -> str:
        """The next line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Its exit status, the rest of its output, and its errors."""
        output, errors = self.process.communicate()
        self.watchdog.cancel()
        return self.process.returncode, output, errors


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Starts programs."""
    started: list[Program] = []

    def start(code: str, *command: str) -> Program:
        started.append(Program(tmp_path, code, *command))
        return started[-1]

    yield start
    for each in started:
        each.watchdog.cancel()
        each.process.kill()
        each.process.communicate()


Start = Callable[..., Program]


def output_of(program: Program) -> str:
    """The output of a program that ends with status 0 and without errors."""
    status, output, errors = program.end()
    assert (status, errors) == (0, ""), (status, output, errors)
    return output


# Results


@every_reactor
def test_run_returns_the_result_of_main_on_every_reactor(
    start: Start, name: str
) -> None:
    program = start(f"""
        async def main(one, other):
            from twisted.internet import reactor
            await sleep(0.001)
            return one + other, type(reactor).__name__, current_task().name

        print(*run(main, 1, 2, reactor={name!r}, name="the main task"))
    """)
    assert output_of(program) == f"3 {REACTORS[name]} the main task\n"


@pytest.mark.parametrize(
    "main",
    [
        "def main(x):\n    yield sleep(0)\n    return x",
        "def main(x):\n    return succeed(x)",
        "@coroutine\ndef main(x):\n    yield sleep(0)\n    return x",
        "async def main(x):\n    return x",
        "def main(x):\n    return x",
    ],
    ids=["generator", "Deferred", "@coroutine", "at once", "function"],
)
def test_run_takes_main_in_every_style(start: Start, main: str) -> None:
    assert output_of(start(f"{main}\nprint(run(main, 'it'))")) == "it\n"


@every_reactor
def test_a_child_process_and_a_thread(start: Start, name: str) -> None:
    """The reactor handles SIGCHLD, and starts and stops its threads."""
    program = start(f"""
        async def main():
            async with open_process([sys.executable, "-c", "print('child')"]) as child:
                output = await child.stream.read_line()
                return output, await child.wait(), await in_thread(lambda: "thread")

        print(*run(main, reactor={name!r}))
    """)
    assert output_of(program) == "b'child' 0 thread\n"


def test_the_module_and_the_command_line(start: Start) -> None:
    code = """
        async def main():
            await sleep(0)
            return "done"

        if __name__ == "__main__":
            print(run(main))
    """
    module = start(code, sys.executable, "-m", "program")
    assert output_of(module) == "done\n"
    text = IMPORTS + textwrap.dedent(code)
    assert output_of(start("", sys.executable, "-c", text)) == "done\n"


def test_an_interactive_interpreter(start: Start) -> None:
    """It goes on after main has failed, and a second run() raises an error."""
    program = start("")
    assert output_of(program) == ""
    lines = (
        IMPORTS
        + """
async def main():
    await sleep(0)
    raise ValueError("why")

run(main)
run(main)
print("goes on")
"""
    )
    done = subprocess.run(
        [sys.executable, "-i", "-q"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=DEADLINE * 2,
        cwd=CHECKOUT,
    )
    assert done.stdout == "goes on\n"
    assert "ValueError: why" in done.stderr
    assert "ReactorNotRestartable: run() was called when" in done.stderr


# Failures


def lines_of_files(errors: str) -> list[str]:
    """The files of the lines that tracebacks show."""
    return [line.split('"')[1] for line in errors.splitlines() if '  File "' in line]


@pytest.mark.parametrize("wait", ["await sleep(0.001)", "pass"])
def test_the_traceback_of_a_failure_has_the_lines_of_the_program(
    start: Start, wait: str
) -> None:
    program = start(f"""
        async def helper():
            {wait}
            raise ValueError("why")

        async def main():
            await spawn(helper)

        run(main)
    """)
    status, output, errors = program.end()
    assert (status, output) == (1, "")
    assert errors.endswith("ValueError: why\n")
    script = str(program.script)
    assert lines_of_files(errors) == [script, RUNNER, script, script]


def test_the_traceback_of_a_group_has_all_its_exceptions(start: Start) -> None:
    program = start("""
        async def buy(item):
            await sleep(0)
            try:
                {}[item]
            except KeyError as error:
                why = ValueError(f"no {item}")
                why.__notes__ = [f"a note on {item}"]
                raise why from error

        async def main():
            async with TaskGroup() as group:
                group.spawn(buy, "milk")
                group.spawn(buy, "tea")

        run(main)
    """)
    status, output, errors = program.end()
    assert (status, output) == (1, "")
    for text in (
        "ExceptionGroup: 2 of a group of tasks have failed (2 sub-exceptions)",
        *("KeyError: 'milk'", "ValueError: no milk", "a note on milk"),
        *("KeyError: 'tea'", "ValueError: no tea", "a note on tea"),
    ):
        assert errors.count(text) == 1, errors
    assert errors.count("the direct cause of the following exception") == 2
    assert set(lines_of_files(errors)) == {str(program.script), RUNNER}
    assert lines_of_files(errors).count(RUNNER) == 1


@pytest.mark.parametrize(
    ("argument", "status", "errors"),
    [("3", 3, ""), ("", 0, ""), ("'it is broken'", 1, "it is broken\n")],
)
def test_the_exit_status_of_main(
    start: Start, argument: str, status: int, errors: str
) -> None:
    program = start(f"""
        async def main():
            await sleep(0)
            sys.exit({argument})

        run(main)
    """)
    assert program.end() == (status, "", errors)


def test_main_cancels_itself_without_a_signal(start: Start) -> None:
    program = start("""
        from twisted.internet.defer import CancelledError

        async def main():
            current_task().cancel()
            await sleep(1)

        try:
            run(main)
        except CancelledError as error:
            print(error)
    """)
    assert output_of(program) == "main was cancelled\n"


# Signals


@every_reactor
@both_signals
def test_a_signal_cancels_main_and_is_the_status(
    start: Start, name: str, number: int
) -> None:
    """
    The exit status is that of a program which does not handle the signal.  Before that,
    everything cleans up.
    """
    program = start(f"""
        atexit.register(print, "at exit")

        async def main():
            try:
                say("waits")
                await Event().wait()
            finally:
                await sleep(0.01)
                print("main has cleaned up")

        try:
            run(main, reactor={name!r})
        finally:
            print("and so has the script")
    """)
    assert program.line() == "waits"
    program.send(number)
    status, output, errors = program.end()
    assert output.splitlines() == [
        "main has cleaned up",
        "and so has the script",
        "at exit",
    ]
    assert status == -number
    if number == signal.SIGTERM:
        assert errors == ""
    else:
        assert lines_of_files(errors) == [str(program.script), RUNNER]
        assert errors.endswith("KeyboardInterrupt\n")


@both_signals
def test_the_status_that_a_shell_sees(start: Start, number: int) -> None:
    code = """
        async def main():
            say(os.getpid())
            await Event().wait()

        run(main)
    """
    script = '"$0" program.py; echo status $?'
    program = start(code, "sh", "-c", script, sys.executable)
    os.kill(int(program.line()), number)
    # The shell goes on, since it was not interrupted itself.
    assert f"status {128 + number}" in program.end()[1]


@both_signals
def test_main_returns_when_it_is_cancelled(start: Start, number: int) -> None:
    program = start("""
        async def main():
            try:
                say("waits")
                await Event().wait()
            except Cancelled:
                return "done"

        print(run(main))
    """)
    assert program.line() == "waits"
    program.send(number)
    assert output_of(program) == "done\n"


@both_signals
def test_main_fails_when_it_is_cancelled(start: Start, number: int) -> None:
    program = start("""
        async def main():
            try:
                say("waits")
                await Event().wait()
            finally:
                raise ValueError("why")

        run(main)
    """)
    assert program.line() == "waits"
    program.send(number)
    status, _, errors = program.end()
    assert status == 1
    assert errors.endswith("ValueError: why\n")


# Programs that do not end when they are cancelled.  Each prints "stuck" then.
STUCK = {
    "main": """
        async def main():
            try:
                say("waits")
                await Event().wait()
            except Cancelled:
                say("stuck")
                await Event().wait()
    """,
    "thread": """
        def block():
            while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
                time.sleep(0.001)
            say("stuck")
            while True:
                time.sleep(60)

        async def main():
            say("waits")
            await in_thread(block)
    """,
    "busy": """
        async def main():
            say("waits")
            while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
                pass
            say("stuck")
            while True:
                pass
    """,
    "child task": """
        async def stubborn():
            try:
                await Event().wait()
            except Cancelled:
                say("stuck")
                await Event().wait()

        async def main():
            spawn(stubborn)
            say("waits")
            await Event().wait()
    """,
}


def stuck_program(start: Start, stuck: str, options: str, number: int) -> Program:
    """Start a program, and send it a signal after which it is stuck."""
    program = start(f"{textwrap.dedent(STUCK[stuck])}\nrun(main, {options})")
    assert program.line() == "waits"
    program.send(number)
    assert program.line() == "stuck"
    return program


@pytest.mark.parametrize("stuck", STUCK)
@both_signals
def test_a_second_signal_ends_the_process_at_once(
    start: Start, stuck: str, number: int
) -> None:
    program = stuck_program(start, stuck, "grace=None", number)
    second = signal.SIGTERM if number == signal.SIGINT else signal.SIGINT
    program.send(second)
    assert program.end() == (-second, "", "")


@every_reactor
def test_a_second_signal_of_the_same_kind_ends_the_process(
    start: Start, name: str
) -> None:
    program = stuck_program(start, "main", f"reactor={name!r}", signal.SIGTERM)
    program.send(signal.SIGTERM)
    assert program.end() == (-signal.SIGTERM, "", "")


@pytest.mark.parametrize("stuck", STUCK)
@both_signals
def test_the_process_ends_when_the_grace_is_over(
    start: Start, stuck: str, number: int
) -> None:
    program = stuck_program(start, stuck, "grace=1", number)
    status, output, errors = program.end()
    assert (status, output) == (-number, "")
    name = signal.Signals(number).name
    assert f"{name}: the program has not ended within 1 s" in errors
    assert "runner.py" not in errors
    # The log has the line at which the program is stuck.
    where = {
        "main": "in main: await Event().wait()",
        "thread": "in block: time.sleep(60)",
        "busy": "in main: ",
        "child task": "in stubborn: await Event().wait()",
    }
    assert where[stuck] in errors


def test_the_end_does_not_wait_for_a_log_that_no_process_reads(start: Start) -> None:
    """The pipe is full, and stays full."""
    program = start("""
        async def main():
            os.set_blocking(2, True)
            try:
                say("waits")
                await Event().wait()
            except Cancelled:
                say("stuck")
                while True:
                    os.write(2, bytes(1 << 20))

        run(main, grace=0.1)
    """)
    assert program.line() == "waits"
    program.send(signal.SIGTERM)
    assert program.line() == "stuck"
    assert program.process.wait(DEADLINE) == -signal.SIGTERM


def test_a_signal_before_the_start_of_main(start: Start) -> None:
    program = start("""
        from twisted_rtsig.epollreactor import EdgeEPollReactor

        reactor = EdgeEPollReactor()
        reactor.addSystemEventTrigger(
            "before", "startup", signal.raise_signal, signal.SIGTERM)

        async def main():
            say("this does not run")

        try:
            run(main, reactor=reactor)
        finally:
            print("cleaned up")
    """)
    assert program.end() == (-signal.SIGTERM, "cleaned up\n", "")


@both_signals
def test_a_signal_after_the_end_of_main(start: Start, number: int) -> None:
    """The signal is the exit status, and the result of main is lost."""
    program = start(f"""
        async def rest():
            try:
                await Event().wait()
            finally:
                signal.raise_signal({number})
                await sleep(0.01)
                print("cleaned up")

        async def main():
            spawn(rest)
            await sleep(0)
            return "lost"

        print(run(main))
    """)
    status, output, _ = program.end()
    assert (status, output) == (-number, "cleaned up\n")


# The end


def test_tasks_that_are_left_are_cancelled_and_waited_for(start: Start) -> None:
    program = start("""
        async def numbers():
            try:
                yield 1
                yield 2
            finally:
                await sleep(0.01)
                print("the generator has ended")

        # A global name, so that tasks that wait for it are not garbage.
        never = Event()

        async def rest(number):
            try:
                await never.wait()
            finally:
                if number:
                    # This one is cancelled as well.
                    spawn(rest, number - 1)
                await sleep(0.01)
                print("task", number, "has ended")

        async def fails():
            try:
                await never.wait()
            finally:
                raise ValueError("why") from KeyError("cause")

        async def main():
            spawn(rest, 1)
            spawn(fails)
            async for number in numbers():
                await sleep(0)
                return number

        print(run(main))
    """)
    status, output, errors = program.end()
    assert status == 0, errors
    assert sorted(output.splitlines()) == [
        "1",
        "task 0 has ended",
        "task 1 has ended",
        "the generator has ended",
    ], errors
    assert output.splitlines()[-1] == "1"
    assert "Task fails has failed" in errors
    assert "KeyError: 'cause'" in errors
    assert "ValueError: why" in errors


def leaves(task: str) -> str:
    """The end of a program that leaves a task."""
    return f"""
async def main():
    spawn({task})
    await sleep(0)
    return "done"

print(run(main, grace=0.05))
"""


def errors_of_done(program: Program) -> str:
    """The errors of a program that ends with status 0 and prints "done"."""
    status, output, errors = program.end()
    assert (status, output) == (0, "done\n")
    return errors


def test_a_task_that_does_not_end_is_logged(start: Start) -> None:
    code = """
async def stubborn():
    try:
        await Event().wait()
    except Cancelled:
        await Event().wait()
"""
    errors = errors_of_done(start(code + leaves("stubborn")))
    assert "1 tasks were cancelled because the program ends" in errors
    assert "in stubborn: await Event().wait()" in errors


def test_tasks_that_spawn_others_without_end_are_logged(start: Start) -> None:
    """Each of them ends when it is cancelled.  The program ends after its grace."""
    code = """
never = Event()

async def works():
    try:
        await never.wait()
    finally:
        spawn(works)
"""
    errors = errors_of_done(start(code + leaves("works")))
    assert "1 tasks were cancelled because the program ends" in errors
    assert "works" in errors


def test_an_end_that_fails_is_logged(start: Start) -> None:
    """The program ends nevertheless, with the result of main."""
    program = start("""
        from twisted_rtsig import runner

        def fail(reactor):
            raise ZeroDivisionError

        async def main():
            runner.tasks_of = fail
            return "done"

        print(run(main))
    """)
    errors = errors_of_done(program)
    assert "The end of run() has failed" in errors
    assert "ZeroDivisionError" in errors


@every_reactor
def test_services_stop_before_tasks_are_cancelled(start: Start, name: str) -> None:
    """A shutdown trigger stops a server, and run() waits for it."""
    program = start(f"""
        from twisted.internet.endpoints import TCP4ServerEndpoint

        async def main():
            from twisted.internet import reactor
            begun = Event()

            async def handler(stream):
                begun.set()
                await stream.write(await stream.read_line() + b"\\n")

            endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
            server = await serve(endpoint, handler)
            reactor.addSystemEventTrigger("before", "shutdown", server.stop, 20)
            server.stopping.wait().addCallback(lambda _: say("stops"))
            say(server.port.getHost().port)
            await begun.wait()

        run(main, reactor={name!r})
    """)
    with socket.create_connection(("127.0.0.1", int(program.line()))) as client:
        assert program.line() == "stops"
        client.sendall(b"question\n")
        assert client.recv(100) == b"question\n"
    assert output_of(program) == ""


@both_signals
def test_the_example_server_finishes_its_connections(start: Start, number: int) -> None:
    """A connected client gets its answer, and later clients are refused."""
    example = CHECKOUT / "examples" / "hello_server.py"
    program = start("", sys.executable, str(example), "0")
    port = int(program.line().removeprefix("listening on port "))
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
        assert client.recv(100) == b"What is your name?\n"
        program.send(number)
        with contextlib.suppress(ConnectionError):
            # Connect until the server no longer listens.
            while True:
                socket.create_connection(("127.0.0.1", port), DEADLINE).close()
        client.sendall(b"Ann\n")
        assert client.recv(100) == b"Hello, Ann!\n"
    assert program.end()[0] == -number


def test_main_stops_the_reactor(start: Start) -> None:
    program = start("""
        async def main():
            from twisted.internet import reactor
            reactor.stop()
            try:
                await Event().wait()
            finally:
                await sleep(0)
                print("cleaned up")

        try:
            run(main)
        except RuntimeError as error:
            print(error)
    """)
    output = output_of(program)
    assert output.startswith(
        "cleaned up\nthe reactor was stopped before main had ended"
    )


@every_reactor
def test_signal_handlers_are_restored(start: Start, name: str) -> None:
    program = start(f"""
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGCHLD

        def handlers():
            wakeup = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(wakeup)
            return wakeup, [signal.getsignal(each) for each in numbers]

        ends = os.pipe()
        os.set_blocking(ends[1], False)
        signal.set_wakeup_fd(ends[1])
        signal.signal(signal.SIGCHLD, handlers)
        before = handlers()

        async def main():
            await sleep(0)
            return handlers()

        print(run(main, reactor={name!r}) != before, handlers() == before)
    """)
    assert output_of(program) == "True True\n"


def test_signal_handlers_of_the_program_are_kept(start: Start) -> None:
    program = start("""
        told = Event()
        signal.signal(signal.SIGTERM, lambda *_: reactor.callFromThread(told.set))
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        async def main():
            global reactor
            from twisted.internet import reactor
            signal.raise_signal(signal.SIGINT)
            say("waits")
            await told.wait()
            return "told"

        print(run(main))
    """)
    assert program.line() == "waits"
    program.send(signal.SIGINT)
    program.send(signal.SIGTERM)
    assert output_of(program) == "told\n"


# Errors


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("run(main, grace=-1)", "ValueError: grace=-1: 0 is the least"),
        ("run(main, reactor='fast')", "ValueError: no reactor is called 'fast'"),
        ("run(main())", "TypeError: run\\(\\) needs a function .*: call run\\(main\\)"),
        ("run(main, 1)", "TypeError: main\\(\\) takes 0 positional arguments"),
        (
            "import twisted.internet.reactor\nrun(main, reactor='select')",
            "ReactorAlreadyInstalledError: \\w+ is installed already, .* not 'select'",
        ),
        (
            "from twisted.internet import selectreactor\nselectreactor.install()\n"
            "run(main)",
            "ReactorAlreadyInstalledError: SelectReactor is installed already, and not "
            ".*reactor of twisted-rtsig.*twisted_rtsig.install\\(\\)",
        ),
        (
            "async def outer():\n    run(main)\nrun(outer)",
            "RuntimeError: run\\(\\) was called while the reactor runs",
        ),
        (
            "run(main)\nrun(main)",
            "ReactorNotRestartable: run\\(\\) was called when the reactor had run",
        ),
    ],
)
def test_a_wrong_call_raises_a_clear_error(start: Start, code: str, error: str) -> None:
    program = start(f"async def main():\n    pass\n\n{code}\n")
    status, output, errors = program.end()
    assert (status, output) == (1, "")
    assert re.search(error, errors.splitlines()[-1]), errors
    assert "never awaited" not in errors


def test_run_works_only_in_the_main_thread() -> None:
    caught: list[BaseException] = []

    async def main() -> None:
        pass

    def thread() -> None:
        try:
            twisted_rtsig.run(main)
        except BaseException as error:
            caught.append(error)

    started = threading.Thread(target=thread)
    started.start()
    started.join()
    [error] = caught
    assert isinstance(error, RuntimeError)
    assert "run() works only in the main thread" in str(error)


@pytest.mark.parametrize(
    ("installed", "asked"),
    [
        ("from twisted.internet import selectreactor as r; r.install()", "'select'"),
        ("from twisted.internet import reactor", "reactor"),
        ("from twisted.internet import reactor", "'default'"),
        ("import twisted_rtsig; twisted_rtsig.install()", "None"),
        ("import twisted_rtsig; twisted_rtsig.install()", "'rtsig-auto'"),
        ("from twisted_rtsig import rtsigreactor as r; r.install()", "None"),
        (
            "from twisted.internet.selectreactor import SelectReactor",
            "SelectReactor",
        ),
        (
            "from twisted.internet.selectreactor import SelectReactor",
            "SelectReactor()",
        ),
        (
            "from twisted.internet.selectreactor import SelectReactor, install\n"
            "install()",
            "SelectReactor",
        ),
    ],
)
def test_run_uses_an_installed_reactor_that_fits(
    start: Start, installed: str, asked: str
) -> None:
    main = "async def main():\n    return 1\n"
    program = start(f"{installed}\n{main}print(run(main, reactor={asked}))")
    assert output_of(program) == "1\n"
