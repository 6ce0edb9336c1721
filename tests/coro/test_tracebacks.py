"""Errors that are printed or logged show all that Python itself prints of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import formatEvent, formatEventAsClassicLogText

from tests.support import DEADLINE, frees_at_once
from twisted_rtsig.coro import TaskGroup, coroutine, run_group, sleep, spawn
from twisted_rtsig.coro.operations import failed
from twisted_rtsig.coro.tracebacks import WholeFailure

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

# What both styles of tasks in a group raise.
GROUP = ["ExceptionGroup: 2 of a group of tasks have failed (2 sub-exceptions)"]
ERRORS = ["ValueError: no milk", "ValueError: no tea"]
CAUSES = [
    "KeyError: 'milk'",
    "KeyError: 'tea'",
    "The above exception was the direct cause of the following exception",
]


def with_note(error: Exception, note: str) -> Exception:
    """Python 3.10 has no ``add_note``, and its ``exceptiongroup`` prints notes."""
    error.__notes__ = [note]
    return error


PRICES: dict[str, int] = {}


async def buy(item: str) -> None:
    await sleep(0)
    try:
        PRICES[item]
    except KeyError as error:
        raise with_note(ValueError(f"no {item}"), f"a note on {item}") from error


async def in_async_def() -> None:
    async with TaskGroup() as group:
        group.spawn(buy, "milk")
        group.spawn(buy, "tea")


@coroutine
def in_generators() -> Any:
    def block(group: TaskGroup) -> Any:
        group.spawn(buy, "milk")
        group.spawn(buy, "tea")
        yield sleep(0)

    yield run_group(block)


STYLES: list[Callable[[], Any]] = [in_async_def, in_generators]


def assert_whole(text: str) -> None:
    for part in [*GROUP, *ERRORS, *CAUSES, "a note on milk", "a note on tea"]:
        assert text.count(part) >= 1, text
    # The lines of the user, and none of what drives them.
    assert "in buy" in text
    assert "in in_" in text
    assert "scheduler.py" not in text
    assert "defer.py" not in text


@frees_at_once
@pytest.mark.parametrize("style", STYLES)
def test_a_failed_task_is_logged_whole(
    style: Callable[[], Any], logged: list[Any]
) -> None:
    clock = Clock()
    task = spawn(style, reactor=clock, name="shopping")
    clock.pump([0] * 10)
    assert task.failed
    del task
    [event] = [each for each in logged if each.get("log_failure")]
    assert formatEvent(event) == "Task shopping has failed"
    assert_whole(formatEventAsClassicLogText(event) or "")


@pytest.mark.parametrize("style", STYLES)
def test_the_failure_of_a_deferred_is_printed_whole(style: Callable[[], Any]) -> None:
    clock = Clock()
    got: list[Any] = []
    spawn(style, reactor=clock).as_deferred().addErrback(got.append)
    clock.pump([0] * 10)
    assert_whole(got[0].getTraceback())
    # It has passed through a Deferred, and is an error of Twisted's kind still.
    assert got[0].check(ExceptionGroup)


@frees_at_once
def test_an_unhandled_failure_of_a_deferred_is_logged_whole(logged: list[Any]) -> None:
    clock = Clock()
    deferred: Deferred[None] | None = spawn(in_async_def, reactor=clock).as_deferred()
    clock.pump([0] * 10)
    assert deferred is not None
    deferred = None
    texts = [
        formatEventAsClassicLogText(each) or ""
        for each in logged
        if each.get("log_failure")
    ]
    text = "".join(texts)
    # Before Twisted 24.10 and on Python 3.10 the lines of the group itself are lost.
    for part in [*GROUP, *ERRORS, *CAUSES, "a note on milk", "a note on tea"]:
        assert part in text
    assert "in buy" in text


def test_an_operation_that_failed_keeps_its_cause() -> None:
    error = ConnectionError("lost")
    error.__cause__ = OSError("the cable")
    got: list[Any] = []
    failed(error).addErrback(got.append)
    trace = got[0].getTraceback()
    assert "OSError: the cable" in trace
    assert "ConnectionError: lost" in trace


def test_details_are_those_of_twisted() -> None:
    try:
        raise ValueError("brief")
    except ValueError as error:
        failure = WholeFailure(error)
    assert "Traceback: <class 'ValueError'>: brief" in failure.getBriefTraceback()
    file = StringIO()
    failure.printDetailedTraceback(file)
    assert "End of Failure" in file.getvalue()


REACT = """
from twisted.internet.task import react
from tests.coro.test_tracebacks import in_async_def, in_generators
from twisted_rtsig.coro import spawn

react(lambda reactor: spawn({style}, reactor=reactor).as_deferred())
"""


@pytest.mark.processes
@pytest.mark.parametrize("style", STYLES)
def test_react_prints_a_task_whole(style: Callable[[], Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REACT.format(style=style.__name__)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert "main function encountered error" in done.stderr
    assert_whole(done.stderr)
