"""The pytest plugin.  Each test runs pytest in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

# The short names of reactors, and the classes that they choose.
REACTORS = {"select": "SelectReactor", "asyncio": "AsyncioSelectorReactor"}
if sys.platform == "linux":
    REACTORS["rtsig"] = "RealtimeSignalReactor"
    REACTORS["rtsig-epoll"] = "EdgeEPollReactor"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs pytest with options on a file of tests."""

    def run_pytest(code: str, *options: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_it.py").write_text(textwrap.dedent(code))
        ini = tmp_path / "pytest.ini"
        if not ini.exists():
            ini.write_text("[pytest]\n")
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:randomly", *options],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )

    return run_pytest


def test_the_configuration_names_the_reactor(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\ntwisted_reactor = select\n")
    code = """
        def test_it():
            from twisted.internet import reactor
            assert type(reactor).__name__ == "SelectReactor"
    """
    done = run(code)
    assert done.returncode == 0, done.stdout
    # The command line takes precedence.
    done = run(code, "--twisted-reactor=asyncio")
    assert "'AsyncioSelectorReactor' == 'SelectReactor'" in done.stdout


def test_without_a_reactor_the_plugin_does_nothing(run: Run) -> None:
    done = run(
        """
        import sys

        def test_it():
            assert "twisted.internet.reactor" not in sys.modules

        async def test_async():
            pass
        """
    )
    assert "async def functions are not natively supported" in done.stdout
    assert "1 passed" in done.stdout
    assert "reactor:" not in done.stdout


TESTS = """
import pytest
from hypothesis import given, settings, strategies
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted_rtsig.coro import current_task, sleep
from twisted_rtsig.coro import timeout


async def test_task():
    assert current_task().name == "test_task"
    assert current_task().reactor is reactor
    with pytest.raises(TimeoutError):
        with timeout(0.001):
            await Deferred()


@inlineCallbacks
def test_inline_callbacks():
    yield deferLater(reactor, 0, int)
    assert (yield deferToThread(int, "5")) == 5


def test_deferred():
    return deferLater(reactor, 0, int)


def test_deferred_fails():
    def fail():
        assert 1 == 2
    return deferLater(reactor, 0, fail)


async def test_fails():
    await sleep(0)
    mine = 3
    assert mine == 4


async def test_skips():
    await sleep(0)
    pytest.skip("no need")


@pytest.mark.xfail(strict=True)
async def test_expected_to_fail():
    await sleep(0)
    raise ValueError


class TestMethods:
    async def test_method(self, reactor):
        await sleep(0)
        assert reactor == "a fixture"

    @pytest.fixture
    def reactor(self):
        return "a fixture"


@pytest.mark.parametrize("n", [1, 2])
async def test_parameters(n):
    await sleep(0)
    assert n in (1, 2)


examples = []


@settings(max_examples=10)
@given(n=strategies.integers())
async def test_hypothesis(n):
    await sleep(0)
    examples.append(n)


def test_hypothesis_has_examples():
    assert len(examples) > 1


@pytest.mark.asyncio
async def test_of_another():
    raise AssertionError("not ours")
"""


@pytest.mark.parametrize("name", REACTORS)
def test_tests_of_every_style_run_on_the_reactor(run: Run, name: str) -> None:
    done = run(TESTS, f"--twisted-reactor={name}", "-rs", "-m", "not asyncio")
    assert "2 failed, 8 passed, 1 skipped, 1 deselected, 1 xfailed" in done.stdout, (
        done.stdout
    )
    assert f"\nreactor: {name} ({REACTORS[name]})\n" in done.stdout
    assert "should return None" not in done.stdout
    # The failures look like those of plain functions.
    assert ">       assert 1 == 2\n" in done.stdout
    assert ">       assert mine == 4\nE       assert 3 == 4\n" in done.stdout
    assert "no need" in done.stdout


def test_tests_of_other_plugins_are_left_alone(run: Run) -> None:
    done = run(TESTS, "--twisted-reactor=select", "-m", "asyncio")
    assert "not ours" not in done.stdout
    assert "async def functions are not natively supported" in done.stdout


FIXTURES = """
import pytest
from twisted_rtsig.coro import Event, TaskGroup, current_task, sleep

log = []


@pytest.fixture
async def number():
    await sleep(0)
    return 5


@pytest.fixture(scope="module")
async def echo():
    '''Echoes in the background, while the tests run.'''
    asked, answered = Event(), Event()

    async def answer():
        await asked.wait()
        answered.set()

    task = current_task()
    async with TaskGroup() as group:
        group.spawn(answer)
        yield asked, answered
        assert current_task() is task
    await sleep(0)
    log.append("closed")


class TestMethods:
    here = 7

    @pytest.fixture
    async def of_class(self):
        await sleep(0)
        self.there = 8
        yield self.here

    async def test_it(self, number, of_class, echo):
        assert (number, of_class, self.there) == (5, 7, 8)
        asked, answered = echo
        asked.set()
        await answered.wait()

    def test_a_plain_test(self, number):
        assert number == 5
        assert log == []


@pytest.fixture(params=["set up", "tear down", "yields twice"])
async def broken(request):
    await sleep(0)
    if request.param == "set up":
        raise ValueError("when it was set up")
    yield
    await sleep(0)
    if request.param == "tear down":
        raise ValueError("when it was torn down")
    if request.param == "yields twice":
        yield


def test_broken(broken):
    pass
"""


def test_async_fixtures(run: Run) -> None:
    done = run(FIXTURES, "--twisted-reactor=select")
    assert "4 passed, 3 errors" in done.stdout, done.stdout
    assert "ValueError: when it was set up" in done.stdout
    assert "ValueError: when it was torn down" in done.stdout
    assert "has more than one 'yield'" in done.stdout


def test_a_test_that_stops_the_reactor(run: Run) -> None:
    done = run(
        """
        from twisted.internet import reactor
        from twisted.internet.defer import Deferred

        def test_it():
            reactor.callLater(0, reactor.stop)
            return Deferred()
        """,
        "--twisted-reactor=select",
    )
    assert "KeyboardInterrupt" in done.stdout
    assert done.returncode == pytest.ExitCode.INTERRUPTED


def test_the_reactor_shuts_down_with_the_session(run: Run) -> None:
    """Its threads end.  Python would wait for them."""
    done = run(
        """
        from twisted.internet import reactor
        from twisted.internet.threads import deferToThread

        async def test_it():
            await deferToThread(int)
            reactor.addSystemEventTrigger("during", "shutdown", print, "GOOD BYE")
        """,
        "--twisted-reactor=select",
        "-s",
    )
    assert done.returncode == 0, done.stdout
    assert "GOOD BYE" in done.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("selct", "no reactor is called 'selct'; there are asyncio, "),
        pytest.param(
            "rtsig-kqueue",
            "the reactor cannot be 'rtsig-kqueue': kqueue exists on BSD",
            marks=pytest.mark.skipif(
                sys.platform not in ("linux", "win32"), reason="where it cannot run"
            ),
        ),
    ],
)
def test_an_unknown_or_impossible_reactor_is_a_usage_error(
    run: Run, name: str, says: str
) -> None:
    done = run("def test_it(): pass", f"--twisted-reactor={name}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {says}" in done.stdout


def test_a_reactor_that_is_installed_already_is_a_usage_error(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "hasty.py").write_text("from twisted.internet import reactor\n")
    done = run("def test_it(): pass", "--twisted-reactor=asyncio", "-p", "hasty")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "is installed already: something has imported" in done.stdout


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder of plugins for Twisted, one of which imports the reactor."""
    folder = tmp_path / "twisted" / "plugins"
    folder.mkdir(parents=True)
    # The plugins of txtorcon and txi2p do so.
    (folder / "hasty.py").write_text("from twisted.internet import reactor\n")
    return folder


@pytest.mark.parametrize("name", REACTORS)
@pytest.mark.usefixtures("plugins")
def test_plugins_of_twisted_that_import_the_reactor(run: Run, name: str) -> None:
    """They are not imported to find the reactors of Twisted and of this package."""
    done = run("def test_it(): pass", f"--twisted-reactor={name}")
    assert done.returncode == 0, done.stdout
    assert f"reactor: {name} ({REACTORS[name]})" in done.stdout


def test_a_plugin_of_twisted_installs_a_reactor(run: Run, plugins: Path) -> None:
    (plugins / "slow.py").write_text(
        "from twisted.application.reactors import Reactor\n"
        "mine = Reactor('mine', 'twisted.internet.selectreactor', 'A third one.')\n"
    )
    done = run("def test_it(): pass", "--twisted-reactor=mine")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "one of Twisted's plugins imports twisted.internet.reactor" in done.stdout
    # Now Twisted has a cache of its plugins, and does not import the first one.
    done = run("def test_it(): pass", "--twisted-reactor=mine")
    assert "reactor: mine (SelectReactor)" in done.stdout


# Ctrl-C


class Session:
    """pytest, on a file of tests that prints a word when it should be interrupted."""

    def __init__(self, folder: Path, code: str, reactor: str, *options: str) -> None:
        (folder / "test_it.py").write_text(textwrap.dedent(code))
        (folder / "pytest.ini").write_text("[pytest]\n")
        # A shell ignores SIGINT in its background processes.
        main = (
            "import signal, sys, pytest\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "sys.exit(pytest.main())"
        )
        arguments = ["-s", "-p", "no:randomly", f"--twisted-reactor={reactor}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", main, *arguments, *options],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def interrupt_at(self, word: str) -> None:
        """Send SIGINT when the session prints this word."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output += line
            if word in line:
                self._process.send_signal(signal.SIGINT)
                return
        raise AssertionError(self.output)

    def finish(self) -> str:
        """
        Wait for the end of the session, which must report the interruption without a
        traceback.

        :return: all output.
        """
        rest, _ = self._process.communicate(timeout=60)
        self.output += rest
        assert self._process.returncode == pytest.ExitCode.INTERRUPTED, self.output
        assert "Traceback" not in self.output
        return self.output


needs_sigint = pytest.mark.skipif(
    sys.platform == "win32", reason="no process can send Ctrl-C to just one other"
)

INTERRUPTED = """
import pytest
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater
from twisted_rtsig.coro import TaskGroup, current_task, sleep, spawn


@pytest.fixture(scope="module")
async def wide():
    yield
    await sleep(0.1)
    print("WIDE TORN DOWN")


@pytest.fixture
async def narrow(wide):
    async with TaskGroup() as group:
        ticking = group.spawn(sleep, 1000, name="ticking")
        yield
        await sleep(0.1)
        ticking.cancel()
    print("NARROW TORN DOWN")


async def linger():
    # Until the reactor runs.
    await sleep(0)
    print("READY", flush=True)
    try:
        await sleep(0.05)
        await Deferred()
    finally:
        await sleep(0.01)
        print("CLEANED UP")
    print("WENT ON")


async def test_task(narrow):
    await linger()


def test_deferred(narrow):
    return spawn(linger).as_deferred()


@inlineCallbacks
def test_inline_callbacks(narrow):
    yield spawn(linger).as_deferred()


async def test_second():
    print("SECOND TEST")
"""


@needs_sigint
@pytest.mark.parametrize(
    ("name", "test"),
    [
        *((name, "task") for name in REACTORS),
        ("select", "deferred"),
        ("select", "inline_callbacks"),
    ],
)
def test_ctrl_c_cancels_the_test_and_tears_down_its_fixtures(
    tmp_path: Path, name: str, test: str
) -> None:
    choice = f"test_{test} or second"
    session = Session(tmp_path, INTERRUPTED, name, "-k", choice)
    session.interrupt_at("READY")
    output = session.finish()
    words = ["CLEANED UP", "NARROW TORN DOWN", "WIDE TORN DOWN"]
    places = [output.index(word) for word in words]
    assert places == sorted(places)
    assert "WENT ON" not in output
    assert "SECOND TEST" not in output
    # This is the tree of tasks before the cancellation.
    assert f"test_{test} was interrupted" in output
    assert re.search(r"test_it.py:\d+ in linger: await ", output)
    assert re.search(r"^    ticking: \d\.\d s, waits for ", output, re.MULTILINE)


@needs_sigint
def test_ctrl_c_is_shown_despite_capture(tmp_path: Path) -> None:
    code = """
        import os, signal
        from twisted_rtsig.coro import sleep

        async def test_it():
            await sleep(0)
            print("CAPTURED")
            os.kill(os.getpid(), signal.SIGINT)
            await sleep(1000)
    """
    session = Session(tmp_path, code, "select", "--capture=fd")
    output = session.finish()
    assert "more seconds of sleep" in output
    assert "CAPTURED" not in output


@needs_sigint
def test_ctrl_c_kills_the_child(tmp_path: Path) -> None:
    code = """
        import sys
        from twisted_rtsig.coro import open_process

        async def test_it():
            program = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
            async with open_process([sys.executable, "-c", program]) as child:
                print("CHILD", int(await child.stream.read_line()))
                print("READY", flush=True)
                await child.wait()
    """
    session = Session(tmp_path, code, "select")
    session.interrupt_at("READY")
    child = int(re.findall(r"CHILD (\d+)", session.finish())[0])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@needs_sigint
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("set up", "broken was interrupted"),
        ("tear down", "broken was interrupted"),
        ("after", "After the interruption it failed: ValueError('in the fixture')"),
    ],
)
def test_ctrl_c_in_a_fixture(tmp_path: Path, place: str, says: str) -> None:
    """The interruption comes in a fixture, or in a test whose fixture then fails."""
    code = f"""
        import pytest
        from twisted_rtsig.coro import sleep

        async def ready(place):
            if place == {place!r}:
                await sleep(0)
                print("READY", flush=True)
                await sleep(1000)

        @pytest.fixture
        async def outer():
            yield
            print("OUTER TORN DOWN")

        @pytest.fixture
        async def broken(outer):
            try:
                await ready("set up")
                yield
                await ready("tear down")
                if {place!r} == "after":
                    raise ValueError("in the fixture")
            finally:
                print("FINALLY")

        async def test_it(broken):
            await ready("after")
    """
    session = Session(tmp_path, code, "select")
    session.interrupt_at("READY")
    output = session.finish()
    assert says in output
    assert output.index("FINALLY") < output.index("OUTER TORN DOWN")


