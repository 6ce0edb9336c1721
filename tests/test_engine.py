"""
The guarantees of the engine, on notifiers whose kernel is a script: examples of each
guarantee, and a model of all of them together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from twisted.internet.error import (
    ConnectionDone,
    ConnectionFdescWentAway,
    ConnectionLost,
    ReactorNotRestartable,
)
from twisted.internet.interfaces import IHalfCloseableDescriptor
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.posixbase import PosixReactorBase
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from twisted.python import context, log
from twisted.python.failure import Failure
from zope.interface import alsoProvides, implementer

from tests.models import run_model
from tests.scripted_notifier import (
    FAKE,
    EdgeNotifier,
    KernelNotifier,
    OneShotNotifier,
    ScriptedNotifier,
)
from tests.support import A_FEW, dispose
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.notifiers import (
    GONE,
    HANGUP,
    READ,
    WRITE,
    Event,
    Registration,
    UnsupportedReactorError,
)
from twisted_rtsig.notifiers.registration import Origin

BOTH = READ | WRITE


class Selectable:
    """
    A reader and writer as an application would write it, with a fake descriptor.

    :ivar descriptor: returned by ``fileno()``.
    :ivar calls: its methods that were called, in order.
    :ivar reasons: the reasons of its disconnections.
    :ivar fileno_raises: raised by the next calls of ``fileno``.
    :ivar prefix_raises: raised by the next calls of ``logPrefix``.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.calls: list[str] = []
        self.reasons: list[Failure] = []
        self.fileno_raises: list[BaseException] = []
        self.prefix_raises: list[BaseException] = []
        self.on_read: Callable[[], Any] = lambda: None
        self.on_write: Callable[[], Any] = lambda: None
        self.on_lost: Callable[[], Any] = lambda: None

    def fileno(self) -> int:
        if self.fileno_raises:
            raise self.fileno_raises.pop(0)
        return self.descriptor

    def logPrefix(self) -> str:
        if self.prefix_raises:
            raise self.prefix_raises.pop(0)
        return f"selectable {self.descriptor}"

    def doRead(self) -> Any:
        self.calls.append("read")
        return self.on_read()

    def doWrite(self) -> Any:
        self.calls.append("write")
        return self.on_write()

    def connectionLost(self, reason: Failure) -> None:
        self.calls.append("lost")
        self.reasons.append(reason)
        self.on_lost()

    # IHalfCloseableDescriptor, which only some selectables provide.

    def readConnectionLost(self, reason: Failure) -> None:
        self.calls.append("read lost")
        self.reasons.append(reason)
        self.on_lost()

    def writeConnectionLost(self, reason: Failure) -> None:
        self.calls.append("write lost")


