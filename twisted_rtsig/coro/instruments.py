"""
Instruments: objects that are called when tasks run, when reactors work, and when
connections come and go.

As long as a reactor has no instrument, tasks and reactors do not look for any.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from twisted.logger import Logger

from twisted_rtsig.coro.scheduler import Scheduler, running, scheduler_for
from twisted_rtsig.coro.tasks import Task

if TYPE_CHECKING:
    from twisted_rtsig.coro.streams import Stream

T = TypeVar("T")

_log = Logger()


class Instrument:
    """
    The base class of instruments: override the methods that you want to be called.

    All methods are called in the reactor's thread.  They may read anything, and must
    not start, cancel or resume tasks.  An instrument that raises an error is removed,
    and the error is logged.

    See :func:`add_instrument`.
    """

    def task_spawned(self, task: Task[Any]) -> None:
        """A task was made, and has not run yet."""

    def before_task_step(self, task: Task[Any]) -> None:
        """``task`` begins or resumes, and runs until it waits or ends."""

    def after_task_step(self, task: Task[Any]) -> None:
        """``task`` has run: it waits now, or is about to end."""

    def task_exited(self, task: Task[Any]) -> None:
        """A task has ended: see ``Task.cancelled`` and ``Task.failed`` for how."""

    def before_pass(self) -> None:
        """
        The reactor has waited for events, and is about to call their handlers, and then
        the delayed calls that are due.

        Only the reactors of this package report their passes.
        """

    def after_pass(self) -> None:
        """The reactor has nothing left to call, and is about to wait for events."""

    def connection_made(self, stream: Stream) -> None:
        """
        A connection was made, to a server or by a client of this package.  Its handler
        has not run yet.
        """

    def connection_lost(self, stream: Stream) -> None:
        """The connection of ``stream`` is gone, on both sides."""


_HOOKS: Final = tuple(name for name in vars(Instrument) if not name.startswith("_"))


class Instruments:
    """The instruments of one reactor."""

    __slots__ = ("_hooks", "_instruments", "_scheduler")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._instruments: dict[Instrument, None] = {}
        # By name of the hook: the instruments that override it, and their methods.
        self._hooks: dict[str, list[tuple[Instrument, Callable[..., None]]]] = {}

    def add(self, instrument: Instrument) -> None:
        """Call ``instrument`` from now on."""
        self._instruments[instrument] = None
        self._changed()

    def remove(self, instrument: Instrument) -> None:
        """
        Do not call ``instrument`` any more.

        :raises KeyError: if it was not added, or was removed.
        """
        del self._instruments[instrument]
        self._changed()

    def call(self, hook: str, *args: Any) -> None:
        """Call the instruments that override a hook."""
        for instrument, method in self._hooks[hook]:
            # The method of an earlier instrument may have removed this one.
            if instrument in self._instruments:
                try:
                    method(*args)
                except Exception:
                    _log.failure(
                        "{instrument!r} has raised an error in {hook}, and was removed",
                        instrument=instrument,
                        hook=hook,
                    )
                    self._instruments.pop(instrument, None)
                    self._changed()

    def observe(self, task: Task[Any]) -> None:
        """
        Call the instruments at each step of a task and at its end, if they override
        those methods.
        """
        hooks = self._hooks
        if hooks["before_task_step"] or hooks["after_task_step"]:
            task._context = cast(Any, _ObservedContext(task._context, self))
        if hooks["task_exited"]:
            task._when_done(self._exited)

    def _do_not_observe(self, task: Task[Any]) -> None:
        context: Any = task._context
        if isinstance(context, _ObservedContext):
            task._context = context.context
        if task._done is not None and self._exited in task._done:
            task._done = [each for each in task._done if each != self._exited]

    def _exited(self, task: Task[Any]) -> None:
        self.call("task_exited", task)

    def _changed(self) -> None:
        """Set up calls of the methods that the instruments override, and no others."""
        self._hooks = {
            name: [
                (each, getattr(each, name))
                for each in self._instruments
                if getattr(type(each), name) is not getattr(Instrument, name)
            ]
            for name in _HOOKS
        }
        scheduler = self._scheduler
        if self._instruments:
            _instrumented[scheduler] = None
            scheduler.instruments = self
        else:
            _instrumented.pop(scheduler, None)
            scheduler.instruments = None
        for task in scheduler.active_tasks():
            self._do_not_observe(task)
            self.observe(task)
        scheduler.observe_spawning()
        observe_passes = getattr(scheduler.reactor, "observe_passes", None)
        if observe_passes is not None:
            observe_passes(*map(self._pass_hook, ("before_pass", "after_pass")))

    def _pass_hook(self, name: str) -> Callable[[], None] | None:
        if not (self._hooks["before_pass"] or self._hooks["after_pass"]):
            return None
        return lambda: self.call(name)


# Keeps the schedulers that have instruments: nothing else may refer to them.
_instrumented: Final[dict[Scheduler, None]] = {}


class _ObservedContext:
    """
    The context of a task whose steps are observed: the scheduler runs each step in it.
    """

    __slots__ = ("_instruments", "context")

    def __init__(
        self, context: contextvars.Context | None, instruments: Instruments
    ) -> None:
        assert context is not None, "the task has ended"
        self.context = context
        self._instruments = instruments

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """See ``contextvars.Context.run``."""
        task = running.task
        instruments = self._instruments
        instruments.call("before_task_step", task)
        try:
            return self.context.run(function, *args)
        finally:
            instruments.call("after_task_step", task)
            # CPython 3.12 and 3.13 keep this frame with an error that the task raises.
            del self, function, args, task, instruments


def add_instrument(instrument: Instrument, reactor: Any | None = None) -> None:
    """
    Call the methods of an instrument when their events happen on a reactor.

    This does nothing if the reactor has the instrument already.  It must be called in
    the reactor's thread.

    :param reactor: an ``IReactorTime`` provider; by default the reactor of the calling
        task, or the installed reactor.
    """
    scheduler = scheduler_for(reactor)
    (scheduler.instruments or Instruments(scheduler)).add(instrument)


def remove_instrument(instrument: Instrument, reactor: Any | None = None) -> None:
    """
    Do not call the methods of an instrument any more.

    :param reactor: as for :func:`add_instrument`.
    :raises KeyError: if the reactor does not have the instrument: it was never added,
        or was removed because it has raised an error.
    """
    instruments = scheduler_for(reactor).instruments
    if instruments is None:
        raise KeyError(instrument)
    instruments.remove(instrument)