@needs_sigint
def test_a_second_ctrl_c_ends_the_wait_for_the_test(tmp_path: Path) -> None:
    """The test ignores its cancellation."""
    code = """
        import pytest
        from twisted_rtsig.coro import shield, sleep

        @pytest.fixture
        async def fixture():
            yield
            await sleep(0)
            print("TEARING DOWN", flush=True)
            await sleep(1000)

        async def test_it(fixture):
            await sleep(0)
            print("READY", flush=True)
            try:
                await sleep(1000)
            finally:
                with shield():
                    await sleep(0)
                    print("CANCELLED", flush=True)
                    await sleep(1000)
                    print("NEVER")

        def test_second():
            print("NEVER")
    """
    session = Session(tmp_path, code, "select", "-p", "no:terminal")
    session.interrupt_at("READY")
    session.interrupt_at("CANCELLED")
    session.interrupt_at("TEARING DOWN")
    output = session.finish()
    assert "and did not end when it was cancelled" in output
    assert "NEVER" not in output


@needs_sigint
@pytest.mark.parametrize("name", sorted({"select", "rtsig"} & set(REACTORS)))
def test_ctrl_c_in_code_that_blocks(tmp_path: Path, name: str) -> None:
    """The code is a task, or a plain test whose SIGINT handler Twisted has replaced."""
    # One long sleep would go on if the signal came just before it.
    plain = """
        import time
        from twisted_rtsig.coro import sleep

        async def test_first():
            await sleep(0)

        def test_plain():
            print("READY", flush=True)
            while True:
                time.sleep(0.01)
    """
    session = Session(tmp_path, plain, name)
    session.interrupt_at("READY")
    assert "the session was interrupted" in session.finish()
    task = """
        import time
        from twisted_rtsig.coro import sleep

        async def test_task():
            await sleep(0)
            print("READY", flush=True)
            try:
                time.sleep(0.5)
                # Only the reactor handles the first one.
                print("AGAIN", flush=True)
                while True:
                    time.sleep(0.01)
            finally:
                print("FINALLY")
    """
    session = Session(tmp_path, task, name)
    session.interrupt_at("READY")
    session.interrupt_at("AGAIN")
    assert "FINALLY" in session.finish()


