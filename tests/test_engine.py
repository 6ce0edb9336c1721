"""
What the engine promises, on notifiers whose kernel is a script: examples of
each promise, and a model of all of them together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
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

from tests.quick import examples
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
    A reader and writer as an application would write it, without a descriptor.

    :ivar number: what ``fileno()`` returns.
    :ivar calls: which of its methods were called, in order.
    :ivar reasons: why it was disconnected.
    :ivar fileno_raises: what the next calls of ``fileno`` raise.
    :ivar prefix_raises: what the next calls of ``logPrefix`` raise.
    """

    def __init__(self, number: int) -> None:
        self.number = number
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
        return self.number

    def logPrefix(self) -> str:
        if self.prefix_raises:
            raise self.prefix_raises.pop(0)
        return f"selectable {self.number}"

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

    # Of IHalfCloseableDescriptor, which only some provide.

    def readConnectionLost(self, reason: Failure) -> None:
        self.calls.append("read lost")
        self.reasons.append(reason)
        self.on_lost()

    def writeConnectionLost(self, reason: Failure) -> None:
        self.calls.append("write lost")


@implementer(ILogObserver)
class LoggedFailures:
    """The failures that are logged while it watches."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        globalLogPublisher.addObserver(self)

    def __call__(self, event: LogEvent) -> None:
        # The one is what twisted.logger says, the other twisted.python.log.
        failure = event.get("log_failure", event.get("failure"))
        if failure is not None:
            self.failures.append(failure)

    def stop(self) -> None:
        globalLogPublisher.removeObserver(self)

    def take(self) -> list[BaseException | None]:
        """The exceptions logged since the last time."""
        taken, self.failures = self.failures, []
        return [failure.value for failure in taken]


def raiser(error: BaseException) -> Callable[[], Any]:
    """A function that raises ``error``."""

    def fail() -> None:
        raise error

    return fail


# Examples


class Bench:
    """A reactor on a scripted notifier, and selectables that are easily made."""

    def __init__(self) -> None:
        self.log = LoggedFailures()
        self.notifier = ScriptedNotifier()
        self.reactor = EngineReactor(self.notifier)
        self._numbers = itertools.count(FAKE)

    def selectable(self, number: int | None = None) -> Selectable:
        return Selectable(next(self._numbers) if number is None else number)

    def armed(self, interest: int, number: int | None = None) -> Selectable:
        """A selectable that was added, checked, and found not ready."""
        made = self.selectable(number)
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

    def event(self, selectable: Selectable, ready: int, disarmed: int = 0) -> Event:
        return self.notifier.watched[selectable.number], ready, disarmed

    def happens(self, *events: Event) -> None:
        """One pass of the reactor, whose wait returns the events."""
        self.notifier.batches.append(events)
        self.reactor.iterate(0)

    def hangs_up(self, it: Selectable, end: str = "lost") -> int:
        """
        Passes that report a hang-up of ``it``, until the engine ends it; in how many
        of them the engine has called it instead.
        """
        for times in range(A_FEW):
            self.happens(self.event(it, HANGUP))
            if it.calls[-1] == end:
                return times
        raise AssertionError(it.calls)

    def handed(self) -> dict[int, int]:
        """One more pass without events: what it is to check, by number."""
        self.happens()
        unchecked = self.notifier.waits[-1][1]
        return {each.descriptor: what for each, what in unchecked.items()}


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    yield it
    # Selectables that the test has left half done are not told.
    it.reactor.removeAll()
    dispose(it.reactor)
    it.log.stop()
    assert it.notifier.complaints == []
    # Those that a test expects, it takes.
    assert it.log.take() == []


# Unchecked, ready, armed


def test_new_interest_is_unchecked(bench: Bench) -> None:
    """Whatever is added is checked by the next wait, in its direction only."""
    reader, writer = bench.selectable(), bench.selectable()
    bench.reactor.addReader(reader)
    bench.reactor.addWriter(writer)
    unchecked = bench.handed()
    assert unchecked[reader.number] == READ
    assert unchecked[writer.number] == WRITE


def test_second_direction_is_unchecked(bench: Bench) -> None:
    """A writer that joins its own registration leaves the reading armed."""
    it = bench.reader()
    bench.reactor.addWriter(it)
    assert bench.handed() == {it.number: WRITE}


def test_found_not_ready_is_armed(bench: Bench) -> None:
    """What a wait was given and does not report is not checked again."""
    it = bench.armed(BOTH)
    assert bench.handed() == {}
    assert it.calls == []


def test_ready_is_called_and_unchecked_again(bench: Bench) -> None:
    """A call may leave something to read, so that the next wait looks again."""
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, READ))
    assert it.calls == ["read"]
    assert bench.handed() == {it.number: READ}
    assert bench.handed() == {}


def test_read_goes_before_write(bench: Bench) -> None:
    """Who can do both reads first."""
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read", "write"]
    assert bench.handed() == {it.number: BOTH}


@pytest.mark.parametrize("delay", [None, 0, 1.5])
def test_delay_is_handed_on(bench: Bench, delay: float | None) -> None:
    """The reactor sleeps as long as the next timer allows, or for ever."""
    bench.reader()
    bench.reactor.doIteration(delay)
    assert bench.notifier.waits[-1] == (delay, {})


def test_disarmed_is_checked_again(bench: Bench) -> None:
    """A one-shot event that used up the other direction does not call it."""
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, READ, WRITE))
    assert it.calls == ["read"]
    assert bench.handed() == {it.number: BOTH}


def test_disarmed_without_anything_ready(bench: Bench) -> None:
    """A poll that completes for no reason is only issued again."""
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, 0, BOTH))
    assert it.calls == []
    assert bench.handed() == {it.number: BOTH}


def test_disarmed_where_nobody_is_interested(bench: Bench) -> None:
    """Nothing is checked for nobody."""
    it = bench.reader()
    bench.happens(bench.event(it, 0, WRITE))
    assert bench.handed() == {}


def test_ready_where_nobody_is_interested(bench: Bench) -> None:
    """The kernel may tell more than it was asked."""
    it = bench.reader()
    bench.happens(bench.event(it, WRITE))
    assert it.calls == []
    assert bench.handed() == {}


def test_adding_twice_changes_nothing(bench: Bench) -> None:
    """Twisted adds writers again and again; it costs no check."""
    it = bench.armed(BOTH)
    bench.reactor.addReader(it)
    bench.reactor.addWriter(it)
    assert bench.handed() == {}
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read", "write"]


def test_removing_what_was_not_added(bench: Bench) -> None:
    """Twisted removes to be sure."""
    it = bench.reader()
    bench.reactor.removeWriter(it)
    bench.reactor.removeReader(bench.selectable())
    assert it in bench.reactor.getReaders()
    bench.reactor.removeReader(it)
    bench.reactor.removeReader(it)
    assert it.number not in bench.notifier.watched


def test_last_interest_ends_the_watch(bench: Bench) -> None:
    """The notifier is told when one interest goes, and when the last one does."""
    it = bench.armed(BOTH)
    registration = bench.notifier.watched[it.number]
    bench.reactor.removeReader(it)
    assert registration.interest == WRITE
    assert bench.notifier.watched[it.number] is registration
    bench.reactor.removeWriter(it)
    assert it.number not in bench.notifier.watched


def test_removed_before_it_was_checked(bench: Bench) -> None:
    """What was added and removed within a pass is not checked for nobody."""
    it = bench.selectable()
    bench.reactor.addReader(it)
    bench.reactor.removeReader(it)
    assert it.number not in bench.handed()


def test_removed_while_it_reads(bench: Bench) -> None:
    """Nobody is checked again for a reader that has removed itself."""
    it = bench.armed(BOTH)
    it.on_read = lambda: bench.reactor.removeReader(it)
    bench.happens(bench.event(it, READ))
    assert bench.handed() == {}


def test_selectables_are_asked_for_their_origin(bench: Bench) -> None:
    """What the reactor did not open itself may be shared with anybody."""
    it = bench.reader()
    assert bench.notifier.watched[it.number].origin is Origin.SHARED


# Removal and reuse within a batch of events


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_removed_by_an_earlier_call(bench: Bench, direction: int) -> None:
    """A removal counts at once, also for events that were returned before it."""
    first, second = bench.reader(), bench.armed(direction)

    def remove() -> None:
        bench.reactor.removeReader(second)
        bench.reactor.removeWriter(second)

    first.on_read = remove
    bench.happens(bench.event(first, READ), bench.event(second, direction))
    assert first.calls == ["read"]
    assert second.calls == []


def test_one_direction_removed_by_an_earlier_call(bench: Bench) -> None:
    """The direction that stays is called, and only that."""
    first, second = bench.reader(), bench.armed(BOTH)
    first.on_read = lambda: bench.reactor.removeReader(second)
    bench.happens(bench.event(first, READ), bench.event(second, BOTH))
    assert second.calls == ["write"]


def test_writing_ended_by_the_read(bench: Bench) -> None:
    """doRead that removes the writer is not followed by doWrite."""
    it = bench.armed(BOTH)
    it.on_read = lambda: bench.reactor.removeWriter(it)
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read"]


def test_writing_begun_by_the_read(bench: Bench) -> None:
    """The event says what was known before anybody wanted to write."""
    it = bench.reader()
    it.on_read = lambda: bench.reactor.addWriter(it)
    bench.happens(bench.event(it, BOTH))
    assert it.calls == ["read"]
    assert bench.handed() == {it.number: BOTH}


@pytest.mark.parametrize("interest", [READ, BOTH])
def test_removed_and_added_again(bench: Bench, interest: int) -> None:
    """
    Interest that began anew is checked anew, whether its registration has
    ended meanwhile or the other direction has kept it alive.
    """
    first, second = bench.reader(), bench.armed(interest)

    def renew() -> None:
        bench.reactor.removeReader(second)
        bench.reactor.addReader(second)

    first.on_read = renew
    bench.happens(bench.event(first, READ), bench.event(second, READ))
    assert second.calls == []
    assert bench.handed() == {first.number: READ, second.number: READ}


def test_renewed_before_it_is_told_gone(bench: Bench) -> None:
    """One direction after the other, so that the registration is the same."""
    first, second = bench.reader(), bench.armed(BOTH)

    def renew() -> None:
        bench.reactor.removeReader(second)
        bench.reactor.addReader(second)
        bench.reactor.removeWriter(second)
        bench.reactor.addWriter(second)

    first.on_read = renew
    bench.happens(bench.event(first, READ), bench.event(second, GONE))
    assert second.calls == []
    assert bench.handed()[second.number] == BOTH
    bench.happens(bench.event(second, GONE))
    assert second.calls == ["lost"]


def test_number_reused_within_a_batch(bench: Bench) -> None:
    """An event for a descriptor closed meanwhile is not for its successor."""
    first, former = bench.reader(), bench.reader()
    successor = bench.selectable(former.number)

    def reuse() -> None:
        bench.reactor.removeReader(former)
        former.number = -1
        bench.reactor.addReader(successor)

    first.on_read = reuse
    bench.happens(bench.event(first, READ), bench.event(former, READ))
    assert former.calls == []
    assert successor.calls == []
    assert bench.handed()[successor.number] == READ


def test_replaced_within_a_batch(bench: Bench) -> None:
    """The same when the former owner was closed but not removed."""
    first, former = bench.reader(), bench.armed(BOTH)
    successor = bench.selectable(former.number)

    def replace() -> None:
        former.number = -1
        bench.reactor.addReader(successor)

    first.on_read = replace
    bench.happens(bench.event(first, READ), bench.event(former, BOTH))
    assert former.calls == []
    assert successor.calls == []
    assert former not in bench.reactor.getWriters()


def test_replaced_by_itself(bench: Bench) -> None:
    """doRead that hands its own descriptor over is followed by no doWrite."""
    former = bench.armed(BOTH)
    successor = bench.selectable(former.number)

    def replace() -> None:
        former.number = -1
        bench.reactor.addReader(successor)
        bench.reactor.addWriter(successor)

    former.on_read = replace
    bench.happens(bench.event(former, BOTH))
    assert former.calls == ["read"]
    assert successor.calls == []
    assert bench.handed() == {successor.number: BOTH}


def test_former_owner_is_removed_late(bench: Bench) -> None:
    """A removal by the former owner does not touch who has its number now."""
    former = bench.armed(BOTH)
    former.number, number = -1, former.number
    successor = bench.armed(BOTH, number)
    bench.reactor.removeReader(former)
    bench.reactor.removeWriter(former)
    bench.happens(bench.event(successor, BOTH))
    assert successor.calls == ["read", "write"]
    assert former.calls == []


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_taken_over(bench: Bench, direction: int) -> None:
    """A direction has one owner: the latest, even if the former has the number."""
    former = bench.armed(direction)
    successor = bench.armed(direction, former.number)
    assert former not in bench.reactor.getReaders() + bench.reactor.getWriters()
    bench.happens(bench.event(successor, direction))
    assert former.calls == []
    assert len(successor.calls) == 1


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_taken_over_by_the_neighbour(bench: Bench, direction: int) -> None:
    """The same where the successor has the other direction already."""
    former = bench.armed(direction)
    successor = bench.armed(BOTH & ~direction, former.number)
    bench.reactor.addReader(successor)
    bench.reactor.addWriter(successor)
    assert former not in bench.reactor.getReaders() + bench.reactor.getWriters()
    bench.happens()
    bench.happens(bench.event(successor, BOTH))
    assert former.calls == []
    assert successor.calls == ["read", "write"]


def test_stale_events_of_an_ended_registration(bench: Bench) -> None:
    """They go nowhere, not even to who has the same number now."""
    it = bench.armed(BOTH)
    stale = [bench.event(it, what, BOTH) for what in (READ, WRITE, HANGUP, GONE)]
    bench.reactor.removeReader(it)
    bench.reactor.removeWriter(it)
    bench.reactor.addReader(it)
    bench.happens()
    for event in stale:
        bench.happens(event)
    assert it.calls == []
    assert bench.handed() == {}


# Reader and writer of one number


def test_reader_and_writer_are_different(bench: Bench) -> None:
    """Each gets its own calls, and removes only itself."""
    reader = bench.reader()
    writer = bench.armed(WRITE, reader.number)
    assert reader in bench.reactor.getReaders()
    assert writer in bench.reactor.getWriters()
    bench.happens(bench.event(reader, BOTH))
    assert (reader.calls, writer.calls) == (["read"], ["write"])
    bench.reactor.removeReader(reader)
    bench.reactor.removeReader(writer)
    bench.happens(bench.event(writer, BOTH))
    assert (reader.calls, writer.calls) == (["read"], ["write", "write"])


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_newcomer_for_the_other_direction(bench: Bench, direction: int) -> None:
    """
    Its number may be a new descriptor: all begins anew, for both, and the
    events of the former registration are for none of them.
    """
    first = bench.armed(direction)
    stale = bench.event(first, BOTH)
    newcomer = bench.selectable(first.number)
    if direction == READ:
        bench.reactor.addWriter(newcomer)
    else:
        bench.reactor.addReader(newcomer)
    bench.happens(stale)
    assert (first.calls, newcomer.calls) == ([], [])
    assert bench.notifier.waits[-1][1] == {bench.notifier.watched[first.number]: BOTH}
    bench.happens(bench.event(first, BOTH))
    assert len(first.calls) == len(newcomer.calls) == 1


def test_newcomer_while_an_event_is_under_way(bench: Bench) -> None:
    """The reader whose writer came within the batch is checked, not lost."""
    first, reader = bench.reader(), bench.reader()
    writer = bench.selectable(reader.number)
    first.on_read = lambda: bench.reactor.addWriter(writer)
    bench.happens(bench.event(first, READ), bench.event(reader, READ))
    assert reader.calls == []
    assert bench.handed()[reader.number] == BOTH


def test_newcomer_whose_neighbour_fails(bench: Bench) -> None:
    """
    Exceptions of the one owner's fileno() are logged, and do not keep the other
    one from being added.
    """
    reader = bench.reader()
    writer = bench.selectable(reader.number)
    error = RuntimeError("fileno of the reader")
    reader.fileno_raises.append(error)
    bench.reactor.addWriter(writer)
    assert writer in bench.reactor.getWriters()
    assert bench.log.take() == [error]


# fileno()


def test_removed_after_its_number_is_gone(bench: Bench) -> None:
    """Closed first and removed then: both directions are found nevertheless."""
    it = bench.armed(BOTH)
    number, it.number = it.number, -1
    bench.reactor.removeReader(it)
    bench.reactor.removeWriter(it)
    assert number not in bench.notifier.watched
    assert it not in bench.reactor.getReaders() + bench.reactor.getWriters()


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_number_gone_at_the_event(bench: Bench, direction: int) -> None:
    """Who has no descriptor any more is not called but disconnected."""
    it = bench.armed(direction)
    event = bench.event(it, direction)
    it.number = -1
    bench.happens(event)
    assert it.calls == ["lost"]
    assert it.reasons[0].check(ConnectionFdescWentAway)
    assert it not in bench.reactor.getReaders() + bench.reactor.getWriters()


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_negative_number_is_refused(bench: Bench, direction: int) -> None:
    """The error names the selectable, and nothing of it stays behind."""
    it = bench.selectable(-1)
    add = bench.reactor.addReader if direction == READ else bench.reactor.addWriter
    with pytest.raises(ValueError, match="has no descriptor to watch"):
        add(it)
    assert it not in bench.reactor.getReaders() + bench.reactor.getWriters()
    assert -1 not in bench.notifier.watched


def test_negative_number_of_one_that_was_added(bench: Bench) -> None:
    """Adding it again tells of its loss instead of pretending to watch it."""
    it = bench.reader()
    number, it.number = it.number, -1
    with pytest.raises(ValueError, match="has no descriptor to watch"):
        bench.reactor.addReader(it)
    assert number not in bench.notifier.watched


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_added_again_with_another_number(bench: Bench, direction: int) -> None:
    """The new number is watched, and the former one no more."""
    it = bench.armed(direction)
    stale, former = bench.event(it, direction), it.number
    it.number = bench.selectable().number
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
    """The caller of addReader gets the exception; nothing stays behind."""
    it = bench.selectable()
    it.fileno_raises.append(RuntimeError("fileno"))
    with pytest.raises(RuntimeError, match="fileno"):
        bench.reactor.addReader(it)
    assert it not in bench.reactor.getReaders()
    assert it.number not in bench.notifier.watched


@pytest.mark.parametrize("direction", [READ, WRITE])
def test_watch_fails(bench: Bench, direction: int) -> None:
    """The caller gets the error; nothing stays behind, and it may try again."""
    it = bench.selectable()
    add = bench.reactor.addReader if direction == READ else bench.reactor.addWriter
    bench.notifier.refused.add(it.number)
    with pytest.raises(OSError, match="refused by the script"):
        add(it)
    assert it not in bench.reactor.getReaders() + bench.reactor.getWriters()
    assert it.number not in bench.handed()
    bench.notifier.refused.clear()
    add(it)
    bench.happens(bench.event(it, direction))
    assert len(it.calls) == 1


def test_watch_fails_for_a_newcomer(bench: Bench) -> None:
    """
    The reader of the number that a writer could not join is either watched
    still, or told that it is not.
    """
    reader = bench.reader()
    bench.notifier.refused.add(reader.number)
    with pytest.raises(OSError, match="refused by the script"):
        bench.reactor.addWriter(bench.selectable(reader.number))
    bench.happens()
    watched = reader.number in bench.notifier.watched
    assert watched or reader.calls == ["lost"]
    assert (reader in bench.reactor.getReaders()) is watched


# A pass inside of a pass


def test_nested_pass_checks_what_is_left(bench: Bench) -> None:
    """
    Who iterates from within a call may wait for just the event that the pass
    around it has in hand: it is checked anew, and told once.
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
def test_nested_pass_checks_the_other_direction(
    bench: Bench, ready: int, disarmed: int
) -> None:
    """Of the event that the pass around it is at, too."""
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
def test_call_raises(bench: Bench, direction: int, kind: type[BaseException]) -> None:
    """
    Whatever it is, it is logged once, the selectable is disconnected with it,
    and everybody else's event arrives.
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


def test_fileno_raises_at_the_event(bench: Bench) -> None:
    """The same for fileno(), which is asked before each call."""
    one, other = bench.reader(), bench.reader()
    error = RuntimeError("fileno")
    events = bench.event(one, READ), bench.event(other, READ)
    one.fileno_raises.append(error)
    bench.happens(*events)
    assert one.calls == ["lost"]
    assert one.reasons[0].value is error
    assert other.calls == ["read"]
    assert bench.log.take() == [error]


def test_log_prefix_raises(bench: Bench) -> None:
    """Who has no name to log under is called all the same."""
    one, other = bench.reader(), bench.reader()
    error = RuntimeError("logPrefix")
    one.prefix_raises.append(error)
    bench.happens(bench.event(one, READ), bench.event(other, READ))
    assert (one.calls, other.calls) == (["read"], ["read"])
    assert bench.log.take() == [error]


def test_connection_lost_raises(bench: Bench) -> None:
    """Nor does connectionLost keep anybody's event back."""
    one, other = bench.armed(BOTH), bench.reader()
    error = RuntimeError("connectionLost")
    one.on_read = lambda: CONNECTION_LOST
    one.on_lost = raiser(error)
    bench.happens(bench.event(one, BOTH), bench.event(other, READ))
    assert (one.calls, other.calls) == (["read", "lost"], ["read"])
    assert one not in bench.reactor.getReaders() + bench.reactor.getWriters()
    assert bench.log.take() == [error]