@implementer(ILogObserver)
class LoggedFailures:
    """Collects the failures that are logged."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        globalLogPublisher.addObserver(self)

    def __call__(self, event: LogEvent) -> None:
        # twisted.logger uses the first name, twisted.python.log the second.
        failure = event.get("log_failure", event.get("failure"))
        if failure is not None:
            self.failures.append(failure)

    def stop(self) -> None:
        globalLogPublisher.removeObserver(self)

    def take(self) -> list[BaseException | None]:
        """The exceptions that were logged since the last call."""
        taken, self.failures = self.failures, []
        return [failure.value for failure in taken]


def raiser(error: BaseException) -> Callable[[], Any]:
    """A function that raises ``error``."""

    def fail() -> None:
        raise error

    return fail


# Examples


class Bench:
    """A reactor on a scripted notifier, and helpers to make selectables and events."""

    def __init__(self) -> None:
        self.log = LoggedFailures()
        self.notifier = ScriptedNotifier()
        self.reactor = EngineReactor(self.notifier)
        self._descriptors = itertools.count(FAKE)

    def selectable(self, descriptor: int | None = None) -> Selectable:
        return Selectable(next(self._descriptors) if descriptor is None else descriptor)

    def armed(self, interest: int, descriptor: int | None = None) -> Selectable:
        """A selectable that was added, checked, and found not ready."""
        made = self.selectable(descriptor)
        if interest & READ:
            self.reactor.addReader(made)
        if interest & WRITE:
            self.reactor.addWriter(made)
        self.happens()
        return made

    def reader(self) -> Selectable:
        return self.armed(READ)

    def writer(self) -> Selectable:
        return self.armed(WRITE)

    def renew(self, selectable: Selectable, interest: int) -> None:
        """End each interest, and begin it again at once."""
        if interest & READ:
            self.reactor.removeReader(selectable)
            self.reactor.addReader(selectable)
        if interest & WRITE:
            self.reactor.removeWriter(selectable)
            self.reactor.addWriter(selectable)

    def event(self, selectable: Selectable, ready: int, disarmed: int = 0) -> Event:
        return self.notifier.watched[selectable.descriptor], ready, disarmed

    def happens(self, *events: Event) -> None:
        """Run one pass of the reactor.  Its wait returns the events."""
        self.notifier.batches.append(events)
        self.reactor.iterate(0)

    def happens_after(
        self, call: Callable[[], Any], selectable: Selectable, ready: int
    ) -> Selectable:
        """
        Run a pass with two events.  The first one makes ``call``.  The second one is
        for ``selectable``.

        :return: the reader of the first event.
        """
        first = self.reader()
        first.on_read = call
        self.happens(self.event(first, READ), self.event(selectable, ready))
        assert first.calls == ["read"]
        return first

    def hangs_up(self, it: Selectable, end: str = "lost") -> int:
        """
        Run passes that report a hang-up of ``it``, until the engine disconnects it.

        :return: in how many passes the engine has called it before that.
        """
        for times in range(A_FEW):
            self.happens(self.event(it, HANGUP))
            if it.calls[-1] == end:
                return times
        raise AssertionError(it.calls)

    def unchecked(self) -> dict[int, int]:
        """
        Run a pass without events.

        :return: the directions that its wait had to check, by descriptor.
        """
        self.happens()
        unchecked = self.notifier.waits[-1][1]
        return {each.descriptor: what for each, what in unchecked.items()}


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    yield it
    # The selectables that the test has left get no further calls.
    it.reactor.removeAll()
    dispose(it.reactor)
    it.log.stop()
    assert it.notifier.complaints == []
    # A test takes the exceptions that it expects.
    assert it.log.take() == []


# Unchecked, ready, armed


def test_new_interest_is_checked(bench: Bench) -> None:
    """The next wait checks a new reader or writer, in its direction only."""
    reader, writer = bench.selectable(), bench.selectable()
    bench.reactor.addReader(reader)
    bench.reactor.addWriter(writer)
    unchecked = bench.unchecked()
    assert unchecked[reader.descriptor] == READ
    assert unchecked[writer.descriptor] == WRITE


def test_a_second_direction_is_checked(bench: Bench) -> None:
    """A selectable that reads already begins to write: its reading stays armed."""
    it = bench.reader()
    bench.reactor.addWriter(it)
    assert bench.unchecked() == {it.descriptor: WRITE}


def test_a_selectable_that_was_found_not_ready_is_armed(bench: Bench) -> None:
    """A registration that a wait has checked and not reported is not checked again."""
    it = bench.armed(BOTH)
    assert bench.unchecked() == {}
    assert it.calls == []


def test_a_ready_selectable_is_called_and_checked_again(bench: Bench) -> None:
    """A call may leave something to read.  So the next wait checks again."""
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, READ))
    assert it.calls == ["read"]
    assert bench.unchecked() == {it.descriptor: READ}
    assert bench.unchecked() == {}


def test_a_selectable_reads_before_it_writes(bench: Bench) -> None:
    """One event reports both directions."""
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read", "write"]
    assert bench.unchecked() == {it.descriptor: BOTH}


@pytest.mark.parametrize("delay", [None, 0, 1.5])
def test_the_delay_is_passed_to_the_notifier(bench: Bench, delay: float | None) -> None:
    """The reactor sleeps until the next timer, or without a timeout."""
    bench.reader()
    bench.reactor.doIteration(delay)
    assert bench.notifier.waits[-1] == (delay, {})


def test_a_disarmed_direction_is_checked_again(bench: Bench) -> None:
    """A one-shot event has disarmed the other direction, which is not called."""
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, READ, WRITE))
    assert it.calls == ["read"]
    assert bench.unchecked() == {it.descriptor: BOTH}


def test_a_disarmed_selectable_that_is_not_ready_is_checked_again(bench: Bench) -> None:
    """A poll that completes without an event is issued again."""
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, 0, BOTH))
    assert it.calls == []
    assert bench.unchecked() == {it.descriptor: BOTH}


def test_a_disarmed_direction_without_interest_is_not_checked(bench: Bench) -> None:
    """The selectable only reads, and the event has disarmed writing."""
    it = bench.reader()
    bench.happens(bench.event(it, 0, WRITE))
    assert bench.unchecked() == {}


def test_a_ready_direction_without_interest_is_not_called(bench: Bench) -> None:
    """The kernel may report more than it was asked for."""
    it = bench.reader()
    bench.happens(bench.event(it, WRITE))
    assert it.calls == []
    assert bench.unchecked() == {}


def test_adding_twice_changes_nothing(bench: Bench) -> None:
    """Twisted often adds a writer again, which must not cost a check."""
    it = bench.armed(BOTH)
    bench.reactor.addReader(it)
    bench.reactor.addWriter(it)
    assert bench.unchecked() == {}
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read", "write"]


def test_removing_a_selectable_that_was_not_added(bench: Bench) -> None:
    """Twisted often does so, to be sure."""
    it = bench.reader()
    bench.reactor.removeWriter(it)
    bench.reactor.removeReader(bench.selectable())
    assert it in bench.reactor.getReaders()
    bench.reactor.removeReader(it)
    bench.reactor.removeReader(it)
    assert it.descriptor not in bench.notifier.watched


def test_the_end_of_the_last_interest_ends_the_registration(bench: Bench) -> None:
    """The notifier is told when one interest ends, and when the last one ends."""
    it = bench.armed(BOTH)
    registration = bench.notifier.watched[it.descriptor]
    bench.reactor.removeReader(it)
    assert registration.interest == WRITE
    assert bench.notifier.watched[it.descriptor] is registration
    bench.reactor.removeWriter(it)
    assert it.descriptor not in bench.notifier.watched


def test_a_selectable_that_is_removed_before_its_check_is_not_checked(
    bench: Bench,
) -> None:
    """It was added and removed within a pass."""
    it = bench.selectable()
    bench.reactor.addReader(it)
    bench.reactor.removeReader(it)
    assert it.descriptor not in bench.unchecked()


def test_a_reader_that_removes_itself_is_not_checked(bench: Bench) -> None:
    """It was called, and would be checked again if it still wanted to read."""
    it = bench.armed(BOTH)
    it.on_read = lambda: bench.reactor.removeReader(it)
    bench.happens(bench.event(it, READ))
    assert bench.unchecked() == {}


def test_the_descriptor_of_a_selectable_may_be_shared(bench: Bench) -> None:
    """The reactor did not open it, so that other code may use it as well."""
    it = bench.reader()
    assert bench.notifier.watched[it.descriptor].origin is Origin.SHARED


# Removal and reuse within a batch of events


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_a_selectable_that_an_earlier_call_removes_is_not_called(
    bench: Bench, direction: int
) -> None:
    """A removal takes effect at once, also for events of the same batch."""
    it = bench.armed(direction)

    def remove() -> None:
        bench.reactor.removeReader(it)
        bench.reactor.removeWriter(it)

    bench.happens_after(remove, it, direction)
    assert it.calls == []


def test_a_direction_that_an_earlier_call_removes_is_not_called(bench: Bench) -> None:
    """Only the direction that stays is called."""
    it = bench.armed(BOTH)
    bench.happens_after(lambda: bench.reactor.removeReader(it), it, BOTH)
    assert it.calls == ["write"]


def test_a_read_that_ends_writing_is_not_followed_by_a_write(bench: Bench) -> None:
    """The event reports both directions."""
    it = bench.armed(BOTH)
    it.on_read = lambda: bench.reactor.removeWriter(it)
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read"]


def test_a_read_that_begins_writing_is_not_followed_by_a_write(bench: Bench) -> None:
    """The event is older than the interest in writing."""
    it = bench.reader()
    it.on_read = lambda: bench.reactor.addWriter(it)
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read"]
    assert bench.unchecked() == {it.descriptor: BOTH}


@pytest.mark.parametrize("interest", [READ, BOTH])
def test_interest_that_was_renewed_is_checked_again(
    bench: Bench, interest: int
) -> None:
    """
    An event that is older than the interest does not count, whether the registration
    is a new one or the other direction has kept it.
    """
    it = bench.armed(interest)
    first = bench.happens_after(lambda: bench.renew(it, READ), it, READ)
    assert it.calls == []
    assert bench.unchecked() == {first.descriptor: READ, it.descriptor: READ}


def test_interest_that_was_renewed_is_not_lost_by_an_older_event(bench: Bench) -> None:
    """Each direction is renewed in turn, so that the registration stays the same."""
    it = bench.armed(BOTH)
    bench.happens_after(lambda: bench.renew(it, BOTH), it, GONE)
    assert it.calls == []
    assert bench.unchecked()[it.descriptor] == BOTH
    bench.happens(bench.event(it, GONE))
    assert it.calls == ["lost"]


def test_an_event_of_a_closed_descriptor_does_not_reach_its_successor(
    bench: Bench,
) -> None:
    """A selectable is removed, and another one gets its descriptor."""
    former = bench.reader()
    successor = bench.selectable(former.descriptor)

    def reuse() -> None:
        bench.reactor.removeReader(former)
        former.descriptor = -1
        bench.reactor.addReader(successor)

    bench.happens_after(reuse, former, READ)
    assert former.calls == []
    assert successor.calls == []
    assert bench.unchecked()[successor.descriptor] == READ


def test_an_event_does_not_reach_the_successor_of_a_selectable(bench: Bench) -> None:
    """The former selectable was closed but not removed."""
    former = bench.armed(BOTH)
    successor = bench.selectable(former.descriptor)

    def replace() -> None:
        former.descriptor = -1
        bench.reactor.addReader(successor)

    bench.happens_after(replace, former, BOTH)
    assert former.calls == []
    assert successor.calls == []
    assert former not in bench.reactor.getWriters()


def test_a_read_that_replaces_its_selectable_is_not_followed_by_a_write(
    bench: Bench,
) -> None:
    """doRead closes its descriptor, and adds a successor with the same descriptor."""
    former = bench.armed(BOTH)
    successor = bench.selectable(former.descriptor)

    def replace() -> None:
        former.descriptor = -1
        bench.reactor.addReader(successor)
        bench.reactor.addWriter(successor)

    former.on_read = replace
    bench.happens(bench.event(former, BOTH))
    assert former.calls == ["read"]
    assert successor.calls == []
    assert bench.unchecked() == {successor.descriptor: BOTH}


def test_a_late_removal_does_not_affect_the_successor(bench: Bench) -> None:
    """The former owner of the descriptor is removed after the successor was added."""
    former = bench.armed(BOTH)
    former.descriptor, descriptor = -1, former.descriptor
    successor = bench.armed(BOTH, descriptor)
    bench.reactor.removeReader(former)
    bench.reactor.removeWriter(former)
    bench.happens(bench.event(successor, BOTH))
    assert successor.calls == ["read", "write"]
    assert former.calls == []


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_a_direction_belongs_to_the_latest_selectable(
    bench: Bench, direction: int
) -> None:
    """This holds even if the former selectable still has the descriptor."""
    former = bench.armed(direction)
    successor = bench.armed(direction, former.descriptor)
    assert former not in bench.reactor.getReaders() + bench.reactor.getWriters()
    bench.happens(bench.event(successor, direction))
    assert former.calls == []
    assert len(successor.calls) == 1


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_a_selectable_takes_over_the_other_direction_of_its_descriptor(
    bench: Bench, direction: int
) -> None:
    """A direction belongs to the latest selectable then as well."""
    former = bench.armed(direction)
    successor = bench.armed(BOTH & ~direction, former.descriptor)
    bench.reactor.addReader(successor)
    bench.reactor.addWriter(successor)
    assert former not in bench.reactor.getReaders() + bench.reactor.getWriters()
    bench.happens()
    bench.happens(bench.event(successor, BOTH))
    assert former.calls == []
    assert successor.calls == ["read", "write"]


def test_events_of_an_ended_registration_are_dropped(bench: Bench) -> None:
    """They do not reach the new registration of the same descriptor either."""
    it = bench.armed(BOTH)
    stale = [bench.event(it, what, BOTH) for what in (READ, WRITE, HANGUP, GONE)]
    bench.reactor.removeReader(it)
    bench.reactor.removeWriter(it)
    bench.reactor.addReader(it)
    bench.happens()
    for event in stale:
        bench.happens(event)
    assert it.calls == []
    assert bench.unchecked() == {}


# A reader and a writer of the same descriptor


def test_a_reader_and_another_writer_of_a_descriptor(bench: Bench) -> None:
    """Each gets its own calls, and removes only itself."""
    reader = bench.reader()
    writer = bench.armed(WRITE, reader.descriptor)
    assert reader in bench.reactor.getReaders()
    assert writer in bench.reactor.getWriters()
    bench.happens(bench.event(reader, BOTH))
    assert (reader.calls, writer.calls) == (["read"], ["write"])
    bench.reactor.removeReader(reader)
    bench.reactor.removeReader(writer)
    bench.happens(bench.event(writer, BOTH))
    assert (reader.calls, writer.calls) == (["read"], ["write", "write"])


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_another_selectable_for_the_other_direction_renews_both(
    bench: Bench, direction: int
) -> None:
    """
    The descriptor may be a new file.  So both directions are checked again, and the
    events of the former registration reach neither selectable.
    """
    first = bench.armed(direction)
    stale = bench.event(first, BOTH)
    newcomer = bench.selectable(first.descriptor)
    if direction == READ:
        bench.reactor.addWriter(newcomer)
    else:
        bench.reactor.addReader(newcomer)
    bench.happens(stale)
    assert (first.calls, newcomer.calls) == ([], [])
    assert bench.notifier.waits[-1][1] == {
        bench.notifier.watched[first.descriptor]: BOTH
    }
    bench.happens(bench.event(first, BOTH))
    assert len(first.calls) == len(newcomer.calls) == 1


def test_a_reader_whose_writer_is_added_within_the_batch_is_checked(
    bench: Bench,
) -> None:
    """Its event of the batch is not lost: the check finds it again."""
    reader = bench.reader()
    writer = bench.selectable(reader.descriptor)
    bench.happens_after(lambda: bench.reactor.addWriter(writer), reader, READ)
    assert reader.calls == []
    assert bench.unchecked()[reader.descriptor] == BOTH


def test_a_failing_fileno_of_the_reader_does_not_refuse_a_writer(bench: Bench) -> None:
    """
    The exception of the reader's fileno() is logged, and the writer is added.
    """
    reader = bench.reader()
    writer = bench.selectable(reader.descriptor)
    error = RuntimeError("fileno of the reader")
    reader.fileno_raises.append(error)
    bench.reactor.addWriter(writer)
    assert writer in bench.reactor.getWriters()
    assert bench.log.take() == [error]


# fileno()


def test_a_selectable_is_removed_after_it_was_closed(bench: Bench) -> None:
    """Its fileno() is negative by then, and both directions are found nevertheless."""
    it = bench.armed(BOTH)
    descriptor, it.descriptor = it.descriptor, -1
    bench.reactor.removeReader(it)
    bench.reactor.removeWriter(it)
    assert descriptor not in bench.notifier.watched
    assert it not in bench.reactor.getReaders() + bench.reactor.getWriters()


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_a_selectable_without_a_descriptor_is_disconnected_at_its_event(
    bench: Bench, direction: int
) -> None:
    """It is not called."""
    it = bench.armed(direction)
    event = bench.event(it, direction)
    it.descriptor = -1
    bench.happens(event)
    assert it.calls == ["lost"]
    assert it.reasons[0].check(ConnectionFdescWentAway)
    assert it not in bench.reactor.getReaders() + bench.reactor.getWriters()


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_a_negative_descriptor_is_refused(bench: Bench, direction: int) -> None:
    """The error names the selectable, which is not registered."""
    it = bench.selectable(-1)
    add = bench.reactor.addReader if direction == READ else bench.reactor.addWriter
    with pytest.raises(ValueError, match="has no descriptor to watch"):
        add(it)
    assert it not in bench.reactor.getReaders() + bench.reactor.getWriters()
    assert -1 not in bench.notifier.watched


def test_a_negative_descriptor_is_refused_after_the_selectable_was_added(
    bench: Bench,
) -> None:
    """Adding it again raises an error, rather than pretending to watch it."""
    it = bench.reader()
    descriptor, it.descriptor = it.descriptor, -1
    with pytest.raises(ValueError, match="has no descriptor to watch"):
        bench.reactor.addReader(it)
    assert descriptor not in bench.notifier.watched


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_a_selectable_is_added_again_with_another_descriptor(
    bench: Bench, direction: int
) -> None:
    """The new descriptor is watched, and the former one no longer."""
    it = bench.armed(direction)
    stale, former = bench.event(it, direction), it.descriptor
    it.descriptor = bench.selectable().descriptor
    if direction == READ:
        bench.reactor.addReader(it)
    else:
        bench.reactor.addWriter(it)
    assert former not in bench.notifier.watched
    bench.happens(stale)
    assert it.calls == []
    bench.happens(bench.event(it, direction))
    assert len(it.calls) == 1


def test_fileno_raises_when_added(bench: Bench) -> None:
    """The caller of addReader gets the exception, and nothing is registered."""
    it = bench.selectable()
    it.fileno_raises.append(RuntimeError("fileno"))
    with pytest.raises(RuntimeError, match="fileno"):
        bench.reactor.addReader(it)
    assert it not in bench.reactor.getReaders()
    assert it.descriptor not in bench.notifier.watched


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_the_notifier_refuses_a_selectable(bench: Bench, direction: int) -> None:
    """The caller gets the error, nothing is registered, and it can be added later."""
    it = bench.selectable()
    add = bench.reactor.addReader if direction == READ else bench.reactor.addWriter
    bench.notifier.refused.add(it.descriptor)
    with pytest.raises(OSError, match="refused by the script"):
        add(it)
    assert it not in bench.reactor.getReaders() + bench.reactor.getWriters()
    assert it.descriptor not in bench.unchecked()
    bench.notifier.refused.clear()
    add(it)
    bench.happens(bench.event(it, direction))
    assert len(it.calls) == 1


def test_the_notifier_refuses_a_second_selectable_of_a_descriptor(bench: Bench) -> None:
    """
    The reader of the descriptor is either still watched, or is disconnected.
    """
    reader = bench.reader()
    bench.notifier.refused.add(reader.descriptor)
    with pytest.raises(OSError, match="refused by the script"):
        bench.reactor.addWriter(bench.selectable(reader.descriptor))
    bench.happens()
    watched = reader.descriptor in bench.notifier.watched
    assert watched or reader.calls == ["lost"]
    assert (reader in bench.reactor.getReaders()) is watched


# A pass within a pass


def test_a_nested_pass_checks_the_events_that_are_left(bench: Bench) -> None:
    """
    Code that iterates the reactor from within a call may wait for an event that the
    outer pass has still to deliver.  It is checked again, and delivered once.
    """
    first, second, third = bench.reader(), bench.reader(), bench.reader()

    def iterate() -> None:
        bench.happens(bench.event(second, READ))
        bench.happens()

    first.on_read = iterate
    events = [bench.event(each, READ) for each in (first, second, third)]
    waits = len(bench.notifier.waits)
    bench.happens(*events)
    _, unchecked = bench.notifier.waits[waits + 1]
    assert unchecked == {event[0]: READ for event in events}
    assert (second.calls, third.calls) == (["read"], [])


@pytest.mark.parametrize(
    ("ready", "disarmed"), [(BOTH, 0), (READ, WRITE), (WRITE, READ)]
)
def test_a_nested_pass_checks_the_event_that_is_being_delivered(
    bench: Bench, ready: int, disarmed: int
) -> None:
    """It checks both directions of it."""
    it = bench.armed(BOTH)
    it.on_read = it.on_write = bench.happens
    waits = len(bench.notifier.waits)
    event = bench.event(it, ready, disarmed)
    bench.happens(event)
    _, unchecked = bench.notifier.waits[waits + 1]
    assert unchecked == {event[0]: BOTH}


# Exceptions of the application

ERRORS = [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("direction", [READ, WRITE])
def test_a_selectable_whose_call_raises_is_disconnected(
    bench: Bench, direction: int, kind: type[BaseException]
) -> None:
    """
    Any exception is logged once, the selectable is disconnected with it, and the other
    selectables get their events.
    """
    one, other = bench.armed(BOTH), bench.reader()
    error = kind("what a call raises")
    one.on_read = one.on_write = raiser(error)
    bench.happens(bench.event(one, direction), bench.event(other, READ))
    assert one.calls == ["read" if direction == READ else "write", "lost"]
    assert one.reasons[0].value is error
    assert one not in bench.reactor.getReaders() + bench.reactor.getWriters()
    assert other.calls == ["read"]
    assert bench.log.take() == [error]


def test_a_selectable_whose_fileno_raises_is_disconnected(bench: Bench) -> None:
    """fileno() is called before each doRead and doWrite."""
    one, other = bench.reader(), bench.reader()
    error = RuntimeError("fileno")
    events = bench.event(one, READ), bench.event(other, READ)
    one.fileno_raises.append(error)
    bench.happens(*events)
    assert one.calls == ["lost"]
    assert one.reasons[0].value is error
    assert other.calls == ["read"]
    assert bench.log.take() == [error]


def test_a_selectable_whose_log_prefix_raises_is_called(bench: Bench) -> None:
    """It has no name in the log, and is called nevertheless."""
    one, other = bench.reader(), bench.reader()
    error = RuntimeError("logPrefix")
    one.prefix_raises.append(error)
    bench.happens(bench.event(one, READ), bench.event(other, READ))
    assert (one.calls, other.calls) == (["read"], ["read"])
    assert bench.log.take() == [error]


def test_an_exception_of_connectionLost_is_logged(bench: Bench) -> None:
    """The other selectables get their events."""
    one, other = bench.armed(BOTH), bench.reader()
    error = RuntimeError("connectionLost")
    one.on_read = lambda: CONNECTION_LOST
    one.on_lost = raiser(error)
    bench.happens(bench.event(one, BOTH), bench.event(other, READ))
    assert (one.calls, other.calls) == (["read", "lost"], ["read"])
    assert one not in bench.reactor.getReaders() + bench.reactor.getWriters()
    assert bench.log.take() == [error]


def test_an_interrupt_within_a_batch_loses_no_event(bench: Bench) -> None:
    """
    KeyboardInterrupt outside of doRead and doWrite ends the pass.  The selectables that
    were not called are checked, since their events will not come again.
    """
    done, struck, after = bench.reader(), bench.reader(), bench.armed(BOTH)
    struck.prefix_raises.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench.happens(
            bench.event(done, READ),
            bench.event(struck, READ),
            bench.event(after, READ),
        )
    assert (done.calls, struck.calls, after.calls) == (["read"], [], [])
    unchecked = bench.unchecked()
    assert unchecked[struck.descriptor] & READ
    assert unchecked[after.descriptor] & READ


def test_an_interrupt_does_not_check_a_removed_selectable(bench: Bench) -> None:
    """It was removed before the interrupt, in the same batch."""
    first, struck = bench.reader(), bench.reader()
    first.on_read = lambda: bench.reactor.removeReader(first)
    struck.prefix_raises.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench.happens(bench.event(first, READ), bench.event(struck, READ))
    assert first.descriptor not in bench.unchecked()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("wait")])
def test_a_wait_that_raises_loses_no_check(bench: Bench, error: BaseException) -> None:
    """The next wait checks what the failed one had to check."""
    it = bench.reader()
    bench.reactor.addWriter(it)
    bench.notifier.raises = error, False
    with pytest.raises(type(error)):
        bench.reactor.iterate(0)
    assert bench.unchecked()[it.descriptor] & WRITE


def test_a_wait_that_raises_loses_no_event(bench: Bench) -> None:
    """
    An interrupt may come when the notifier has taken an event from the kernel and not
    returned it yet.  The kernel will not report it again.
    """
    it = bench.reader()
    bench.notifier.raises = KeyboardInterrupt(), True
    with pytest.raises(KeyboardInterrupt):
        bench.happens(bench.event(it, READ))
    assert bench.unchecked()[it.descriptor] & READ


def test_interest_that_begins_during_a_wait_is_checked(bench: Bench) -> None:
    """
    A Python signal handler runs within a wait, and adds a selectable.  The next wait
    checks it, whatever the present one reports of its registration.
    """
    it = bench.reader()
    late = bench.selectable()

    def handler(events: Sequence[Event]) -> None:
        bench.notifier.on_events = lambda events: None
        bench.reactor.addWriter(it)
        bench.reactor.addReader(late)

    bench.notifier.on_events = handler
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read"]
    assert bench.unchecked() == {it.descriptor: BOTH, late.descriptor: READ}


def test_the_log_context_of_a_call_has_the_log_prefix(bench: Bench) -> None:
    """doRead and connectionLost log under the name of the selectable."""
    it = bench.reader()
    names: list[Any] = []

    def note() -> Any:
        names.append(context.get(log.ILogContext)["system"])
        return CONNECTION_LOST

    it.on_read = it.on_lost = note
    bench.happens(bench.event(it, READ))
    assert names == [f"selectable {it.descriptor}"] * 2


def test_the_log_context_between_calls_has_no_log_prefix(bench: Bench) -> None:
    """Timers and signal handlers do not log under the name of a selectable."""
    it = bench.armed(BOTH)
    names: list[Any] = []

    def note(*arguments: Any) -> None:
        names.append(context.get(log.ILogContext)["system"])

    def read() -> None:
        note()
        bench.notifier.on_events = note
        bench.reactor.callLater(0, note)
        bench.reactor.callLater(0, bench.reactor.stop)

    it.on_read = read
    bench.notifier.batches.append([bench.event(it, READ)])
    bench.reactor.run(installSignalHandlers=False)
    assert names == [f"selectable {it.descriptor}", "-", "-"]


# Disconnection


@pytest.mark.parametrize(
    ("returned", "kind"),
    [(CONNECTION_DONE, ConnectionDone), (CONNECTION_LOST, ConnectionLost)],
)
@pytest.mark.parametrize("direction", [READ, WRITE])
def test_a_selectable_whose_call_returns_a_reason_is_disconnected(
    bench: Bench, direction: int, returned: BaseException, kind: type[BaseException]
) -> None:
    """Both directions end, and the other one is not called."""
    it = bench.armed(BOTH)
    it.on_read = it.on_write = lambda: returned
    bench.happens(bench.event(it, direction))
    assert it.calls == ["read" if direction == READ else "write", "lost"]
    assert it.reasons[0].check(kind)
    assert it.descriptor not in bench.notifier.watched
    assert bench.unchecked() == {}


def test_a_half_close_ends_reading_only(bench: Bench) -> None:
    """
    A selectable that provides IHalfCloseableDescriptor goes on writing after the end of
    its input.
    """
    it = bench.armed(BOTH)
    alsoProvides(it, IHalfCloseableDescriptor)
    it.on_read = lambda: CONNECTION_DONE
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read", "read lost", "write"]
    assert it.reasons[0].check(ConnectionDone)
    assert it not in bench.reactor.getReaders()
    assert it in bench.reactor.getWriters()


@pytest.mark.parametrize(
    ("direction", "returned"), [(READ, CONNECTION_LOST), (WRITE, CONNECTION_DONE)]
)
def test_an_end_that_is_not_a_half_close_ends_both_directions(
    bench: Bench, direction: int, returned: BaseException
) -> None:
    """Only a clean end of reading is a half close."""
    it = bench.armed(BOTH)
    alsoProvides(it, IHalfCloseableDescriptor)
    it.on_read = it.on_write = lambda: returned
    bench.happens(bench.event(it, direction))
    assert it.calls[1:] == ["lost"]
    assert it.descriptor not in bench.notifier.watched


# Hang-up


@pytest.mark.parametrize("interest", [READ, WRITE, BOTH])
def test_a_hang_up_calls_the_selectable(bench: Bench, interest: int) -> None:
    """doRead and doWrite find out the reason, which the event does not contain."""
    it = bench.armed(interest)
    it.on_read = it.on_write = lambda: CONNECTION_LOST
    bench.happens(bench.event(it, HANGUP))
    assert it.calls == ["write" if interest == WRITE else "read", "lost"]


@pytest.mark.parametrize(
    ("interest", "called", "reason"),
    [
        (READ, ["read", "lost"], ConnectionDone),
        (WRITE, ["write", "lost"], ConnectionLost),
        (BOTH, ["read", "write", "lost"], ConnectionDone),
    ],
)
def test_a_selectable_that_ignores_a_hang_up_is_disconnected(
    bench: Bench, interest: int, called: list[str], reason: type[BaseException]
) -> None:
    """
    It is called in a few passes, and then disconnected: the hang-up is reported in each
    pass, and the loop must not spin.
    """
    it = bench.armed(interest)
    times = bench.hangs_up(it)
    assert times > 1
    assert it.calls == called[:-1] * times + ["lost"]
    assert it.reasons[0].check(reason)
    assert it.descriptor not in bench.notifier.watched


def test_a_hang_up_that_disarms_is_checked_again(bench: Bench) -> None:
    """
    The hang-up of a one-shot notifier disarms both directions.  The selectable is
    called as well, and checked again if it stays.
    """
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, HANGUP, BOTH))
    assert it.calls == ["read", "write"]
    assert bench.unchecked() == {it.descriptor: BOTH}


def test_a_hang_up_with_input_does_not_disconnect(bench: Bench) -> None:
    """A selectable is not disconnected before it has read all input."""
    it = bench.armed(BOTH)
    for _ in range(A_FEW):
        bench.happens(bench.event(it, HANGUP | READ))
    assert it.calls == ["read", "write"] * A_FEW
    assert bench.hangs_up(it) > 1


@pytest.mark.parametrize("meanwhile", [None, READ, HANGUP | READ])
def test_a_hang_up_that_goes_away_does_not_disconnect(
    bench: Bench, meanwhile: int | None
) -> None:
    """
    If a pass does not report the hang-up, or reports input as well, a read has cleared
    the error.  The next hang-up is a new one.
    """
    it = bench.reader()
    for _ in range(A_FEW):
        bench.happens(bench.event(it, HANGUP))
        bench.happens(*[bench.event(it, meanwhile)] if meanwhile else [])
    assert it.calls == ["read"] * (2 * A_FEW if meanwhile else A_FEW)
    assert bench.hangs_up(it) > 1


def test_hang_ups_are_counted_for_each_descriptor(bench: Bench) -> None:
    """Two descriptors hang up in turn, and neither is disconnected."""
    one, other = bench.reader(), bench.reader()
    for _ in range(A_FEW):
        bench.happens(bench.event(one, HANGUP))
        bench.happens(bench.event(other, HANGUP))
    assert one.calls == other.calls == ["read"] * A_FEW


def test_a_hang_up_that_is_older_than_the_interest_does_not_count(bench: Bench) -> None:
    """The selectable was not called for it, and so has not ignored it."""
    it = bench.armed(BOTH)
    bench.happens_after(lambda: bench.renew(it, BOTH), it, HANGUP)
    assert it.calls == []
    bench.happens(bench.event(it, HANGUP))
    assert it.calls == ["read", "write"]


def test_a_selectable_that_half_closes_ignores_a_hang_up(bench: Bench) -> None:
    """Its reading ends first.  Its writing is checked again, and ends later."""
    it = bench.armed(BOTH)
    alsoProvides(it, IHalfCloseableDescriptor)
    bench.hangs_up(it, "read lost")
    assert it in bench.reactor.getWriters()
    assert bench.unchecked()[it.descriptor] & WRITE
    bench.hangs_up(it)
    assert it.reasons[-1].check(ConnectionLost)


def test_a_hang_up_disconnects_a_reader_and_another_writer(bench: Bench) -> None:
    """Both are called, and both are disconnected."""
    reader = bench.reader()
    writer = bench.armed(WRITE, reader.descriptor)
    times = bench.hangs_up(reader)
    assert reader.calls == [*["read"] * times, "lost"]
    assert writer.calls == [*["write"] * times, "lost"]


# Gone


@pytest.mark.parametrize("interest", [READ, WRITE, BOTH])
def test_a_selectable_whose_descriptor_is_gone_is_disconnected(
    bench: Bench, interest: int
) -> None:
    """It was closed while it was watched.  It is disconnected once, and not called."""
    it = bench.armed(interest)
    bench.happens(bench.event(it, GONE | interest))
    assert it.calls == ["lost"]
    assert it.reasons[0].check(ConnectionFdescWentAway)
    assert it.descriptor not in bench.notifier.watched


def test_a_descriptor_that_is_gone_is_not_a_half_close(bench: Bench) -> None:
    """Writing ends as well."""
    it = bench.armed(BOTH)
    alsoProvides(it, IHalfCloseableDescriptor)
    bench.happens(bench.event(it, GONE))
    assert it.calls == ["lost"]


def test_a_descriptor_that_is_gone_disconnects_a_reader_and_another_writer(
    bench: Bench,
) -> None:
    """The second one is disconnected even if connectionLost of the first one raises."""
    reader = bench.reader()
    writer = bench.armed(WRITE, reader.descriptor)
    error = RuntimeError("connectionLost")
    reader.on_lost = raiser(error)
    bench.happens(bench.event(reader, GONE))
    assert (reader.calls, writer.calls) == (["lost"], ["lost"])
    assert bench.log.take() == [error]


def test_a_writer_that_its_reader_removes_is_not_disconnected(bench: Bench) -> None:
    """The descriptor of both is gone."""
    reader = bench.reader()
    writer = bench.armed(WRITE, reader.descriptor)
    reader.on_lost = lambda: bench.reactor.removeWriter(writer)
    bench.happens(bench.event(reader, GONE))
    assert (reader.calls, writer.calls) == (["lost"], [])


# The reactor as a whole


def test_removeAll_leaves_the_waker(bench: Bench) -> None:
    """It removes all other selectables, and returns each once."""
    one, other = bench.armed(BOTH), bench.writer()
    own = bench.reactor.waker
    assert own in bench.reactor.getReaders()
    removed = bench.reactor.removeAll()
    assert sorted(removed, key=id) == sorted([one, other], key=id)
    assert bench.reactor.getReaders() == [own]
    assert bench.reactor.getWriters() == []
    assert set(bench.notifier.watched) == {own.fileno()}


def test_statistics(bench: Bench) -> None:
    """The engine's counts, and those of the notifier."""
    bench.armed(BOTH)
    bench.writer()
    bench.writer()
    assert bench.reactor.statistics() == {
        # One is the waker.
        "readers": 2,
        "writers": 3,
        "waits": 3,
    }