@needs_sigint
def test_ctrl_c_before_the_reactor_runs(tmp_path: Path) -> None:
    """A task begins before the reactor runs.  Its fixture is torn down nevertheless."""
    code = """
        import pytest, time
        from twisted_rtsig.coro import sleep

        @pytest.fixture
        async def fixture():
            yield
            await sleep(0)
            print("TORN DOWN")

        async def test_task(fixture):
            print("READY", flush=True)
            while True:
                time.sleep(0.01)
    """
    session = Session(tmp_path, code, "select")
    session.interrupt_at("READY")
    output = session.finish()
    assert "was interrupted" in output
    assert "TORN DOWN" in output


# Tests that leave something behind

LEFT_BEHIND = """
import gc
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail
from twisted.internet.protocol import DatagramProtocol, Factory, Protocol
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.trial.unittest import TestCase
from twisted_rtsig.coro import sleep, spawn
from twisted_rtsig.coro.testing import SansIO

ERROR = ValueError("logged")
FIXTURES = ()


async def forever():
    await Deferred()


async def test_clean():
    await spawn(sleep, 0)
    spawn(sleep, 0.01)
    reactor.callLater(1000, print).cancel()
    port = reactor.listenTCP(0, Factory.forProtocol(Protocol), interface="127.0.0.1")
    # Not waited for.
    port.stopListening()


def test_clean_plain():
    pass


def test_in_memory():
    SansIO(lambda stream: stream.read())


async def test_dirty_task():
    spawn(sleep, 1000)


async def test_dirty_task_that_nothing_refers_to():
    spawn(forever)
    gc.collect()


def test_dirty_plain_task():
    spawn(forever)


async def test_dirty_call():
    reactor.callLater(1000, print)


def test_dirty_plain_call():
    reactor.callLater(1000, print)


async def test_dirty_port():
    reactor.listenTCP(0, Factory.forProtocol(Protocol), interface="127.0.0.1")


async def test_dirty_udp_port():
    reactor.listenUDP(0, DatagramProtocol(), interface="127.0.0.1")


async def test_dirty_log():
    try:
        raise ERROR
    except ValueError:
        Logger().failure("oh")


async def test_dirty_deferred():
    fail(ERROR)


async def test_dirty_deferred_in_a_circle():
    deferred = fail(ERROR)
    deferred.itself = deferred


async def test_dirty_failed_task():
    async def failing():
        raise ERROR
    spawn(failing)
    await sleep(0)


async def test_clean_after_all_those():
    assert not [each for each in reactor.getDelayedCalls() if each.active()]


async def test_flushed(flush_logged_errors):
    for _ in range(2):
        fail(ERROR)
        assert flush_logged_errors(KeyError) == []
        assert [each.value for each in flush_logged_errors(ValueError)] == [ERROR]
    fail(ERROR)
    assert len(flush_logged_errors()) == 1


class TestByTrial(TestCase):
    def test_flushed(self):
        fail(ERROR)
        assert len(self.flushLoggedErrors(ValueError)) == 1


@pytest.mark.twisted_allow_unclean
async def test_allowed():
    spawn(sleep, 1000)
    reactor.callLater(1000, print)
    fail(ERROR)


def test_fails_only_once():
    reactor.callLater(1000, print)
    assert 1 == 2
"""


