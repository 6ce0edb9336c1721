"""
The scheduler: which task is resumed next, and in which turn of the reactor.

A task that is resumed from outside (by data that has arrived, say) runs at once.
A task that is resumed by another task is queued until that task waits, so that a long
chain of tasks does not recurse.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary, ref

from twisted.internet.defer import Deferred, fail

from twisted import internet
from twisted_rtsig.coro.async_generators import GeneratorHooks, restore
from twisted_rtsig.coro.awaiting_asyncio import Asyncio, a_loop_runs, of_reactor
from twisted_rtsig.coro.census import totals_of
from twisted_rtsig.coro.errors import NoTaskError
from twisted_rtsig.coro.operations import Done, Finished, Operation, Wait

if TYPE_CHECKING:
    from twisted_rtsig.coro.census import Totals
    from twisted_rtsig.coro.instruments import Instruments
    from twisted_rtsig.coro.streams import Stream
    from twisted_rtsig.coro.tasks import Task, TaskOrigin

# How many tasks run in a row before the reactor gets a turn, and how often each of
# them transfers to another one.
# Tuples, since a range makes an int for each step.
_STEPS_IN_A_TURN: Final = (None,) * 500
_TRANSFERS_IN_A_STEP: Final = (None,) * 100

# How many references to new tasks are kept before those to ended tasks are dropped.
_NEW_REFERENCES = 500


class _Running:
    """
    The task that runs, and the stacks that tasks may run on.

    Both are slots, since a step would take longer to set a global variable.

    :ivar task: the task that runs; None while none does.
    :ivar stacks: the stacks besides the stacks of threads.
    """

    __slots__ = ("stacks", "task")

    def __init__(self) -> None:
        self.task: Task[Any] | None = None
        self.stacks: Stacks = Stacks()


class Stacks:
    """No stacks besides the stacks of threads.  A subclass in stacks.py has others."""

    def frame_below(self, frame: FrameType) -> FrameType | None:
        """The frame that has resumed the stack whose outermost frame is ``frame``."""

    def waiting_frames(self, frame: FrameType) -> Sequence[FrameType]:
        """The waiting frames of the stack that ``frame`` drives."""
        return ()


running: Final = _Running()


def frame_below(frame: FrameType) -> FrameType | None:
    """The frame that has called or resumed ``frame``, on whichever stack that is."""
    return frame.f_back or running.stacks.frame_below(frame)


class Handover(Deferred[Any]):
    """
    What a task yields to transfer to another task, and waits for afterwards.

    There is only one instance, since to make one for each transfer would take longer.

    :ivar target: the task that takes over.
    :ivar value: the value that it is resumed with.
    """

    target: Task[Any] | None = None
    value: Any = None

    __init__ = object.__init__

    def __await__(self) -> Generator[Deferred[Any], Any, Any]:
        return (yield self)

    # For yield from.
    __iter__ = __await__

    # Any other driver of a coroutine asks for callbacks.

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        return fail(NoTaskError("transfer()")).addBoth(*args, **kwargs)

    addCallbacks = addBoth = _refuse


HANDOVER: Final = Handover()


class Raised:
    """
    An error that a task is resumed with, to be raised where it waits.

    It has a class of its own, so that one look at the class tells it from a value.
    """

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException = error


WAITS: Final = object()
"""What ``Task._wait_for`` returns if the task waits now."""


_Run = Callable[["Scheduler"], None]

# All generators that run tasks, which are never closed; and the generators of
# schedulers that are gone, to be used again.  See _steps.
_kept: Final[list[_Run]] = []
_idle: Final[list[_Run]] = []


class Scheduler:
    """
    Resumes the tasks of one reactor.

    :ivar reactor: an ``IReactorTime`` provider, for delayed calls.
    :ivar references: weak references to the newest tasks, ended tasks included, in the
        order in which they were spawned.  They are weak, since a task that nothing can
        resume is garbage.  To drop each reference when its task ends would take longer,
        and a set would take more memory.
    :ivar most_references: if there are more references, ``task_added`` is called for
        each new task.
    :ivar origin: the origin of the task that was spawned last.
    :ivar totals: the counts of the reactor.
    :ivar task_counts: ``totals.tasks``; see ``count_spawned``.
    :ivar instruments: the instruments of the reactor; None without any.
    :ivar asyncio: what asyncio sees of the tasks; None where asyncio does not run.
    """

    __slots__ = (
        "__weakref__",
        "_busy",
        "_counted",
        "_hooks",
        "_most_older",
        "_next_turn",
        "_older",
        "_ready",
        "_run",
        "_running",
        "_turn_call",
        "asyncio",
        "instruments",
        "most_references",
        "origin",
        "reactor",
        "references",
        "task_counts",
        "totals",
    )

    def __init__(self, reactor: Any) -> None:
        self.reactor: Any = reactor
        self.references: list[ref[Task[Any]]] = []
        # How many of the references the totals count as spawned.
        self._counted = 0
        self.origin: TaskOrigin | None = None
        # The references to tasks that were spawned earlier, in the same order, and how
        # many of these lists there may be before they are swept.
        self._older: list[list[ref[Task[Any]]]] = []
        self._most_older = 10
        self.most_references: int = _NEW_REFERENCES
        self.totals: Totals = totals_of(reactor)
        self.task_counts: list[int] = self.totals.tasks
        self.instruments: Instruments | None = None
        self.asyncio: Asyncio | None = of_reactor(reactor)
        self.observe_spawning()
        # The value or error for each is kept in the task: the garbage collector would
        # see a tuple for each.
        self._ready: deque[Task[Any]] = deque()
        self._next_turn: list[Callable[[], object]] = []
        # The delayed call that calls them; None without any.
        self._turn_call: Any = None
        self._running = False
        # Whether the ready tasks run already, or will run in the next turn.
        self._busy = False
        self._hooks = GeneratorHooks(reactor).pair()
        # Takes this scheduler, and runs the tasks that are ready; if there are too
        # many, the rest in the next turn.
        self._run = _idle.pop() if _idle else _start_steps()

    # Bound here, since at the end of the process the global may be gone.
    def __del__(self, idle: list[_Run] = _idle) -> None:
        idle.append(self._run)
        self.count_spawned()

    def resume(
        self, task: Task[Any], value: Any, error: BaseException | None = None
    ) -> None:
        """Run a task until it waits again: now, or after the tasks that are ready."""
        task._value = value if error is None else Raised(error)
        self._ready.append(task)
        if not self._busy:
            self.run()

    def run(self) -> None:
        """Run the tasks that are ready."""
        try:
            self._run(self)
        except StopIteration:
            self.run_anew()

    def run_anew(self) -> None:
        """
        As ``run``, after an error has ended the generator that runs the tasks.

        That is a ``KeyboardInterrupt``, for example; or a ``RecursionError``, where the
        stack had no room for the generator's frame.
        """
        run = _start_steps()
        _kept.remove(self._run)
        self._run = run
        run(self)

    def next_turn(self, function: Callable[[], object]) -> None:
        """Call ``function`` when the reactor has had a turn."""
        if not self._next_turn:
            self._turn_call = self.reactor.callLater(0, self._turn)
        self._next_turn.append(function)

    def has_lost_turn(self) -> bool:
        """
        Whether something has cancelled the call of the next turn, as trial cancels all
        delayed calls at the end of a test.  Then nothing resumes the tasks any more.
        """
        return bool(self._next_turn) and not self._turn_call.active()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """
        Within the block tasks that are resumed become ready, and run after it.
        """
        if self._busy:
            yield
            return
        self._busy = True
        try:
            yield
        finally:
            self.run()

    def _turn(self) -> None:
        functions, self._next_turn = iter(self._next_turn), []
        # The call holds this scheduler.
        self._turn_call = None
        # Each function resumes tasks, which run after the tasks that are ready already.
        self._busy = True
        try:
            for function in functions:
                function()
        except BaseException:
            # A KeyboardInterrupt, for example, must not drop the other functions.
            for function in functions:
                self.next_turn(function)
            raise
        finally:
            # Unless a task has called the reactor.
            if not self._running:
                self.run()

    def _nothing(self) -> None:
        """Do nothing: the turn itself runs the ready tasks."""

    # Observation

    def connection_made(self, stream: Stream) -> None:
        """There is a stream for a new connection."""
        self.totals.connections_made += 1
        self.totals.streams.add(stream)
        if self.instruments is not None:
            self.instruments.call("connection_made", stream)

    def connection_lost(self, stream: Stream) -> None:
        """The connection of ``stream`` is gone."""
        self.totals.streams.discard(stream)
        if self.instruments is not None:
            self.instruments.call("connection_lost", stream)

    def active_tasks(self) -> list[Task[Any]]:
        """The tasks that have not ended, in the order in which they were spawned."""
        tasks = [
            reference()
            for references in (*self._older, self.references)
            for reference in references[:]
        ]
        return [each for each in tasks if each is not None and not each.done]

    def count_references(self) -> int:
        """How many references there are, to active tasks and others."""
        return sum(map(len, self._older)) + len(self.references)

    def task_added(self, task: Task[Any]) -> None:
        """There are many references, or something that has to see each new task."""
        if len(self.references) > _NEW_REFERENCES:
            self._sweep_new()
            if len(self._older) > self._most_older:
                self.sweep()
        if self.asyncio is not None:
            self.asyncio.adopt(task)
        if self.instruments is not None:
            self.instruments.observe(task)
            self.instruments.call("task_spawned", task)

    def _sweep_new(self) -> None:
        """
        Drop the new references to tasks that are not active.  If most of the tasks are
        active, the references are not new any more.
        """
        self.count_spawned()
        references = self.references
        before = len(references)
        # What is collected meanwhile may spawn tasks; they come after these.
        self.most_references = sys.maxsize
        active = _to_active(islice(references, before))
        if len(active) > _NEW_REFERENCES // 2:
            self._older.append(active)
            active = []
        if self.asyncio is not None:
            for reference in references[before:]:
                self.asyncio.adopt_active(reference())
        references[:before] = active
        self._counted -= before - len(active)
        self.observe_spawning()

    def sweep(self) -> None:
        """Drop the references to tasks that are not active."""
        self._sweep_new()
        self.count_spawned()
        spawned, *ended = self.task_counts
        # Lists that are full, so that few are copied at a time.
        older: list[list[ref[Task[Any]]]] = []
        for references in self._older[:]:
            active = _to_active(references)
            if len(active) == len(references):
                # A copy of each list would double their memory.
                active = references
            if older and len(older[-1]) + len(active) <= _NEW_REFERENCES:
                older[-1] += active
            elif active:
                older.append(active)
        self._older = older
        self._most_older = max(10, 2 * len(older))
        self.totals.collected = spawned - sum(ended) - self.count_references()

    def count_spawned(self) -> None:
        """
        Add the tasks that were spawned since the last time to the totals: each one is
        among the references.
        """
        self.task_counts[0] += len(self.references) - self._counted
        self._counted = len(self.references)

    def observe_spawning(self) -> None:
        """Instruments have come or gone, or asyncio has come."""
        observed = self.instruments is not None or self.asyncio is not None
        self.most_references = -1 if observed else _NEW_REFERENCES

    def use_asyncio(self, asyncio: Asyncio) -> None:
        """Let asyncio see all tasks from now on, and the tasks that exist already."""
        self.asyncio = asyncio
        for task in self.active_tasks():
            asyncio.adopt_active(task)
        self.observe_spawning()


def _to_active(references: Iterable[ref[Task[Any]]]) -> list[ref[Task[Any]]]:
    """The references to tasks that have not ended."""
    return [
        reference
        for reference in references
        # As Task.done, without a call for each.
        if not ((task := reference()) is None or type(task._body) is int)
    ]


def _steps() -> Generator[None, Scheduler, None]:
    """
    Run the tasks that are ready, each time that a scheduler is sent.

    This is a generator, which never ends, for CPython 3.12 and 3.13: there the frame
    of a coroutine that has raised an error keeps the frames that have called it, with
    all that is in their variables, for as long as the error's traceback exists.
    Deferreds have that same error in their variables, so that it would be left to the
    garbage collector.  But a generator that waits was called by nothing, and this one
    clears its variables before.  It is never closed: CPython 3.12 would keep what
    closes it.
    """
    # Local variables, which take less time than global ones.
    current = running
    handover = HANDOVER
    waits = WAITS
    raised_type = Raised
    operation_type = Operation
    wait_type = Wait
    class_of = type
    get_hooks = sys.get_asyncgen_hooks
    # Tasks in `ready` are active, so all that is used here is set.
    task: Any
    target: Any
    awaited: Any
    scheduler: Any = yield
    while True:
        # That of another reactor, if one of its tasks has called this one.
        before = current.task
        ready: Any = scheduler._ready
        hooks: Any = scheduler._hooks
        others: Any = hooks
        try:
            # Where the stack is full, each call may raise RecursionError.
            scheduler._busy = scheduler._running = True
            # Another thread, another reactor and asyncio have hooks of their own.
            others = get_hooks()
            if others[1] is not hooks[1]:
                sys.set_asyncgen_hooks(*hooks)
            for _ in _STEPS_IN_A_TURN:
                # Tasks that are appended meanwhile run as well.
                if not ready:
                    break
                task = ready.popleft()
                current.task = task
                value = task._value
                task._value = None
                # Until it waits.
                while True:
                    try:
                        if class_of(value) is not raised_type:
                            awaited = task._context.run(
                                task._origin.send, task._body, value
                            )
                        else:
                            awaited = task._context.run(task._body.throw, value.error)
                            value = None
                        if awaited is handover:
                            for _ in _TRANSFERS_IN_A_STEP:
                                target = handover.target
                                try:
                                    parked = target._waiting_on is handover
                                except AttributeError:
                                    # It is no task.
                                    break
                                if not parked or task._cancels:
                                    break
                                task._waiting_on = handover
                                target._waiting_on = None
                                current.task = task = target
                                awaited = task._context.run(
                                    task._origin.send, task._body, handover.value
                                )
                                if awaited is not handover:
                                    break
                    except StopIteration as stop:
                        task._return(stop.value)
                        break
                    except BaseException as raised:
                        task._raise(raised)
                        break
                    kind = class_of(awaited)
                    if (
                        kind is operation_type or kind is wait_type
                    ) and awaited.waiter is None:
                        awaited.waiter = task
                        task._waiting_on = awaited
                        if task._cancels:
                            task._interrupt()
                        break
                    if kind is Finished or kind is Done:
                        value = awaited.result
                    elif awaited is handover:
                        value = task._transfer(handover.target, handover.value)
                        if value is waits:
                            break
                    else:
                        value = task._wait_for(awaited)
                        if value is waits:
                            break
        finally:
            scheduler._running = False
            current.task = before
            nested = before is not None
            # They keep nothing alive.  What is dropped here may resume a task: it logs
            # a failure, for example, of which an observer tells a task.
            handover.target = handover.value = None
            task = target = awaited = value = before = None
            try:
                if others[1] is not hooks[1]:
                    restore(others, nested)
                hooks = others = None
                if ready:
                    # Still busy: tasks that are resumed meanwhile come after these.
                    scheduler.next_turn(scheduler._nothing)
                else:
                    # From here to the yield no other code may run, and so no jump back,
                    # at which CPython looks for signals and garbage: a task that it
                    # resumed would be run by this generator, which runs already.
                    scheduler._busy = False
            except BaseException:
                scheduler._busy = False
                raise
            finally:
                ready = scheduler = None
        scheduler = yield


def _start_steps() -> _Run:
    steps = _steps()
    next(steps)
    _kept.append(steps.send)
    return steps.send


def cancel_call(call: Any) -> None:
    """
    Cancel a delayed call, unless it is None, has happened or was cancelled already:
    trial cancels all delayed calls at the end of a test.
    """
    if call is not None and call.active():
        call.cancel()


# The code that calls every task's function.
RUN: Final[CodeType] = _steps.__code__

# To type checkers its attribute is the module of that name.
_internet: Final[Any] = internet

# By id of the reactor, which stays what it is as long as its scheduler lives.
_schedulers: WeakValueDictionary[int, Scheduler] = WeakValueDictionary()


def schedulers() -> list[Scheduler]:
    """The schedulers of all reactors that have tasks, and perhaps of others."""
    found = [reference() for reference in _schedulers.valuerefs()]
    return [each for each in found if each is not None]


class _Installed:
    """
    The scheduler of the installed reactor.

    It is kept, since that reactor lasts as long as the process: a program that spawns
    tasks outside of tasks would make a new scheduler for each one of them.
    ``scheduler_of`` lets asyncio see its tasks once a loop of asyncio runs, and drops
    it when a new one would not need asyncio, or would run tasks again.
    """

    __slots__ = ("scheduler",)

    def __init__(self) -> None:
        self.scheduler: Scheduler | None = None


_installed: Final = _Installed()


def scheduler_of(reactor: object) -> Scheduler:
    """The scheduler of a reactor, by default of the installed one."""
    if reactor is None:
        try:
            # As the import does, in less time.
            reactor = _internet.reactor
        except AttributeError:
            # This installs the default reactor.
            from twisted.internet import reactor
    scheduler = _installed.scheduler
    if scheduler is not None and scheduler.reactor is reactor:
        loop_runs = a_loop_runs()
        if loop_runs and scheduler.asyncio is None:
            scheduler.use_asyncio(Asyncio(None))
        asyncio = scheduler.asyncio
        # Once no loop runs any more, tasks would pay for asyncio in vain.
        keeps = loop_runs or asyncio is None or asyncio.loop is not None
        if keeps and not (scheduler._next_turn and scheduler.has_lost_turn()):
            return scheduler
        # Unless it has tasks, it ends here.
        _installed.scheduler = scheduler = None
    scheduler = _schedulers.get(id(reactor))
    if scheduler is None or scheduler.has_lost_turn():
        scheduler = _schedulers[id(reactor)] = Scheduler(reactor)
    if reactor is getattr(_internet, "reactor", None):
        _installed.scheduler = scheduler
    return scheduler


def scheduler_for(reactor: object) -> Scheduler:
    """The scheduler of a reactor, by default of the task that runs."""
    if reactor is None and running.task is not None:
        return running.task._scheduler
    return scheduler_of(reactor)


def running_scheduler() -> Scheduler | None:
    """The scheduler of the task that runs; None if no task runs."""
    return None if running.task is None else running.task._scheduler