def test_interrupt_within_a_batch(bench: Bench) -> None:
    """
    KeyboardInterrupt outside of a selectable's own call ends the pass; what was
    not called is found by a check, since no event will tell of it again.
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
    unchecked = bench.handed()
    assert unchecked[struck.number] & READ
    assert unchecked[after.number] & READ


def test_interrupt_after_a_removal(bench: Bench) -> None:
    """What has ended by the time of the interrupt is not checked."""
    first, struck = bench.reader(), bench.reader()
    first.on_read = lambda: bench.reactor.removeReader(first)
    struck.prefix_raises.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench.happens(bench.event(first, READ), bench.event(struck, READ))
    assert first.number not in bench.handed()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("wait")])
def test_wait_raises(bench: Bench, error: BaseException) -> None:
    """What was to be checked is still to be checked."""
    it = bench.reader()
    bench.reactor.addWriter(it)
    bench.notifier.raises = error, False
    with pytest.raises(type(error)):
        bench.reactor.iterate(0)
    assert bench.handed()[it.number] & WRITE


def test_wait_raises_with_events_in_hand(bench: Bench) -> None:
    """
    An interrupt may come when the notifier has taken an event from the kernel
    and not returned it yet.  No event will tell of it again.
    """
    it = bench.reader()
    bench.notifier.raises = KeyboardInterrupt(), True
    with pytest.raises(KeyboardInterrupt):
        bench.happens(bench.event(it, READ))
    assert bench.handed()[it.number] & READ


def test_added_during_a_wait(bench: Bench) -> None:
    """
    Interest that a Python signal handler begins inside of a wait is checked by
    the next one, whatever this one says of its registration.
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
    assert bench.handed() == {it.number: BOTH, late.number: READ}