@pytest.mark.parametrize("name", REACTORS)
def test_tests_that_leave_something_behind_fail(run: Run, name: str) -> None:
    done = run(LEFT_BEHIND, f"--twisted-reactor={name}", "-v", "--strict-markers")
    output = done.stdout
    tests = set(re.findall(r"^(?:    def|def|async def) (test_\w+)", LEFT_BEHIND, re.M))
    unclean = re.findall(r"ERROR at teardown of (\w+)", output)
    assert len(unclean) == len(set(unclean)), output
    assert set(unclean) == {each for each in tests if "dirty" in each}, output
    assert "1 failed, 18 passed, 11 errors" in output
    for words in (
        "It left behind the task sleep, which waits for 99",
        "It left behind the task forever, which waits for <Deferred at",
        "It left behind <DelayedCall 0x",
        "Port'> of <class 'twisted.internet.protocol.Factory'> on ",
        "<class 'twisted.internet.protocol.DatagramProtocol'> on ",
        "builtins.ValueError: logged",
    ):
        assert words in output
    assert done.returncode == pytest.ExitCode.TESTS_FAILED


BROKEN_FIXTURES = """
import pytest
from twisted.internet import reactor
from twisted_rtsig.coro import sleep, spawn


@pytest.fixture
def broken():
    yield
    raise OSError("broken")


@pytest.fixture
async def broken_later():
    yield
    await sleep(0)
    raise OSError("broken")


def test_plain(broken):
    spawn(sleep, 1000)


async def test_async(broken_later):
    reactor.callLater(1000, print)


def test_clean():
    assert not [each for each in reactor.getDelayedCalls() if each.active()]
"""


