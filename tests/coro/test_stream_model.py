"""
A model of streams: what readers get and writers wait for, however the data is cut into
pieces, whatever is cancelled, and in each style.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, NamedTuple
from unittest import mock

from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from twisted.internet.defer import Deferred, DeferredQueue, inlineCallbacks
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from tests.quick import examples
from twisted_rtsig.coro import (
    CoroutineFactory,
    DelimiterNotFound,
    IncompleteRead,
    Stream,
    reading,
    spawn,
    timeout,
)

PATIENCE = 10
HIGH_MARK = 60
PATTERN = rb"[ab]\r?\n|;;"


class Read(NamedTuple):
    """Which method, with which arguments."""

    method: str
    arguments: tuple[Any, ...]

    def start(self, stream: Stream) -> Any:
        return getattr(stream, self.method)(*self.arguments)


LIMITS = st.integers(1, 12)
READS = st.one_of(
    st.builds(Read, st.sampled_from(["read", "peek"]), st.tuples(LIMITS)),
    st.builds(Read, st.just("read_exactly"), st.tuples(st.integers(0, 12))),
    st.builds(Read, st.just("read_line"), st.tuples(LIMITS)),
    st.builds(
        Read,
        st.just("read_until"),
        st.tuples(st.sampled_from([b";", b";;", b"a;a", b"\n", b"\r\n"]), LIMITS),
    ),
    st.builds(Read, st.just("read_until_regex"), st.tuples(st.just(PATTERN), LIMITS)),
)
WORDS = b"a", b"aaa", b"b", b";", b";;", b"a;a", b"\r\n", b"\n", b"\r", b"aaaaaaa\n"
DATA = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(b"".join)


class Outcome(NamedTuple):
    """
    What a read ends with: data, or an error; and how much of what was there it
    takes.
    """

    what: Any
    taken: int


def outcome(read: Read, there: bytes, end: type[Exception] | None) -> Outcome | None:
    """
    The rules of reading, on all that has arrived and was not read; None if more
    is needed.

    :param end: with what the connection was lost.
    """
    *what, limit = read.arguments
    if read.method in ("read", "peek"):
        if there:
            part = there[:limit]
            return Outcome(part, len(part) if read.method == "read" else 0)
        if end is not None:
            return Outcome(b"" if end is ConnectionDone else end, 0)
        return None
    found = MODELS[read.method](there, *what, limit)
    if found is None and end is not None:
        if not there and end is not ConnectionDone:
            return Outcome(end, 0)
        return Outcome((IncompleteRead, there), len(there))
    return found


TOO_LONG = Outcome(DelimiterNotFound, 0)


def exactly(there: bytes, size: int) -> Outcome | None:
    return Outcome(there[:size], size) if len(there) >= size else None


def line(there: bytes, limit: int) -> Outcome | None:
    before, newline, _ = there.partition(b"\n")
    text = before.removesuffix(b"\r")
    if len(text) > limit or (not newline and len(before) > limit + 1):
        return TOO_LONG
    return Outcome(text, len(before) + 1) if newline else None


def until(there: bytes, delimiter: bytes, limit: int) -> Outcome | None:
    before, found, _ = there.partition(delimiter)
    if found and len(before) <= limit:
        return Outcome(before, len(before) + len(delimiter))
    return TOO_LONG if len(there) >= limit + len(delimiter) else None


def until_match(there: bytes, pattern: bytes, limit: int) -> Outcome | None:
    match = re.search(pattern, there[:limit])
    if match is not None:
        return Outcome(there[: match.end()], match.end())
    return TOO_LONG if len(there) >= limit else None


MODELS: dict[str, Callable[..., Outcome | None]] = {
    "read_exactly": exactly,
    "read_line": line,
    "read_until": until,
    "read_until_regex": until_match,
}


class Script:
    """
    A handler in three styles, which are to do the same: what it is to read, and
    what it has got.
    """

    stream: Stream

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.reads: DeferredQueue[Read] = DeferredQueue()
        self.results: list[Any] = []

    def fails(self, error: Exception) -> None:
        if isinstance(error, IncompleteRead):
            self.results.append((IncompleteRead, error.partial))
        elif isinstance(error, DeferredTimeoutError):
            self.results.append(TimeoutError)
        else:
            self.results.append(type(error))

    async def async_def(self, stream: Stream) -> None:
        self.stream = stream
        while True:
            read = await self.reads.get()
            try:
                with timeout(PATIENCE):
                    self.results.append(await read.start(stream))
            except Exception as error:
                self.fails(error)

    def generator(self, stream: Stream) -> Generator[Any, Any, None]:
        self.stream = stream
        while True:
            read = yield self.reads.get()
            try:
                with timeout(PATIENCE):
                    self.results.append((yield read.start(stream)))
            except Exception as error:
                self.fails(error)

    @inlineCallbacks
    def inline_callbacks(self, stream: Stream) -> Generator[Any, Any, None]:
        """Without a task, and so without ``timeout``."""
        self.stream = stream
        while True:
            read = yield self.reads.get()
            try:
                reading = read.start(stream).addTimeout(PATIENCE, self.clock)
                self.results.append((yield reading))
            except Exception as error:
                self.fails(error)


class StreamMachine(RuleBasedStateMachine):
    """Drives a stream over a transport in memory, beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = mock.patch.multiple(
            reading, _HIGH_MARK=HIGH_MARK, _LOW_MARK=HIGH_MARK // 2
        )
        self.marks.start()
        self.clock = Clock()
        self.script = Script(self.clock)
        # What is to come of it.
        self.unread = b""
        self.end: type[Exception] | None = None
        self.lost = False
        self.asked: deque[Read] = deque()
        self.expected: list[Any] = []
        self.resumed = False
        self.written = b""
        self.full = False
        self.waiting: list[Deferred[None]] = []

    @initialize(
        style=st.sampled_from(["async_def", "generator", "inline_callbacks"]),
        reads_in_a_turn=st.sampled_from([3, 256, 256]),
    )
    def connect(self, style: str, reads_in_a_turn: int) -> None:
        self.budget = mock.patch.object(reading, "_READS_IN_A_TURN", reads_in_a_turn)
        self.budget.start()
        self.has_budget = reads_in_a_turn == 3
        # A task that was resumed runs when the one that has done it waits.
        self.is_task = style != "inline_callbacks"
        handler = getattr(self.script, style)
        self.factory = CoroutineFactory(handler, reactor=self.clock)
        self.protocol: Any = self.factory.buildProtocol(None)
        self.transport = StringTransport()
        self.protocol.makeConnection(self.transport)

    def teardown(self) -> None:
        if not self.lost:
            self.protocol.connectionLost(Failure(ConnectionDone()))
        # Under inlineCallbacks, a read that is cancelled would look like another
        # error to the script.
        self.everybody_runs()
        self.factory.stop(0)
        self.everybody_runs()
        assert not self.factory.connections
        assert not self.clock.getDelayedCalls()
        self.budget.stop()
        self.marks.stop()

    # What happens, to the stream and in the model

    def arrives(self, data: bytes) -> None:
        self.protocol.dataReceived(data)
        self.unread += data
        self.head_may_be_done()

    def time_passes(self, data: bytes) -> None:
        self.clock.advance(PATIENCE)
        if self.asked and not self.resumed:
            self.asked.popleft()
            self.head_is_done(TimeoutError)

    def head_may_be_done(self) -> None:
        if self.asked and not self.resumed:
            found = outcome(self.asked[0], self.unread, self.end)
            if found is not None:
                self.asked.popleft()
                self.unread = self.unread[found.taken :]
                self.head_is_done(found.what)

    def head_is_done(self, what: Any) -> None:
        self.expected.append(what)
        self.resumed = self.is_task
        self.head_may_be_done()

    def everybody_runs(self) -> None:
        while any(call.getTime() <= self.clock.seconds() for call in self.calls()):
            self.clock.advance(0)
        while self.resumed:
            self.resumed = False
            self.head_may_be_done()

    def calls(self) -> Any:
        return self.clock.getDelayedCalls()

    # Rules

    @rule(data=DATA, pieces=st.sampled_from([1, 2, 60, 60]))
    def data_arrives(self, data: bytes, pieces: int) -> None:
        for start in range(0, len(data), pieces):
            self.arrives(data[start : start + pieces])
            self.everybody_runs()

    @rule(data=DATA, reads=st.lists(READS, min_size=1, max_size=5))
    def a_piece_is_read(self, data: bytes, reads: list[Read]) -> None:
        """One that the buffer need not put behind another."""
        if self.unread and not self.asked:
            self.asks([Read("read", (1 << 16,))])
        self.arrives(data)
        self.everybody_runs()
        self.asks(reads)

    @rule(reads=st.lists(READS, min_size=1, max_size=5))
    def reads(self, reads: list[Read]) -> None:
        self.asks(reads)

    def asks(self, reads: list[Read]) -> None:
        for read in reads:
            self.script.reads.put(read)
            self.asked.append(read)
            self.head_may_be_done()
            self.everybody_runs()

    @rule()
    def gives_up(self) -> None:
        self.time_passes(b"")
        self.everybody_runs()

    @precondition(lambda self: not self.has_budget)
    @rule(
        what=st.lists(
            st.tuples(st.sampled_from(["arrives", "arrives", "time_passes"]), DATA),
            min_size=2,
            max_size=4,
        )
    )
    def much_at_once(self, what: list[tuple[str, bytes]]) -> None:
        """Before the reader runs, which was resumed by the first of it."""

        def happen() -> None:
            for method, data in what:
                getattr(self, method)(data)

        spawn(happen, reactor=self.clock).result()
        self.everybody_runs()

    @precondition(lambda self: not self.lost)
    @rule(how=st.sampled_from(["half close", "closed", "reset"]))
    def ends(self, how: str) -> None:
        if how == "half close":
            self.end = ConnectionDone
            self.protocol.readConnectionLost()
        else:
            self.lost = True
            self.end = ConnectionDone if how == "closed" else ConnectionLost
            self.protocol.connectionLost(Failure(self.end()))
            self.full = False
            for writing in self.waiting:
                assert isinstance(writing.result, Failure)
            self.waiting.clear()
        self.head_may_be_done()
        self.everybody_runs()

    @precondition(lambda self: not self.lost)
    @rule(full=st.booleans())
    def room(self, full: bool) -> None:
        self.full = full
        producer = self.transport.producer
        assert producer is not None
        if full:
            producer.pauseProducing()
        else:
            producer.resumeProducing()
            for writing in self.waiting:
                assert writing.called
            self.waiting.clear()

    @rule(data=DATA, cancel=st.booleans())
    def writes(self, data: bytes, cancel: bool) -> None:
        writing = self.script.stream.write(data)
        if not self.lost:
            self.written += data
        assert writing.called == (self.lost or not self.full)
        if cancel:
            # What is written cannot be taken back.
            writing.addErrback(lambda _: None).cancel()
        elif not writing.called:
            self.waiting.append(writing)

    @invariant()
    def as_in_the_model(self) -> None:
        assert self.script.results == self.expected
        assert self.transport.value() == self.written
        assert not any(writing.called for writing in self.waiting)

    @invariant()
    def the_transport_is_held_up(self) -> None:
        paused = self.transport.producerState == "paused"
        if self.asked or len(self.unread) <= HIGH_MARK // 2:
            assert not paused


RANDOM_PROGRAMS = settings(
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=examples(300),
    stateful_step_count=30,
)


def test_model() -> None:
    """
    Nothing is lost, doubled or reordered; each read ends as soon as it can, with
    what it should; what is cancelled leaves everything as it was.
    """
    stateful.run_state_machine_as_test(StreamMachine, settings=RANDOM_PROGRAMS)