def test_a_run_opens_and_closes_the_notifier(bench: Bench) -> None:
    """Descriptors of the kernel are opened when it starts, and closed at its end."""
    assert bench.notifier.life == []
    seen: list[list[str]] = []

    def stop() -> None:
        seen.append(list(bench.notifier.life))
        bench.reactor.stop()

    bench.reactor.callWhenRunning(stop)
    bench.reactor.run(installSignalHandlers=False)
    assert seen == [["open"]]
    assert bench.notifier.life == ["open", "close"]
    # A second run is refused, and leaves the notifier closed.
    with pytest.raises(ReactorNotRestartable):
        bench.reactor.run(installSignalHandlers=False)
    assert bench.notifier.life[-1] == "close"


def test_a_notifier_that_cannot_open(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reactor does not start, and can be started later."""
    refusal = UnsupportedReactorError("refused by the script")
    monkeypatch.setattr(bench.notifier, "open", raiser(refusal))
    bench.reactor.callWhenRunning(bench.reactor.stop)
    with pytest.raises(UnsupportedReactorError):
        bench.reactor.run(installSignalHandlers=False)
    monkeypatch.undo()
    bench.reactor.run(installSignalHandlers=False)
    assert bench.notifier.life == ["open", "close"]


def test_the_hooks_of_daemonize_close_the_notifier(bench: Bench) -> None:
    """The parent closes it, and the child tells it that it is in a new process."""
    it = bench.reader()
    bench.reactor.beforeDaemonize()
    bench.reactor.afterDaemonize()
    assert bench.notifier.life == ["close", "daemonized"]
    bench.happens(bench.event(it, READ))
    assert it.calls == ["read"]


def test_the_class_of_a_reactor_can_be_changed(bench: Bench) -> None:
    """Twisted's own test tools do this to reactors that they no longer use."""

    class Spent(PosixReactorBase):
        pass

    reactor: Any = bench.reactor
    reactor.__dict__ = dict(reactor.__dict__)
    reactor.__class__ = Spent
    reactor.__class__ = EngineReactor
    assert bench.unchecked()


# The model

DESCRIPTORS = [FAKE, FAKE + 1, FAKE + 2]
LOST = 0
"""A key beside READ and WRITE, for the plans of connectionLost."""


class Interest(NamedTuple):
    """
    The interest of a selectable in one direction.

    ``began`` is unique.  It distinguishes an interest from a later one that began
    after the first one had ended.
    """

    descriptor: int
    began: int


class Action(NamedTuple):
    """
    An action of the application: ``what``, mostly to the selectable with the index
    ``which``, in a direction.
    """

    what: str
    which: int
    direction: int


DEEDS = [
    "add",
    "remove",
    "renew",
    "renew both",
    "close",
    "close, remove later",
    "close behind its back",
    "move",
    "replace",
    "share",
    "open",
    "becomes ready",
    "is ready no more",
    "hangs up",
]
OUTCOMES = ["ignore", "drain", "fail", "done", "lost", "interrupt"]
LEVELS = [0, READ, WRITE, BOTH, HANGUP]
TROUBLES = [
    (error, taken) for error in (KeyboardInterrupt, OSError) for taken in (True, False)
]
"""Raised by a wait, and whether the wait has taken the events by then."""


def actions(what: list[str]) -> st.SearchStrategy[Action]:
    return st.builds(
        Action, st.sampled_from(what), st.integers(0, 7), st.sampled_from([READ, WRITE])
    )


class Modelled(Selectable):
    """
    A selectable of the model.  A plan says what its calls do.

    :ivar keen: whether it reads and writes as much as it can when it has no plan.
    :ivar why: the reason for a disconnection, as long as that is due.
    """

    def __init__(
        self, machine: EngineMachine, descriptor: int, keen: bool = True
    ) -> None:
        super().__init__(descriptor)
        self.keen = keen
        self.why: BaseException | None = None
        self.plans: dict[int, list[Action]] = {READ: [], WRITE: [], LOST: []}
        self.on_read = lambda: machine.is_called(self, READ)
        self.on_write = lambda: machine.is_called(self, WRITE)
        self.on_lost = lambda: machine.is_lost(self)


class EngineMachine(RuleBasedStateMachine):
    """
    Drives a reactor, and a model of the interests of its selectables.

    The model knows descriptors, levels, and when each interest began.  A call needs an
    event for the descriptor.  A wait must have returned it after the interest began,
    and its registration must not have ended by then.
    """

    make_notifier: ClassVar[type[KernelNotifier]]

    def __init__(self) -> None:
        super().__init__()
        self.log = LoggedFailures()
        self.notifier = self.make_notifier()
        self.reactor = EngineReactor(self.notifier)
        self.notifier.on_events = self.wait_returns
        self.selectables: list[Modelled] = []
        self.interests: dict[tuple[Modelled, int], Interest] = {}
        self.beginnings = itertools.count()
        # The events of the present pass by descriptor, and the interests that may be
        # called for them.
        self.events: dict[int, Event] = {}
        self.entitled: dict[tuple[Modelled, int], Interest] = {}
        self.called: list[Interest] = []
        self.called_for_hang_up: set[tuple[Modelled, Registration]] = set()
        self.to_be_logged: list[BaseException] = []
        # If a call failed an assertion, the engine would only log it.
        self.violations: list[str] = []
        for descriptor in DESCRIPTORS:
            self.notifier.file_opens(descriptor)

    def teardown(self) -> None:
        self.reactor.removeAll()
        dispose(self.reactor)
        self.log.stop()

    # Calls of the reactor

    def add(self, it: Modelled, direction: int) -> None:
        descriptor = it.descriptor
        known = self.interests.get((it, direction))
        refusal: type[Exception] | None = None
        if known is None or known.descriptor != descriptor:
            others = [
                key
                for key, interest in self.interests.items()
                if interest.descriptor == descriptor and key[0] is not it
            ]
            joins = descriptor in {
                interest.descriptor
                for key, interest in self.interests.items()
                if key[0] is it and key[1] != direction
            }
            is_open = descriptor in self.notifier.files
            if others and not joins and not is_open:
                # An example shows this case.
                return
            if known is not None:
                del self.interests[it, direction]
            if descriptor < 0:
                refusal = ValueError
            elif not joins and not is_open:
                refusal = OSError
            else:
                for other, wanted in others:
                    closed = other.descriptor != descriptor and not joins
                    if wanted == direction or closed:
                        del self.interests[other, wanted]
                    elif not joins:
                        # The descriptor of the new selectable may be a new file.
                        self.begin(other, wanted, descriptor)
                self.begin(it, direction, descriptor)
        add = self.reactor.addReader if direction == READ else self.reactor.addWriter
        try:
            add(it)
        except (ValueError, OSError) as error:
            self.expect(refusal is type(error), f"adding failed: {error}")
        else:
            self.expect(refusal is None, f"adding {descriptor} did not fail")

    def begin(self, it: Modelled, direction: int, descriptor: int) -> None:
        self.interests[it, direction] = Interest(descriptor, next(self.beginnings))

    def remove(self, it: Modelled, direction: int) -> None:
        self.interests.pop((it, direction), None)
        if direction == READ:
            self.reactor.removeReader(it)
        else:
            self.reactor.removeWriter(it)

    def has_room(self) -> bool:
        return len(self.selectables) < 8

    # Actions of the application

    def do(self, action: Action) -> None:
        direction, descriptor = (
            action.direction,
            DESCRIPTORS[action.which % len(DESCRIPTORS)],
        )
        files = self.notifier.files
        if action.what == "open":
            if descriptor not in files:
                self.notifier.file_opens(descriptor)
            if self.has_room():
                self.add_new(descriptor, direction)
        if action.what == "becomes ready" and descriptor in files:
            self.notifier.becomes_ready(descriptor, direction)
        if action.what == "is ready no more" and descriptor in files:
            self.notifier.is_ready_no_more(descriptor, direction)
        if action.what == "hangs up" and descriptor in files:
            self.notifier.becomes_ready(descriptor, HANGUP)
        if self.selectables:
            it = self.selectables[action.which % len(self.selectables)]
            self.do_to(it, action)

    def do_to(self, it: Modelled, action: Action) -> None:
        what, direction, descriptor = action.what, action.direction, it.descriptor
        is_open = descriptor in self.notifier.files
        if what == "add":
            self.add(it, direction)
        if what == "remove":
            self.remove(it, direction)
        if what == "renew":
            self.remove(it, direction)
            self.add(it, direction)
        if what == "renew both":
            # One after the other, so that the registration stays.
            for each in (READ, WRITE):
                if (it, each) in self.interests:
                    self.remove(it, each)
                    self.add(it, each)
        if what == "close":
            self.remove(it, READ)
            self.remove(it, WRITE)
        if what in ("close", "close, remove later", "close behind its back"):
            if is_open:
                self.notifier.file_closes(descriptor)
            if what != "close behind its back":
                it.descriptor = -1
        if what == "move":
            it.descriptor = DESCRIPTORS[action.which % len(DESCRIPTORS)]
        if what == "replace" and is_open and self.has_room():
            it.descriptor = -1
            self.notifier.file_closes(descriptor)
            self.notifier.file_opens(descriptor)
            self.add_new(descriptor, direction)
        if what == "share" and is_open and self.has_room():
            self.add_new(descriptor, direction)

    def add_new(self, descriptor: int, direction: int) -> None:
        it = Modelled(self, descriptor)
        self.selectables.append(it)
        self.add(it, direction)

    # Calls by the reactor

    def wait_returns(self, events: Sequence[Event]) -> None:
        for event in events:
            registration, ready, _ = event
            descriptor = registration.descriptor
            if self.notifier.watched.get(descriptor) is not registration:
                continue
            self.events[descriptor] = event
            for key, interest in self.interests.items():
                if interest.descriptor == descriptor and ready & (
                    key[1] | HANGUP | GONE
                ):
                    self.entitled[key] = interest

    def is_called(self, it: Modelled, direction: int) -> Any:
        interest = self.interests.get((it, direction))
        if interest is None or self.entitled.pop((it, direction), None) != interest:
            self.violations.append(f"a call in direction {direction} for no event")
            return None
        self.called.append(interest)
        registration, ready, _ = self.events[interest.descriptor]
        if ready & HANGUP:
            self.called_for_hang_up.add((it, registration))
        plan = it.plans[direction]
        default = "drain" if it.keen else "ignore"
        action = plan.pop(0) if plan else Action(default, 0, direction)
        if action.what == "drain" and it.descriptor in self.notifier.files:
            self.notifier.is_ready_no_more(it.descriptor, direction)
        elif action.what == "fail":
            it.why = [ValueError, KeyboardInterrupt, SystemExit][action.which % 3]()
            self.to_be_logged.append(it.why)
            raise it.why
        elif action.what in ("done", "lost"):
            it.why = CONNECTION_DONE if action.what == "done" else CONNECTION_LOST
            return it.why
        elif action.what == "interrupt":
            # The interrupt comes just before the call of this selectable.
            victim = self.selectables[action.which % len(self.selectables)]
            victim.prefix_raises[:] = [KeyboardInterrupt("logPrefix")]
        else:
            self.do(action)
        return None

    def is_lost(self, it: Modelled) -> None:
        reason = it.reasons[-1]
        only_reading = it.calls[-1] == "read lost"
        why, it.why = it.why, None
        if why is not None:
            right = reason.value is why or reason.type is type(why)
        else:
            right = any(
                self.may_be_lost(it, interest, reason)
                for (owner, direction), interest in self.interests.items()
                if owner is it and self.entitled.get((it, direction)) == interest
            )
        self.expect(right, f"disconnected for no reason: {reason.value!r}")
        self.interests.pop((it, READ), None)
        if not only_reading:
            self.interests.pop((it, WRITE), None)
        if it.plans[LOST]:
            action = it.plans[LOST].pop(0)
            if action.what == "fail":
                error = RuntimeError("connectionLost")
                self.to_be_logged.append(error)
                raise error
            self.do(action)

    def may_be_lost(self, it: Modelled, interest: Interest, reason: Failure) -> bool:
        registration, ready, _ = self.events[interest.descriptor]
        if reason.check(ConnectionFdescWentAway):
            return it.descriptor == -1 or bool(ready & GONE)
        wanted = 0
        for (_, direction), each in self.interests.items():
            if each.descriptor == interest.descriptor:
                wanted |= direction
        told = (it, registration) in self.called_for_hang_up
        return bool(ready & HANGUP) and not ready & wanted and told

    def expect(self, truth: bool, violation: str) -> None:
        if not truth:
            self.violations.append(violation)

    def one_pass(self, delay: float | None = 0) -> None:
        self.events.clear()
        self.entitled.clear()
        self.called.clear()
        try:
            self.reactor.doIteration(delay)
        except KeyboardInterrupt as error:
            self.expect(str(error) in ("logPrefix", "wait"), f"it escapes: {error!r}")
        except OSError as error:
            self.expect(str(error) == "wait", f"it escapes: {error!r}")

    def many_passes(self) -> list[Interest]:
        """
        Run passes without further plans and errors.

        :return: the interests that were called in them.
        """
        for it in self.selectables:
            it.prefix_raises.clear()
            for plan in it.plans.values():
                plan.clear()
        self.notifier.raises = None
        self.notifier.hold = False
        called = []
        # A hang-up takes most passes: a few end the reading, and as many end the
        # writing.
        for _ in range(2 * A_FEW):
            self.one_pass()
            called += self.called
        return called

    # Rules

    @initialize(
        interests=st.lists(
            st.sampled_from([READ, WRITE, BOTH]), min_size=3, max_size=3
        ),
        keen=st.lists(st.booleans(), min_size=3, max_size=3),
    )
    def a_selectable_on_each_descriptor(
        self, interests: list[int], keen: list[bool]
    ) -> None:
        for descriptor, interest, each in zip(
            DESCRIPTORS, interests, keen, strict=True
        ):
            self.connect(descriptor, interest, each, half_closeable=each)

    @precondition(lambda self: self.has_room())
    @rule(
        descriptor=st.sampled_from(DESCRIPTORS),
        interest=st.sampled_from([READ, WRITE, BOTH]),
        keen=st.booleans(),
        half_closeable=st.booleans(),
    )
    def connect(
        self, descriptor: int, interest: int, keen: bool, half_closeable: bool
    ) -> None:
        it = Modelled(self, descriptor, keen)
        if half_closeable:
            alsoProvides(it, IHalfCloseableDescriptor)
        self.selectables.append(it)
        for direction in (READ, WRITE):
            if interest & direction:
                self.add(it, direction)

    @rule(action=actions(DEEDS))
    def act(self, action: Action) -> None:
        self.do(action)

    @rule(
        ready=st.lists(st.sampled_from(LEVELS), min_size=3, max_size=3),
        plans=st.lists(
            st.tuples(
                st.integers(0, 7),
                st.sampled_from([READ, READ, WRITE, WRITE, LOST]),
                actions(DEEDS + OUTCOMES),
            ),
            max_size=4,
        ),
        trouble=st.sampled_from([None] * 5 + TROUBLES),
        random=st.randoms(use_true_random=False),
        hold=st.booleans(),
    )
    def busy_pass(
        self,
        ready: list[int],
        plans: list[tuple[int, int, Action]],
        trouble: tuple[type[BaseException], bool] | None,
        random: Random,
        hold: bool,
    ) -> None:
        """
        Many things happen at once.  Faults show only with several events in one batch,
        and with calls that change the registrations.
        """
        wanting = list(dict.fromkeys(it for it, _ in self.interests))
        if wanting:
            for which, call, action in plans:
                wanting[which % len(wanting)].plans[call].append(action)
        for descriptor, what in zip(DESCRIPTORS, ready, strict=True):
            if descriptor in self.notifier.files:
                self.notifier.becomes_ready(descriptor, what)
        if trouble is not None:
            self.notifier.raises = trouble[0]("wait"), trouble[1]
        self.iterate(random, hold)

    @rule(random=st.randoms(use_true_random=False), hold=st.booleans())
    def iterate(self, random: Random, hold: bool) -> None:
        self.notifier.random = random
        self.notifier.hold = hold
        self.one_pass()

    @rule(which=st.integers(0, 20), ready=st.sampled_from([READ, WRITE, BOTH, 15]))
    def stray_event(self, which: int, ready: int) -> None:
        self.notifier.stray(which, ready)

    @rule()
    def ready_selectables_are_called(self) -> None:
        files = self.notifier.files
        due, hung_up = set(), set()
        for (it, direction), interest in self.interests.items():
            descriptor = interest.descriptor
            registration = self.notifier.watched.get(descriptor)
            if (
                it.descriptor != descriptor
                or registration is None
                or descriptor not in files
            ):
                continue
            if self.notifier.bound[registration] is not files[descriptor]:
                # It was closed and opened again, and the reactor was not told.
                continue
            if files[descriptor].levels & direction:
                due.add(interest)
            if files[descriptor].levels == HANGUP:
                hung_up.add(interest)
        called = set(self.many_passes())
        left = set(self.interests.values())
        self.expect(not (due & left) - called, "a ready selectable is not called")
        self.expect(not hung_up & left, "the loop spins on a hang-up")

    @rule()
    def the_reactor_sleeps_when_nothing_is_ready(self) -> None:
        for file in self.notifier.files.values():
            file.levels = 0
        self.many_passes()
        self.one_pass(None)
        self.expect(self.notifier.waits[-1] == (None, {}), "it does not sleep")
        self.expect(not self.called, "a selectable is called without an event")

    @invariant()
    def reactor_agrees_with_the_model(self) -> None:
        assert self.violations + self.notifier.complaints == []
        # A selectable that has failed was disconnected, and that was logged once.
        assert [it for it in self.selectables if it.why is not None] == []
        assert self.log.take() == self.to_be_logged
        self.to_be_logged.clear()
        readers = [it for it, what in self.interests if what == READ]
        writers = [it for it, what in self.interests if what == WRITE]
        own = [self.reactor.waker]
        assert sorted(self.reactor.getReaders(), key=id) == sorted(
            readers + own, key=id
        )
        assert sorted(self.reactor.getWriters(), key=id) == sorted(writers, key=id)
        wanted: dict[int, int] = {}
        for (_, direction), interest in self.interests.items():
            wanted[interest.descriptor] = wanted.get(interest.descriptor, 0) | direction
        assert wanted == {
            descriptor: registration.interest
            for descriptor, registration in self.notifier.watched.items()
            if descriptor >= FAKE
        }
        # Forget selectables with neither a descriptor nor an interest.
        self.selectables = [
            it
            for it in self.selectables
            if it.descriptor >= 0 or {(it, READ), (it, WRITE)} & self.interests.keys()
        ]


class EdgeMachine(EngineMachine):
    """A notifier with persistent edges, which may overflow."""

    make_notifier = EdgeNotifier

    @rule()
    def overflow(self) -> None:
        notifier = self.notifier
        assert isinstance(notifier, EdgeNotifier)
        notifier.overflow()


class OneShotMachine(EngineMachine):
    """A notifier with one-shot polls."""

    make_notifier = OneShotNotifier


@pytest.mark.parametrize("machine", [EdgeMachine, OneShotMachine])
def test_the_engine_agrees_with_the_model(machine: type[EngineMachine]) -> None:
    """
    The kernel may report events late, twice, out of order, or of registrations that
    have ended.  Ready selectables that are interested are called, and no others.
    """
    run_model(machine, examples=250)