def test_tests_with_broken_fixtures_leave_nothing_for_the_next_test(run: Run) -> None:
    """The plugin removes it, and the error of the fixture is shown."""
    done = run(BROKEN_FIXTURES, "--twisted-reactor=rtsig")
    assert "3 passed, 2 errors" in done.stdout, done.stdout
    assert done.stdout.count("E       OSError: broken") == 2
    assert "not clean" not in done.stdout


def test_the_marks_are_known_without_a_reactor(run: Run) -> None:
    done = run(
        """
        import pytest

        @pytest.mark.twisted_allow_unclean
        @pytest.mark.twisted_timeout(5)
        def test_it():
            pass
        """,
        "--strict-markers",
    )
    assert done.returncode == 0, done.stdout


WIDE = """
import pytest
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import LoopingCall
from twisted_rtsig.coro import TaskGroup, connect, serve, sleep, spawn


async def answer(stream):
    spawn(sleep, 1000, name="of the server")
    reactor.callLater(1000, print)
    async for line in stream.lines():
        await stream.write(line + b"\\n")


@pytest.fixture(scope="module")
async def server():
    # Its watchdog, and this one, are delayed calls that are made again and again.
    loop = LoopingCall(int)
    loop.start(0.001)
    endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    server = await serve(endpoint, answer, idle_timeout=0.1)
    yield server.port.getHost().port
    loop.stop()
    await server.stop()


@pytest.fixture(scope="session", autouse=True)
def ticking():
    call = reactor.callLater(1000, print)
    yield
    call.cancel()


@pytest.fixture
async def client(server):
    stream = await connect(TCP4ClientEndpoint(reactor, "127.0.0.1", server))
    yield stream
    # The server has not seen that when the test is over.
    stream.close()


@pytest.fixture
def leaves():
    reactor.callLater(1000, print)


@pytest.mark.parametrize("n", [1, 2, 3])
async def test_clean(client, n):
    await client.write(b"hi\\n")
    assert await client.read_line() == b"hi"
    await sleep(0.01)


async def test_dirty_call(client):
    reactor.callLater(1000, print)


async def test_dirty_task(client):
    spawn(sleep, 1000)


async def test_dirty_port(client):
    reactor.listenTCP(0, Factory.forProtocol(Protocol), interface="127.0.0.1")


async def test_dirty_fixture(leaves, client):
    pass


async def test_clean_at_the_end(client):
    pass
"""


