"""The pytest plugin, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

# With the class that each is to be.
REACTORS = {"select": "SelectReactor", "asyncio": "AsyncioSelectorReactor"}
if sys.platform == "linux":
    REACTORS["rtsig"] = "RealtimeSignalReactor"
    REACTORS["rtsig-epoll"] = "EdgeEPollReactor"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a file of tests, with options."""

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
            timeout=60,
        )

    return run_pytest


def test_the_name_in_the_configuration(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\ntwisted_reactor = select\n")
    code = """
        def test_it():
            from twisted.internet import reactor
            assert type(reactor).__name__ == "SelectReactor"
    """
    done = run(code)
    assert done.returncode == 0, done.stdout
    # The command line has precedence.
    done = run(code, "--twisted-reactor=asyncio")
    assert "'AsyncioSelectorReactor' == 'SelectReactor'" in done.stdout


def test_without_a_name_there_is_nothing(run: Run) -> None:
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
def test_tests_that_take_time(run: Run, name: str) -> None:
    done = run(TESTS, f"--twisted-reactor={name}", "-rs", "-m", "not asyncio")
    assert "2 failed, 8 passed, 1 skipped, 1 deselected, 1 xfailed" in done.stdout, (
        done.stdout
    )
    assert f"\nreactor: {name} ({REACTORS[name]})\n" in done.stdout
    assert "should return None" not in done.stdout
    # As pytest shows those of plain functions.
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


def test_fixtures(run: Run) -> None:
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
    """Its threads, for which Python would wait, have ended."""
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
def test_a_reactor_that_cannot_be(run: Run, name: str, says: str) -> None:
    done = run("def test_it(): pass", f"--twisted-reactor={name}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {says}" in done.stdout


def test_a_reactor_that_came_before(run: Run, tmp_path: Path) -> None:
    (tmp_path / "hasty.py").write_text("from twisted.internet import reactor\n")
    done = run("def test_it(): pass", "--twisted-reactor=asyncio", "-p", "hasty")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "is installed already: something has imported" in done.stdout


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder of plugins for Twisted, one of which imports the reactor."""
    folder = tmp_path / "twisted" / "plugins"
    folder.mkdir(parents=True)
    # As those of txtorcon and txi2p do.
    (folder / "hasty.py").write_text("from twisted.internet import reactor\n")
    return folder


@pytest.mark.parametrize("name", REACTORS)
@pytest.mark.usefixtures("plugins")
def test_plugins_of_twisted_that_import_the_reactor(run: Run, name: str) -> None:
    """They are not looked at for the reactors of Twisted and of this package."""
    done = run("def test_it(): pass", f"--twisted-reactor={name}")
    assert done.returncode == 0, done.stdout
    assert f"reactor: {name} ({REACTORS[name]})" in done.stdout


def test_a_reactor_that_came_with_another_plugin(run: Run, plugins: Path) -> None:
    (plugins / "slow.py").write_text(
        "from twisted.application.reactors import Reactor\n"
        "mine = Reactor('mine', 'twisted.internet.selectreactor', 'A third one.')\n"
    )
    done = run("def test_it(): pass", "--twisted-reactor=mine")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "one of Twisted's plugins imports twisted.internet.reactor" in done.stdout
    # Now the cache of the plugins is there, and the first one is not imported.
    done = run("def test_it(): pass", "--twisted-reactor=mine")
    assert "reactor: mine (SelectReactor)" in done.stdout
