"""
Random programs that share channels, locks and events, compared with a model.

Each actor runs a program: it sends, receives, selects, takes locks, waits for a while,
and cancels other actors.  The test itself, outside of all tasks, lets time pass and
interferes.  An actor records what it wants before it waits, and what it got.  So the
model need not know the order in which actors are resumed.  Whenever all actors wait, it
checks:

- No actor waits for something that is available.
- No actor has something that it cannot have: a value that was not sent, a value that
  another actor has received, or a lock that another actor holds.
- Everything is in order.  Of two receivers, the earlier one has the value that was sent
  earlier.  Of two actors that want a lock, the earlier one gets it first.  No actor
  waits that came before one that was served.
- The queues hold only the actors that wait.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tests.quick import examples
from twisted_rtsig.coro import (
    Channel,
    ChannelClosed,
    Deadline,
    EndOfChannel,
    Event,
    Lock,
    Semaphore,
    WouldBlock,
    channels,
    select,
    sleep,
    spawn,
    timeout,
)

Steps = Generator[Any, Any, Any]
# How many there are at most; few, so that they meet each other.
CHANNELS = 2
EVENTS = 1
DEFERREDS = 1
DEADLINES = 3
ACTORS = 5
GIVEN_UP = object()


# The model, and the real channels and locks


class Value(NamedTuple):
    """:ivar ticket: the sender's ticket."""

    channel: int
    ticket: int


class ModelChannel:
    """
    A channel and its history.

    :ivar sent: the values whose sends have succeeded.
    :ivar received: the values received, by the receiver's ticket.
    """

    def __init__(self, number: int, capacity: int) -> None:
        self.number = number
        self.capacity = capacity
        self.real: Channel[Value] = Channel(capacity)
        self.sent: set[Value] = set()
        self.received: dict[int, Value] = {}
        self.closed = False

    @property
    def buffered(self) -> int:
        return len(self.sent) - len(self.received)

    def close(self) -> None:
        self.closed = True
        self.real.close()

    def receives(self, ticket: int, value: Value) -> None:
        assert value.channel == self.number
        assert value not in self.received.values()
        self.received[ticket] = value

    def is_in_order(self) -> None:
        assert self.sent >= {*self.received.values()}
        values = [self.received[ticket] for ticket in sorted(self.received)]
        assert values == sorted(values)
        # The values not received yet were sent after those.
        assert values == sorted(self.sent)[: len(values)]