@pytest.mark.parametrize("name", REACTORS)
def test_tasks_and_calls_of_wider_fixtures_are_allowed(run: Run, name: str) -> None:
    done = run(WIDE, f"--twisted-reactor={name}", "-v")
    output = done.stdout
    unclean = re.findall(r"ERROR at teardown of (\w+)", output)
    assert sorted(unclean) == [
        "test_dirty_call",
        "test_dirty_fixture",
        "test_dirty_port",
        "test_dirty_task",
    ], output
    assert "8 passed, 4 errors" in output


# Limits

LATE = """
import pytest
from hypothesis import given, settings, strategies
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted_rtsig.coro import sleep, spawn


async def wait():
    try:
        await sleep(1000)
    finally:
        await sleep(0)
        print("CLEANED UP")


async def test_late_task():
    await wait()


def test_late_deferred():
    return Deferred()


@inlineCallbacks
def test_late_inline_callbacks():
    yield spawn(wait).as_deferred()


@settings(max_examples=3, deadline=None)
@given(n=strategies.integers(min_value=10**30))
async def test_late_hypothesis(n):
    await wait()


async def test_late_and_then_fails():
    try:
        await wait()
    finally:
        raise ValueError("as well")


@pytest.fixture(params=["set up", "tear down"])
async def slow(request):
    if request.param == "set up":
        await wait()
    yield
    if request.param == "tear down":
        await wait()


def test_fixture(slow):
    pass


@pytest.fixture
async def slow_for_all():
    await sleep(0.5)


def test_fixture_of_both(slow_for_all):
    pass


@pytest.mark.twisted_timeout(60)
async def test_fixture_with_time(slow_for_all):
    pass


@pytest.fixture(scope="module")
async def wide():
    await sleep(0.5)


async def test_in_time(wide):
    await sleep(0)


@pytest.mark.twisted_timeout(60)
async def test_of_its_own():
    await sleep(0.5)


@pytest.mark.twisted_timeout(0)
async def test_unlimited():
    await sleep(0.5)
"""