def test_calls_are_logged_under_their_prefix(bench: Bench) -> None:
    """What doRead and connectionLost log carries the name of the selectable."""
    it = bench.reader()
    names: list[Any] = []

    def note() -> Any:
        names.append(context.get(log.ILogContext)["system"])
        return CONNECTION_LOST

    it.on_read = it.on_lost = note
    bench.happens(bench.event(it, READ))
    assert names == [f"selectable {it.number}"] * 2


def test_between_the_calls_nobody_logs(bench: Bench) -> None:
    """A timer, or a signal handler in the sleep, logs under its own name."""
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
    assert names == [f"selectable {it.number}", "-", "-"]


# Disconnection


@pytest.mark.parametrize(
    ("returned", "kind"),
    [(CONNECTION_DONE, ConnectionDone), (CONNECTION_LOST, ConnectionLost)],
)
@pytest.mark.parametrize("direction", [READ, WRITE])
def test_call_returns_why(
    bench: Bench, direction: int, returned: BaseException, kind: type[BaseException]
) -> None:
    """Both directions end, and the other one is not called any more."""
    it = bench.armed(BOTH)
    it.on_read = it.on_write = lambda: returned
    bench.happens(bench.event(it, direction))
    assert it.calls == ["read" if direction == READ else "write", "lost"]
    assert it.reasons[0].check(kind)
    assert it.number not in bench.notifier.watched
    assert bench.handed() == {}