class ModelLock:
    """
    A lock or semaphore.

    :ivar holders: the actors that hold it.
    :ivar tickets: the tickets of the actors that got it, in that order.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.real = Lock() if capacity == 1 else Semaphore(capacity, capacity)
        self.holders: list[Actor] = []
        self.tickets: list[int] = []


class Want(NamedTuple):
    """One of the things that an actor waits for."""

    kind: str
    what: Any

    @property
    def is_channel(self) -> bool:
        return self.kind in ("value", "room")

    def served(self) -> list[int]:
        """The tickets of all actors that got it."""
        match self.kind:
            case "value":
                return list(self.what.received)
            case "room":
                return [value.ticket for value in self.what.sent]
            case "lock":
                return list(self.what.tickets)
        return []


class Model:
    """All channels, locks and actors."""

    def __init__(self, capacities: list[int]) -> None:
        self.clock = Clock()
        self.tickets = count()
        self.channels = [ModelChannel(*each) for each in enumerate(capacities)]
        self.locks = [ModelLock(1), ModelLock(2)]
        self.events = [Event() for _ in range(EVENTS)]
        self.deferreds: list[Deferred[None]] = [Deferred() for _ in range(DEFERREDS)]
        self.deadlines = [
            (each, Deadline(each, self.clock)) for each in range(1, DEADLINES + 1)
        ]
        self.actors: list[Actor] = []

    def channel(self, number: int) -> ModelChannel:
        return self.channels[number % len(self.channels)]

    def happen(self, in_task: bool, what: Sequence[Callable[[], object]]) -> None:
        """In a task, what this resumes runs afterwards."""

        def everything() -> None:
            for each in what:
                each()

        if in_task:
            spawn(everything, reactor=self.clock).result()
        else:
            everything()
        self.check_rules()

    def check_rules(self) -> None:
        """Check the rules; all actors wait."""
        self.clock.advance(0)
        for actor in self.actors:
            assert actor.done or actor.wants, "it does not wait, and has not ended"
            for want in actor.wants:
                assert not self.is_there(want, actor), want
                assert all(each < actor.ticket for each in want.served()), want
        wants = [want for actor in self.actors for want in actor.wants]
        for channel in self.channels:
            assert channel.real.statistics() == (
                channel.buffered,
                channel.capacity,
                wants.count(Want("room", channel)),
                wants.count(Want("value", channel)),
                channel.closed,
                0,
                0,
            )
            assert channel.buffered <= channel.capacity
            channel.is_in_order()
        for lock in self.locks:
            assert not any(actor.done for actor in lock.holders)
            assert lock.real.value == lock.capacity - len(lock.holders)
            assert f" {wants.count(Want('lock', lock))} wait" in repr(lock.real)
            if lock.capacity == 1:
                assert lock.tickets == sorted(lock.tickets)
        for event in self.events:
            waiting = wants.count(Want("event", event))
            assert event.is_set or f" {waiting} wait" in repr(event)

    def is_there(self, want: Want, actor: Actor) -> Any:
        """Whether it is available without waiting."""
        what = want.what
        match want.kind:
            case "value":
                sender = self.others_want(Want("room", what), actor)
                return sender or what.closed or what.buffered > 0
            case "room":
                receiver = self.others_want(Want("value", what), actor)
                return receiver or what.closed or what.buffered < what.capacity
            case "lock":
                return len(what.holders) < what.capacity
            case "event":
                return what.is_set
            case "time":
                return self.clock.seconds() >= what
            case "deferred":
                return what.called
            case "end":
                return what.done
        raise AssertionError(want)

    def others_want(self, want: Want, actor: Actor) -> bool:
        return any(want in each.wants for each in self.actors if each is not actor)

    def finish(self) -> None:
        for actor in self.actors:
            actor.cancel()
        self.check_rules()
        for actor in self.actors:
            actor.has_not_failed()
        assert all(each.done for each in self.actors)
        assert not self.clock.getDelayedCalls()
        for channel in self.channels:
            channel.close()
            with contextlib.suppress(EndOfChannel):
                while True:
                    value = channel.real.try_receive()
                    channel.receives(next(self.tickets), value)
            assert channel.buffered == 0
            channel.is_in_order()


# Actors


class Actor:
    """
    Runs a program.

    :ivar wants: what it waits for.
    :ivar ticket: its place in the order in which actors began to wait.
    """

    def __init__(self, model: Model, in_task: bool, awaits: bool) -> None:
        self.model = model
        self.in_task = in_task
        self.awaits = awaits
        self.wants: list[Want] = []
        self.ticket = 0
        self.cancelled = False
        # A task or a Deferred.
        self.running: Any = None
        self.failure: Failure | None = None

    def start(self, program: list[Any]) -> None:
        if self.in_task:
            self.running = spawn(self.run, program, reactor=self.model.clock)
        else:
            self.running = inlineCallbacks(self.run)(program)
            self.running.addErrback(self.failed)

    def failed(self, failure: Failure) -> None:
        self.failure = failure

    @property
    def done(self) -> bool:
        if self.running is None:
            return True
        return bool(self.running.done if self.in_task else self.running.called)

    def cancel(self) -> None:
        if self.running is not None:
            self.cancelled = self.cancelled or not self.done
            self.running.cancel()

    def has_not_failed(self) -> None:
        try:
            if self.in_task:
                self.running.result()
            elif self.failure is not None:
                self.failure.raiseException()
        except CancelledError:
            assert self.cancelled

    def comes(self) -> int:
        self.ticket = next(self.model.tickets)
        return self.ticket

    def run(self, program: list[Any]) -> Steps:
        for step in program:
            yield from step.run(self)

    def wait(
        self, start: Callable[[], Any], wants: list[Want], patience: int | None
    ) -> Steps:
        """Wait for what ``start`` begins; ``GIVEN_UP`` if it takes too long."""
        self.wants = wants
        try:
            if patience is None:
                return (yield from self.result_of(start()))
            time = Want("time", self.model.clock.seconds() + patience)
            self.wants = [*wants, time]
            if not self.in_task:
                started = start().addTimeout(patience, self.model.clock)
                return (yield from self.result_of(started))
            with timeout(patience):
                return (yield from self.result_of(start()))
        except (TimeoutError, DeferredTimeoutError):
            return GIVEN_UP
        finally:
            self.wants = []

    def result_of(self, operation: Any) -> Steps:
        if self.awaits:
            return (yield from operation)
        return (yield operation)


# Steps of programs


class Send(NamedTuple):
    channel: int
    patience: int | None = None

    def run(self, actor: Actor) -> Steps:
        channel = actor.model.channel(self.channel)
        value = Value(channel.number, actor.comes())
        try:
            sent = yield from actor.wait(
                partial(channel.real.send, value),
                [Want("room", channel)],
                self.patience,
            )
        except ChannelClosed:
            assert channel.closed
            return
        if sent is not GIVEN_UP:
            assert sent is None
            channel.sent.add(value)


class Receive(NamedTuple):
    channel: int
    patience: int | None = None

    def run(self, actor: Actor) -> Steps:
        channel = actor.model.channel(self.channel)
        ticket = actor.comes()
        try:
            value = yield from actor.wait(
                channel.real.receive, [Want("value", channel)], self.patience
            )
        except EndOfChannel:
            assert channel.closed
            return
        if value is not GIVEN_UP:
            channel.receives(ticket, value)


class WithoutWaiting:
    """A step that does not wait, and can happen outside of all tasks as well."""

    def run(self, actor: Actor) -> Steps:
        self.happen(actor.model)
        return
        yield

    def happen(self, model: Model) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class TrySend(WithoutWaiting):
    channel: int

    def happen(self, model: Model) -> None:
        channel = model.channel(self.channel)
        value = Value(channel.number, next(model.tickets))
        # It may be received before this returns.
        channel.sent.add(value)
        try:
            channel.real.try_send(value)
        except (WouldBlock, ChannelClosed):
            channel.sent.remove(value)


@dataclass(frozen=True)
class TryReceive(WithoutWaiting):
    channel: int

    def happen(self, model: Model) -> None:
        channel = model.channel(self.channel)
        ticket = next(model.tickets)
        with contextlib.suppress(WouldBlock, EndOfChannel):
            channel.receives(ticket, channel.real.try_receive())


@dataclass(frozen=True)
class Close(WithoutWaiting):
    channel: int

    def happen(self, model: Model) -> None:
        model.channel(self.channel).close()


class Hold(NamedTuple):
    """Do something with a lock."""

    lock: int
    body: list[Any]
    patience: int | None = None

    def run(self, actor: Actor) -> Steps:
        lock = actor.model.locks[self.lock]
        ticket = actor.comes()
        acquired = yield from actor.wait(
            lock.real.acquire, [Want("lock", lock)], self.patience
        )
        if acquired is GIVEN_UP:
            return
        lock.holders.append(actor)
        lock.tickets.append(ticket)
        assert len(lock.holders) <= lock.capacity
        try:
            yield from actor.run(self.body)
        finally:
            lock.holders.remove(actor)
            lock.real.release()


class WaitFor(NamedTuple):
    event: int
    patience: int | None = None

    def run(self, actor: Actor) -> Steps:
        event = actor.model.events[self.event]
        yield from actor.wait(event.wait, [Want("event", event)], self.patience)


@dataclass(frozen=True)
class Set(WithoutWaiting):
    event: int

    def happen(self, model: Model) -> None:
        model.events[self.event].set()


@dataclass(frozen=True)
class Fire(WithoutWaiting):
    deferred: int

    def happen(self, model: Model) -> None:
        deferred = model.deferreds[self.deferred]
        if not deferred.called:
            deferred.callback(None)


class Sleep(NamedTuple):
    seconds: int

    def run(self, actor: Actor) -> Steps:
        clock = actor.model.clock
        until = Want("time", clock.seconds() + self.seconds)
        yield from actor.wait(partial(sleep, self.seconds, clock), [until], None)


class Cancel(NamedTuple):
    actor: int

    def run(self, actor: Actor) -> Steps:
        # Under inlineCallbacks one cannot cancel a function that runs: the one that
        # calls this, or another one whose call has resumed it.
        others = [
            each
            for each in actor.model.actors
            if each is not actor and (each.in_task or each.wants)
        ]
        if others:
            others[self.actor % len(others)].cancel()
        return
        yield

    def happen(self, model: Model) -> None:
        model.actors[self.actor % len(model.actors)].cancel()


class Advance(NamedTuple):
    seconds: int

    def happen(self, model: Model) -> None:
        model.clock.advance(self.seconds)


class Select(NamedTuple):
    """:ivar cases: kinds of things, and which of them."""

    cases: list[tuple[str, int]]
    patience: int | None = None

    def run(self, actor: Actor) -> Steps:
        ticket = actor.comes()
        made = [self.case(actor, ticket, *each) for each in self.cases]
        cases = [case for case, _ in made]
        try:
            result = yield from actor.wait(
                partial(select, *cases), [want for _, want in made], self.patience
            )
        except (EndOfChannel, ChannelClosed):
            assert any(each.what.closed for _, each in made if each.is_channel)
            return
        except CancelledError:
            if actor.cancelled:
                raise
            # The cancellation of an actor that was selected.
            return
        if result is GIVEN_UP:
            return
        chosen, value = result
        want = next(want for case, want in made if case is chosen)
        if want.kind == "value":
            want.what.receives(ticket, value)
        else:
            assert value is None
        if want.kind == "room":
            want.what.sent.add(chosen.value)

    def case(
        self, actor: Actor, ticket: int, kind: str, number: int
    ) -> tuple[Any, Want]:
        model = actor.model
        match kind:
            case "value":
                channel = model.channel(number)
                return channel.real, Want(kind, channel)
            case "room":
                channel = model.channel(number)
                value = Value(channel.number, ticket)
                return channel.real.sending(value), Want(kind, channel)
            case "event":
                event = model.events[number % EVENTS]
                return event, Want(kind, event)
            case "deferred":
                deferred = model.deferreds[number % DEFERREDS]
                return deferred, Want(kind, deferred)
            case "end":
                other = model.actors[number % len(model.actors)]
                if other.running is not None and other is not actor:
                    return other.running, Want(kind, other)
        time, deadline = model.deadlines[number % DEADLINES]
        return deadline, Want("time", time)


CHANNEL = st.integers(0, CHANNELS - 1)
EVENT = st.integers(0, EVENTS - 1)
PATIENCE = st.sampled_from([None, None, 1, 2])


def selects(kinds: list[str]) -> st.SearchStrategy[Select]:
    case = st.tuples(st.sampled_from(kinds), st.integers(0, 3))
    return st.builds(Select, st.lists(case, min_size=1, max_size=4), PATIENCE)


AT_ONCE: list[st.SearchStrategy[Any]] = [
    st.builds(TrySend, CHANNEL),
    st.builds(TryReceive, CHANNEL),
    st.builds(Close, CHANNEL),
    st.builds(Set, EVENT),
    st.builds(Fire, st.integers(0, DEFERREDS - 1)),
    st.builds(Cancel, st.integers(0, ACTORS - 1)),
]
KINDS: list[st.SearchStrategy[Any]] = [
    st.builds(Send, CHANNEL, PATIENCE),
    st.builds(Receive, CHANNEL, PATIENCE),
    selects(["value", "room"]),
    selects(["value", "room", "event", "deferred", "end", "time"]),
    selects(["event", "deferred", "end", "time"]),
    st.builds(WaitFor, EVENT, PATIENCE),
    st.builds(Sleep, st.integers(0, 2)),
    *AT_ONCE,
]


def programs(kinds: list[st.SearchStrategy[Any]]) -> st.SearchStrategy[list[Any]]:
    """Of a few kinds of steps, so that they meet each other often."""
    step = st.one_of(kinds)
    holds = st.builds(
        Hold, st.integers(0, 1), st.lists(step, max_size=3), st.just(None) | PATIENCE
    )
    return st.lists(
        st.tuples(
            # In a task; with await.
            st.booleans() | st.just(True),
            st.booleans(),
            st.lists(step | step | holds, min_size=1, max_size=8)
            | st.lists(step, min_size=1, max_size=8),
        ),
        min_size=2,
        max_size=ACTORS,
    )


# All calls of a list before an actor runs, or with the resumed actors in between.
INTERFERENCE = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(
            st.one_of(*AT_ONCE, st.builds(Advance, st.integers(0, 2))), max_size=4
        ),
    ),
    max_size=6,
)


@settings(
    max_examples=examples(1_000),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    programs=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).flatmap(programs),
    capacities=st.lists(
        st.sampled_from([0, 0, 1, 2, 3]), min_size=1, max_size=CHANNELS
    ),
    interference=INTERFERENCE,
    together=st.booleans(),
    # Of a channel in a turn.
    at_once=st.sampled_from([1, 1, 2, 256]),
    seed=st.integers(0, 100),
)
# The first select that is resumed meets the other one in between, elsewhere.
@example(
    programs=[
        (
            False,
            False,
            [
                Select([("value", 0)], None),
                Select([("value", 0), ("value", 1)], None),
            ],
        ),
        (
            False,
            False,
            [
                *[Select([("room", each)], None) for each in (0, 0, 1)],
                *[Select([("value", each)], None) for each in (1, 0)],
            ],
        ),
    ],
    capacities=[0, 0],
    interference=[],
    together=True,
    at_once=1,
    seed=0,
)
def test_model(
    programs: list[tuple[bool, bool, list[Any]]],
    capacities: list[int],
    interference: list[tuple[bool, list[Any]]],
    together: bool,
    at_once: int,
    seed: int,
) -> None:
    random.seed(seed)
    with mock.patch.object(channels, "_AT_ONCE_IN_A_TURN", at_once):
        model = Model(capacities)
        # Before any of them runs, so that they know each other.
        model.actors += [Actor(model, *how) for *how, _ in programs]
        starts = [
            partial(actor.start, program)
            for actor, (*_, program) in zip(model.actors, programs, strict=True)
        ]
        if together:
            model.happen(True, starts)
        else:
            for start in starts:
                model.happen(False, [start])
        for in_task, what in interference:
            model.happen(in_task, [partial(each.happen, model) for each in what])
        model.finish()