@pytest.mark.parametrize("name", REACTORS)
def test_a_test_that_takes_too_long_fails(run: Run, name: str) -> None:
    done = run(LATE, f"--twisted-reactor={name}", "--twisted-timeout=0.2", "-rA")
    output = done.stdout
    assert "0.2 s for each test" in output
    assert set(re.findall(r"^FAILED test_it.py::(\w+)", output, re.M)) == {
        "test_late_task",
        "test_late_deferred",
        "test_late_inline_callbacks",
        "test_late_hypothesis",
        "test_late_and_then_fails",
    }, output
    assert set(re.findall(r"^ERROR test_it.py::(\S+)", output, re.M)) == {
        "test_fixture[set",
        "test_fixture[tear",
        "test_fixture_of_both",
    }
    assert "Timeout: test_late_task took more than 0.2 s. The tasks at" in output
    assert "in wait: await sleep(1000)" in output
    assert "and when it was cancelled it raised ValueError('as well')" in output
    # Each has cleaned up once: hypothesis did not look for a smaller example.
    assert "The example: n=1000000000000000000000000000000" in output
    cleaned_up = ["late_task", "inline_callbacks", "hypothesis", "and_then_fails"]
    cleaned_up += ["set up", "tear down"]
    assert len(re.findall("^CLEANED UP$", output, re.M)) == len(cleaned_up)


def test_the_configuration_sets_the_timeout(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\ntwisted_timeout = 0.1\n")
    code = """
        from twisted_rtsig.coro import sleep

        async def test_it():
            await sleep(0.5)
    """
    done = run(code, "--twisted-reactor=select")
    assert "took more than 0.1 s" in done.stdout
    # The command line takes precedence.
    assert run(code, "--twisted-reactor=select", "--twisted-timeout=0").returncode == 0


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_wrong_timeout_is_a_usage_error(run: Run, text: str) -> None:
    options = ("--twisted-reactor=select", f"--twisted-timeout={text}")
    done = run("def test_it(): pass", *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"a timeout is a number of seconds, not '{text}'" in done.stdout


FORGETS = """
    from twisted_rtsig.coro import sleep

    async def test_it():
        sleep(0)
        await sleep(0)
"""


def test_a_forgotten_await_is_a_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TWISTED_RTSIG_DEBUG", raising=False)
    done = run(FORGETS, "--twisted-reactor=select")
    assert done.returncode == 0, done.stdout
    assert "test_it.py:5: UnawaitedWarning: sleep() was never awaited" in done.stdout
    done = run(FORGETS, "--twisted-reactor=select", "-W", "error")
    assert done.returncode == 1
    assert "UnawaitedWarning: sleep() was never awaited" in done.stdout
    monkeypatch.setenv("TWISTED_RTSIG_DEBUG", "0")
    done = run(FORGETS, "--twisted-reactor=select", "-W", "error")
    assert done.returncode == 0, done.stdout


def test_a_fixture_is_torn_down_when_its_group_fails(run: Run) -> None:
    """The error of its task is shown."""
    done = run(
        """
        import pytest
        from twisted_rtsig.coro import TaskGroup, sleep

        @pytest.fixture
        async def group():
            async def fail():
                await sleep(0)
                raise ValueError("in the background")

            try:
                async with TaskGroup() as group:
                    group.spawn(fail)
                    yield group
            finally:
                print("TORN DOWN")

        async def test_it(group):
            await sleep(0.01)
        """,
        "--twisted-reactor=select",
    )
    assert "ValueError: in the background" in done.stdout
    assert "TORN DOWN" in done.stdout
    assert "was still open" not in done.stdout
