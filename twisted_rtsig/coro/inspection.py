"""The list of tasks: where each one is, and what it waits for."""

from __future__ import annotations

import _thread
import linecache
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, Final

from twisted.logger import Logger

from twisted_rtsig.coro.scheduler import RUN, frame_below, running, schedulers
from twisted_rtsig.coro.tasks import Task
from twisted_rtsig.coro.tracebacks import is_machinery

_log = Logger()

_INDENT = "    "

# So many tasks are described in one message of the log.
_MOST_IN_LOG: Final = 20


def format_tasks(reactor: Any | None = None) -> str:
    """
    The tasks that have not ended, below those that have spawned them: for each its
    name, its age, what it waits for, and where it is in the code; of a cancellation
    that a ``shield`` still keeps out, the reason::

        main: 12.0 s, waits for <Event at 0x7f3c8c0d5a50: 1 wait>
            at server.py:31 in main: await stop.wait()
            session: 3.2 s, waits for a line from <Stream to IPv4Address(...)>
                at chat.py:58 in session: name = await self.ask_name(stream)
                at chat.py:75 in ask_name: line = await stream.read_line()

    Works from a signal handler, and from a manhole.

    :param reactor: only the tasks of this reactor.
    """
    now = time.monotonic()
    tasks = _in_order(reactor)
    if not tasks:
        return "There are no tasks."
    known = set(tasks)
    below: dict[Task[Any] | None, list[Task[Any]]] = {}
    # Tasks of the same time keep their order.
    for task in sorted(tasks, key=lambda task: task._origin.since):
        reference = task._origin.spawner
        spawner = None if reference is None else reference()
        # Tasks whose spawner has ended stand at the top.
        below.setdefault(spawner if spawner in known else None, []).append(task)
    lines = []
    rest = [(task, "") for task in reversed(below[None])]
    while rest:
        task, indent = rest.pop()
        lines += [indent + line for line in describe(task, now)]
        rest += [(each, indent + _INDENT) for each in reversed(below.get(task, []))]
    return "\n".join(lines)


def tasks_of(reactor: Any | None) -> set[Task[Any]]:
    """The tasks that have not ended: of all reactors, or of one if it is given."""
    return set(_in_order(reactor))


def _in_order(reactor: Any | None) -> list[Task[Any]]:
    """The same tasks, those of each reactor in the order in which they were spawned."""
    return [
        task
        for scheduler in schedulers()
        if reactor is None or scheduler.reactor is reactor
        for task in scheduler.active_tasks()
    ]


def _log_tasks(tasks: str) -> None:
    _log.info("Tasks:\n{tasks}", tasks=tasks)


def log_tasks_on_signal(number: int | None = None) -> None:
    """
    Log what :func:`format_tasks` returns whenever a signal comes, even while a task
    holds up all others.

    :param number: which signal; by default SIGUSR2.
    :raises RuntimeError: if this system has no such signal.
    """
    if number is None:
        number = getattr(signal, "SIGUSR2", None)
        if number is None:
            raise RuntimeError(
                "this system has no SIGUSR2: call log_tasks_on_signal() with another "
                "signal, SIGBREAK for example, or format_tasks() by other means"
            )

    def log_tasks(number: int, frame: FrameType | None) -> None:
        # In a thread, since the main thread may be taking the lock of a log file right
        # now (EngineReactor._stop_by_signal); not threading.Thread, which takes locks.
        _thread.start_new_thread(_log_tasks, (format_tasks(),))

    signal.signal(number, log_tasks)


def describe_first(tasks: Sequence[Task[Any]]) -> str:
    """Some of the tasks, as in ``format_tasks``, and how many more there are."""
    lines = [line for each in tasks[:_MOST_IN_LOG] for line in describe(each)]
    if len(tasks) > _MOST_IN_LOG:
        lines.append(f"and {len(tasks) - _MOST_IN_LOG} more")
    return "\n".join(lines)


def describe(task: Task[Any], now: float | None = None) -> Iterator[str]:
    """
    One task: a line of ``format_tasks``, and where it is in the code.

    :param now: the time of ``time.monotonic``.
    """
    now = time.monotonic() if now is None else now
    try:
        waits_for = task.waits_for()
    except Exception as error:
        # A __repr__ of the program's.
        waits_for = f"what cannot be described ({type(error).__name__}: {error})"
    if waits_for is not None:
        state = f"waits for {waits_for}"
    else:
        state = "runs" if task is running.task else "is about to run"
    reasons = [each.reason for each in task._cancels if each.reason is not None]
    cancelled = f", to be cancelled: {', '.join(reasons)}" if reasons else ""
    yield f"{task.name}: {now - task._origin.since:.1f} s, {state}{cancelled}"
    frames = (
        stack_of_running(_innermost_of_running())
        if state == "runs"
        else stack_of_body(task._body)
    )
    for line in in_words(frames):
        yield f"{_INDENT}at {line}"


def in_words(frames: Iterable[FrameType]) -> Iterator[str]:
    """The frames of the user's own functions, each with its line."""
    for frame in frames:
        if not is_machinery(frame):
            code, line = frame.f_code, frame.f_lineno
            source = linecache.getline(code.co_filename, line, frame.f_globals).strip()
            yield f"{code.co_filename}:{line} in {code.co_name}: {source}"


def _innermost_of_running() -> FrameType:
    """The innermost frame of the thread that runs a task, which may be another one."""
    here = sys._getframe()
    for innermost in (here, *sys._current_frames().values()):
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code is RUN:
                return innermost
            frame = frame_below(frame)
    return here


def stack_of_running(innermost: FrameType) -> list[FrameType]:
    """Of the task that runs, from the outermost frame on; of whatever else does."""
    frames: list[FrameType] = []
    frame: FrameType | None = innermost
    while frame is not None and frame.f_code is not RUN:
        frames.append(frame)
        frames += reversed(running.stacks.waiting_frames(frame))
        frame = frame_below(frame)
    return frames[::-1]


def stack_of_body(body: Any) -> Iterator[FrameType]:
    """Of a coroutine or generator that waits; None has none."""
    each = body
    while each is not None:
        for kind in ("cr", "gi"):
            frame: FrameType | None = getattr(each, f"{kind}_frame", None)
            if frame is not None:
                yield frame
                yield from running.stacks.waiting_frames(frame)
                break
        each = getattr(each, "cr_await", None) or getattr(each, "gi_yieldfrom", None)