def test_half_close(bench: Bench) -> None:
    """
    The end of what it reads is not the end of who can do without: only the
    reading ends, and the writing goes on.
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
def test_no_half_close(bench: Bench, direction: int, returned: BaseException) -> None:
    """Anything else than a clean end of the reading ends all."""
    it = bench.armed(BOTH)
    alsoProvides(it, IHalfCloseableDescriptor)
    it.on_read = it.on_write = lambda: returned
    bench.happens(bench.event(it, direction))
    assert it.calls[1:] == ["lost"]
    assert it.number not in bench.notifier.watched


# Hang-up


@pytest.mark.parametrize("interest", [READ, WRITE, BOTH])
def test_hang_up_is_told_by_calling(bench: Bench, interest: int) -> None:
    """doRead and doWrite find out what has happened, and say it better."""
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
def test_hang_up_is_ignored(
    bench: Bench, interest: int, called: list[str], reason: type[BaseException]
) -> None:
    """
    Called in a few passes, then disconnected: the condition does not go away, and
    the loop must not spin.
    """
    it = bench.armed(interest)
    times = bench.hangs_up(it)
    assert times > 1
    assert it.calls == called[:-1] * times + ["lost"]
    assert it.reasons[0].check(reason)
    assert it.number not in bench.notifier.watched


def test_hang_up_of_a_one_shot_notifier(bench: Bench) -> None:
    """
    A hang-up that used up the arming of everything is told by calling as well,
    and what does not act on it is checked again.
    """
    it = bench.armed(BOTH)
    bench.happens(bench.event(it, HANGUP, BOTH))
    assert it.calls == ["read", "write"]
    assert bench.handed() == {it.number: BOTH}


def test_hang_up_with_something_left_to_read(bench: Bench) -> None:
    """A selectable is not disconnected before it has read what came before the end."""
    it = bench.armed(BOTH)
    for _ in range(A_FEW):
        bench.happens(bench.event(it, HANGUP | READ))
    assert it.calls == ["read", "write"] * A_FEW
    assert bench.hangs_up(it) > 1


@pytest.mark.parametrize("meanwhile", [None, READ, HANGUP | READ])
def test_hang_up_that_goes_away(bench: Bench, meanwhile: int | None) -> None:
    """
    A pass that does not report it, or something else too, says that a read has taken
    the error away.  The next one is another.
    """
    it = bench.reader()
    for _ in range(A_FEW):
        bench.happens(bench.event(it, HANGUP))
        bench.happens(*[bench.event(it, meanwhile)] if meanwhile else [])
    assert it.calls == ["read"] * (2 * A_FEW if meanwhile else A_FEW)
    assert bench.hangs_up(it) > 1


def test_hang_up_of_something_else_meanwhile(bench: Bench) -> None:
    """The passes are counted for each descriptor."""
    one, other = bench.reader(), bench.reader()
    for _ in range(A_FEW):
        bench.happens(bench.event(one, HANGUP))
        bench.happens(bench.event(other, HANGUP))
    assert one.calls == other.calls == ["read"] * A_FEW


def test_hang_up_of_interest_that_begins_anew(bench: Bench) -> None:
    """Nobody is disconnected for having ignored what nobody was told."""
    first, second = bench.reader(), bench.armed(BOTH)

    def renew() -> None:
        for remove, add in (
            (bench.reactor.removeReader, bench.reactor.addReader),
            (bench.reactor.removeWriter, bench.reactor.addWriter),
        ):
            remove(second)
            add(second)

    first.on_read = renew
    bench.happens(bench.event(first, READ), bench.event(second, HANGUP))
    assert second.calls == []
    bench.happens(bench.event(second, HANGUP))
    assert second.calls == ["read", "write"]


def test_hang_up_of_one_who_half_closes(bench: Bench) -> None:
    """The writing that survives the end of the reading is checked again."""
    it = bench.armed(BOTH)
    alsoProvides(it, IHalfCloseableDescriptor)
    bench.hangs_up(it, "read lost")
    assert it in bench.reactor.getWriters()
    assert bench.handed()[it.number] & WRITE
    bench.hangs_up(it)
    assert it.reasons[-1].check(ConnectionLost)


def test_hang_up_of_reader_and_writer(bench: Bench) -> None:
    """Where they are different, both are told and both are disconnected."""
    reader = bench.reader()
    writer = bench.armed(WRITE, reader.number)
    times = bench.hangs_up(reader)
    assert reader.calls == [*["read"] * times, "lost"]
    assert writer.calls == [*["write"] * times, "lost"]


# Gone


@pytest.mark.parametrize("interest", [READ, WRITE, BOTH])
def test_gone(bench: Bench, interest: int) -> None:
    """Who was closed while still watched is disconnected once, uncalled."""
    it = bench.armed(interest)
    bench.happens(bench.event(it, GONE | interest))
    assert it.calls == ["lost"]
    assert it.reasons[0].check(ConnectionFdescWentAway)
    assert it.number not in bench.notifier.watched


def test_gone_is_not_a_half_close(bench: Bench) -> None:
    """There is nothing left to write to."""
    it = bench.armed(BOTH)
    alsoProvides(it, IHalfCloseableDescriptor)
    bench.happens(bench.event(it, GONE))
    assert it.calls == ["lost"]


def test_gone_for_reader_and_writer(bench: Bench) -> None:
    """Each is told, also when telling the first one fails."""
    reader = bench.reader()
    writer = bench.armed(WRITE, reader.number)
    error = RuntimeError("connectionLost")
    reader.on_lost = raiser(error)
    bench.happens(bench.event(reader, GONE))
    assert (reader.calls, writer.calls) == (["lost"], ["lost"])
    assert bench.log.take() == [error]


def test_gone_for_a_writer_that_its_reader_removes(bench: Bench) -> None:
    """Who was removed meanwhile is not told."""
    reader = bench.reader()
    writer = bench.armed(WRITE, reader.number)
    reader.on_lost = lambda: bench.reactor.removeWriter(writer)
    bench.happens(bench.event(reader, GONE))
    assert (reader.calls, writer.calls) == (["lost"], [])


# The reactor as a whole


def test_remove_all(bench: Bench) -> None:
    """All go but the reactor's own; each is returned once."""
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


def test_runs_and_cleans_up(bench: Bench) -> None:
    """The kernel's things are taken when it starts, and given back at the end."""
    assert bench.notifier.life == []
    seen: list[list[str]] = []

    def stop() -> None:
        seen.append(list(bench.notifier.life))
        bench.reactor.stop()

    bench.reactor.callWhenRunning(stop)
    bench.reactor.run(installSignalHandlers=False)
    assert seen == [["open"]]
    assert bench.notifier.life == ["open", "close"]
    # A second run is refused, and leaves nothing behind either.
    with pytest.raises(ReactorNotRestartable):
        bench.reactor.run(installSignalHandlers=False)
    assert bench.notifier.life[-1] == "close"


def test_cannot_open(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses, the reactor does not start, and may try later."""
    refusal = UnsupportedReactorError("refused by the script")
    monkeypatch.setattr(bench.notifier, "open", raiser(refusal))
    bench.reactor.callWhenRunning(bench.reactor.stop)
    with pytest.raises(UnsupportedReactorError):
        bench.reactor.run(installSignalHandlers=False)
    monkeypatch.undo()
    bench.reactor.run(installSignalHandlers=False)
    assert bench.notifier.life == ["open", "close"]


def test_daemonize(bench: Bench) -> None:
    """The parent gives everything back; the child is told that it is alone."""
    it = bench.reader()
    bench.reactor.beforeDaemonize()
    bench.reactor.afterDaemonize()
    assert bench.notifier.life == ["close", "daemonized"]
    bench.happens(bench.event(it, READ))
    assert it.calls == ["read"]


def test_class_can_be_swapped(bench: Bench) -> None:
    """Twisted's own test tools do it to reactors that they are done with."""

    class Spent(PosixReactorBase):
        pass

    reactor: Any = bench.reactor
    reactor.__dict__ = dict(reactor.__dict__)
    reactor.__class__ = Spent
    reactor.__class__ = EngineReactor
    assert bench.handed()


# The model

NUMBERS = [FAKE, FAKE + 1, FAKE + 2]
LOST = 0
"""Beside READ and WRITE: the plans for connectionLost."""


class Interest(NamedTuple):
    """
    What a selectable wants in one direction.

    ``began`` is never the same twice, which tells an interest from one that
    ended and began anew.
    """

    number: int
    began: int


class Action(NamedTuple):
    """
    Something that an application does: ``what``, mostly to the selectable with
    the index ``which``, in a direction.
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
"""What a wait raises, and whether it has taken the events by then."""


def actions(what: list[str]) -> st.SearchStrategy[Action]:
    return st.builds(
        Action, st.sampled_from(what), st.integers(0, 7), st.sampled_from([READ, WRITE])
    )


class Modelled(Selectable):
    """
    A selectable of the model, which plans what its calls do.

    :ivar keen: whether it reads and writes all it can when there is no plan.
    :ivar why: the reason for a disconnection, while it is due.
    """

    def __init__(self, machine: EngineMachine, number: int, keen: bool = True) -> None:
        super().__init__(number)
        self.keen = keen
        self.why: BaseException | None = None
        self.plans: dict[int, list[Action]] = {READ: [], WRITE: [], LOST: []}
        self.on_read = lambda: machine.is_called(self, READ)
        self.on_write = lambda: machine.is_called(self, WRITE)
        self.on_lost = lambda: machine.is_lost(self)


class EngineMachine(RuleBasedStateMachine):
    """
    Drives a reactor beside a model of who wants what.

    The model knows numbers, levels, and when each interest began.  What a call
    needs is an event for the number, returned by a wait since the interest
    began, of a registration that had not ended by then.
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
        # Of the pass under way: the events by number, and whom they are for.
        self.events: dict[int, Event] = {}
        self.entitled: dict[tuple[Modelled, int], Interest] = {}
        self.called: list[Interest] = []
        self.told_of_hang_up: set[tuple[Modelled, Registration]] = set()
        self.to_be_logged: list[BaseException] = []
        # An assertion within a call would only be logged by the engine.
        self.violations: list[str] = []
        for number in NUMBERS:
            self.notifier.file_opens(number)

    def teardown(self) -> None:
        self.reactor.removeAll()
        dispose(self.reactor)
        self.log.stop()

    # What the reactor is asked to do

    def add(self, it: Modelled, direction: int) -> None:
        number = it.number
        known = self.interests.get((it, direction))
        refusal: type[Exception] | None = None
        if known is None or known.number != number:
            others = [
                key
                for key, interest in self.interests.items()
                if interest.number == number and key[0] is not it
            ]
            joins = number in {
                interest.number
                for key, interest in self.interests.items()
                if key[0] is it and key[1] != direction
            }
            is_open = number in self.notifier.files
            if others and not joins and not is_open:
                # An example shows what becomes of them.
                return
            if known is not None:
                del self.interests[it, direction]
            if number < 0:
                refusal = ValueError
            elif not joins and not is_open:
                refusal = OSError
            else:
                for other, wanted in others:
                    closed = other.number != number and not joins
                    if wanted == direction or closed:
                        del self.interests[other, wanted]
                    elif not joins:
                        # The newcomer may have come with a new descriptor.
                        self.begin(other, wanted, number)
                self.begin(it, direction, number)
        add = self.reactor.addReader if direction == READ else self.reactor.addWriter
        try:
            add(it)
        except (ValueError, OSError) as error:
            self.expect(refusal is type(error), f"adding failed: {error}")
        else:
            self.expect(refusal is None, f"adding {number} did not fail")

    def begin(self, it: Modelled, direction: int, number: int) -> None:
        self.interests[it, direction] = Interest(number, next(self.beginnings))

    def remove(self, it: Modelled, direction: int) -> None:
        self.interests.pop((it, direction), None)
        if direction == READ:
            self.reactor.removeReader(it)
        else:
            self.reactor.removeWriter(it)

    def has_room(self) -> bool:
        return len(self.selectables) < 8

    # What an application does

    def do(self, action: Action) -> None:
        direction, number = action.direction, NUMBERS[action.which % len(NUMBERS)]
        files = self.notifier.files
        if action.what == "open":
            if number not in files:
                self.notifier.file_opens(number)
            if self.has_room():
                self.add_new(number, direction)
        if action.what == "becomes ready" and number in files:
            self.notifier.becomes_ready(number, direction)
        if action.what == "is ready no more" and number in files:
            self.notifier.is_ready_no_more(number, direction)
        if action.what == "hangs up" and number in files:
            self.notifier.becomes_ready(number, HANGUP)
        if self.selectables:
            it = self.selectables[action.which % len(self.selectables)]
            self.do_to(it, action)

    def do_to(self, it: Modelled, action: Action) -> None:
        what, direction, number = action.what, action.direction, it.number
        is_open = number in self.notifier.files
        if what == "add":
            self.add(it, direction)
        if what == "remove":
            self.remove(it, direction)
        if what == "renew":
            self.remove(it, direction)
            self.add(it, direction)
        if what == "renew both":
            # One after the other, so that the registration lives on.
            for each in (READ, WRITE):
                if (it, each) in self.interests:
                    self.remove(it, each)
                    self.add(it, each)
        if what == "close":
            self.remove(it, READ)
            self.remove(it, WRITE)
        if what in ("close", "close, remove later", "close behind its back"):
            if is_open:
                self.notifier.file_closes(number)
            if what != "close behind its back":
                it.number = -1
        if what == "move":
            it.number = NUMBERS[action.which % len(NUMBERS)]
        if what == "replace" and is_open and self.has_room():
            it.number = -1
            self.notifier.file_closes(number)
            self.notifier.file_opens(number)
            self.add_new(number, direction)
        if what == "share" and is_open and self.has_room():
            self.add_new(number, direction)

    def add_new(self, number: int, direction: int) -> None:
        it = Modelled(self, number)
        self.selectables.append(it)
        self.add(it, direction)

    # What the reactor does

    def wait_returns(self, events: Sequence[Event]) -> None:
        for event in events:
            registration, ready, _ = event
            number = registration.descriptor
            if self.notifier.watched.get(number) is not registration:
                continue
            self.events[number] = event
            for key, interest in self.interests.items():
                if interest.number == number and ready & (key[1] | HANGUP | GONE):
                    self.entitled[key] = interest

    def is_called(self, it: Modelled, direction: int) -> Any:
        interest = self.interests.get((it, direction))
        if interest is None or self.entitled.pop((it, direction), None) != interest:
            self.violations.append(f"a call in direction {direction} for no event")
            return None
        self.called.append(interest)
        registration, ready, _ = self.events[interest.number]
        if ready & HANGUP:
            self.told_of_hang_up.add((it, registration))
        plan = it.plans[direction]
        default = "drain" if it.keen else "ignore"
        action = plan.pop(0) if plan else Action(default, 0, direction)
        if action.what == "drain" and it.number in self.notifier.files:
            self.notifier.is_ready_no_more(it.number, direction)
        elif action.what == "fail":
            it.why = [ValueError, KeyboardInterrupt, SystemExit][action.which % 3]()
            self.to_be_logged.append(it.why)
            raise it.why
        elif action.what in ("done", "lost"):
            it.why = CONNECTION_DONE if action.what == "done" else CONNECTION_LOST
            return it.why
        elif action.what == "interrupt":
            # Whoever is next.
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
        registration, ready, _ = self.events[interest.number]
        if reason.check(ConnectionFdescWentAway):
            return it.number == -1 or bool(ready & GONE)
        wanted = 0
        for (_, direction), each in self.interests.items():
            if each.number == interest.number:
                wanted |= direction
        told = (it, registration) in self.told_of_hang_up
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
        """Passes without any more surprises; who was called in them."""
        for it in self.selectables:
            it.prefix_raises.clear()
            for plan in it.plans.values():
                plan.clear()
        self.notifier.raises = None
        self.notifier.hold = False
        called = []
        # A hang-up takes the most: a few passes end the reading, and as many the
        # rest.
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
    def somebody_on_each_number(self, interests: list[int], keen: list[bool]) -> None:
        for number, interest, each in zip(NUMBERS, interests, keen, strict=True):
            self.connect(number, interest, each, half_closeable=each)

    @precondition(lambda self: self.has_room())
    @rule(
        number=st.sampled_from(NUMBERS),
        interest=st.sampled_from([READ, WRITE, BOTH]),
        keen=st.booleans(),
        half_closeable=st.booleans(),
    )
    def connect(
        self, number: int, interest: int, keen: bool, half_closeable: bool
    ) -> None:
        it = Modelled(self, number, keen)
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
        Much at once, for it takes several events in one batch, and calls that do
        something, to go wrong.
        """
        wanting = list(dict.fromkeys(it for it, _ in self.interests))
        if wanting:
            for which, call, action in plans:
                wanting[which % len(wanting)].plans[call].append(action)
        for number, what in zip(NUMBERS, ready, strict=True):
            if number in self.notifier.files:
                self.notifier.becomes_ready(number, what)
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
    def whoever_is_ready_gets_called(self) -> None:
        files = self.notifier.files
        due, hung_up = set(), set()
        for (it, direction), interest in self.interests.items():
            number = interest.number
            registration = self.notifier.watched.get(number)
            if it.number != number or registration is None or number not in files:
                continue
            if self.notifier.bound[registration] is not files[number]:
                # Closed and opened again without a word to the reactor.
                continue
            if files[number].levels & direction:
                due.add(interest)
            if files[number].levels == HANGUP:
                hung_up.add(interest)
        called = set(self.many_passes())
        left = set(self.interests.values())
        self.expect(not (due & left) - called, "somebody who is ready is not called")
        self.expect(not hung_up & left, "somebody spins on a hang-up")

    @rule()
    def it_sleeps_when_nothing_is_ready(self) -> None:
        for file in self.notifier.files.values():
            file.levels = 0
        self.many_passes()
        self.one_pass(None)
        self.expect(self.notifier.waits[-1] == (None, {}), "it does not sleep")
        self.expect(not self.called, "somebody is called for nothing")

    @invariant()
    def reactor_agrees_with_the_model(self) -> None:
        assert self.violations + self.notifier.complaints == []
        # Whoever has failed was disconnected for it, and it was logged once.
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
            wanted[interest.number] = wanted.get(interest.number, 0) | direction
        assert wanted == {
            number: registration.interest
            for number, registration in self.notifier.watched.items()
            if number >= FAKE
        }
        # Who has neither a number nor an interest has no part in what follows.
        self.selectables = [
            it
            for it in self.selectables
            if it.number >= 0 or {(it, READ), (it, WRITE)} & self.interests.keys()
        ]


class EdgeMachine(EngineMachine):
    """On persistent edges, which may overflow."""

    make_notifier = EdgeNotifier

    @rule()
    def overflow(self) -> None:
        notifier = self.notifier
        assert isinstance(notifier, EdgeNotifier)
        notifier.overflow()


class OneShotMachine(EngineMachine):
    """On one-shot polls."""

    make_notifier = OneShotNotifier


@pytest.mark.parametrize("machine", [EdgeMachine, OneShotMachine])
def test_model(machine: type[EngineMachine]) -> None:
    """
    However the kernel tells, late, twice, out of order or of what is no more:
    who is ready and wants to know is called, and nobody else is.
    """
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(250),
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
