"""
A model of the stream transports on a scripted notifier: the data that they read and
send, in any order of events.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple, NoReturn

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
    ConnectionAborted,
    ConnectionDone,
    ConnectionFdescWentAway,
    ConnectionLost,
)
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import alsoProvides

from tests.models import run_model
from tests.scripted_notifier import FAKE, StreamNotifier, StreamSocket
from tests.support import dispose
from tests.test_engine import LoggedFailures
from twisted_rtsig.engine import transports
from twisted_rtsig.engine.reactor import EngineReactor
from twisted_rtsig.engine.transports import StreamTransport
from twisted_rtsig.notifiers import READ, WRITE, Event

DESCRIPTORS = [FAKE, FAKE + 1, FAKE + 2]
AT_ONCE = 4
"""The size of a read.  A send may take a little more."""


class Action(NamedTuple):
    """
    Something that happens to the stream with the index ``which``, in an amount of
    ``size``.
    """

    what: str
    which: int
    size: int


PEER = ["peer sends"] * 4 + ["peer reads", "peer ends", "peer resets", "urgent data"]
APPLICATION = [
    *["write"] * 4,
    "write pieces",
    "pause",
    "resume",
    "renew",
    "lose connection",
    "lose write connection",
    "abort",
    "replace",
    "replace behind its back",
    *["fill the buffer"] * 3,
    "interrupt its send",
]
WITHIN_A_CALL = [*["fail"] * 2, *["iterate"] * 4]


def actions(what: list[str]) -> st.SearchStrategy[Action]:
    return st.builds(
        Action, st.sampled_from(what), st.integers(0, 7), st.integers(1, 10)
    )


class Talk(Protocol):
    """
    The application at one stream, and the model's knowledge of it.

    :ivar written: all data that it has written and that must be sent.
    :ivar received: all data that it has received.
    :ivar reads: how often it was read from since the last wait.
    :ivar meets_the_reset: its last send came after the peer's reset.
    :ivar reading: it has neither paused nor seen the end.
    :ivar closing: it has closed the connection, which first sends everything.
    :ivar half_closing: it has closed the direction in which it sends.
    :ivar aborted: it has aborted the connection.
    :ivar over: the connection is lost, and nothing may be called any more.
    :ivar forgotten: its descriptor was closed, and belongs to another stream.
    :ivar interrupted: an interrupt comes just after its next send.
    :ivar why: the reason for a disconnection, as long as that is due.
    :ivar plans: the actions of its next calls.
    """

    transport: Any

    written = b""
    received = b""
    reads = 0
    meets_the_reset = False
    reading = True
    closing = False
    half_closing = False
    aborted = False
    over = False
    forgotten = False
    interrupted = False
    why: BaseException | type[Exception] | None = None

    def __init__(self, machine: StreamMachine, descriptor: int) -> None:
        self.machine = machine
        self.socket = StreamSocket(machine.notifier, descriptor)
        self.plans: list[Action] = []

    def dataReceived(self, data: bytes) -> None:
        self.machine.is_given(self, data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.machine.is_lost(self, reason)

    # IHalfCloseableProtocol, which only some protocols provide.

    def readConnectionLost(self) -> None:
        self.machine.has_read_all(self)

    def writeConnectionLost(self) -> None:
        self.machine.has_sent_all(self)


class StreamMachine(RuleBasedStateMachine):
    """
    Drives a reactor with streams, and a model of the data that their peers have sent
    and that the application has written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log = LoggedFailures()
        self.notifier = StreamNotifier()
        self.reactor = EngineReactor(self.notifier)
        # The kernel does not know the scripted sockets.
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(transports, "bytes_to_read", self.bytes_to_read)
        self.notifier.on_events = self.wait_returns
        self.talks: list[Talk] = []
        self.bytes: Iterator[int] = itertools.cycle(range(251))
        self.writing = False
        # How many passes are nested, and how many events the last wait has reported.
        self.depth = 0
        self.reported = 0
        # The streams that have data to send at the end of the pass, in that order.  The
        # order is unknown after an interrupt.
        self.queue: list[Talk] = []
        self.order_is_known = True
        self.sent_from_queue = False
        # The stream that sends at present, and how many more sends it may make at once
        # if its data is longer than one send takes.
        self.turn_of: Talk | None = None
        self.left_of_turn = 0
        self.to_be_logged: list[BaseException] = []
        # If a call failed an assertion, the engine would only log it.
        self.violations: list[str] = []

    def teardown(self) -> None:
        for talk in self.talks:
            talk.over = True
            self.notifier.files.pop(talk.socket.descriptor, None)
        self.reactor.removeAll()
        dispose(self.reactor)
        self.patches.undo()
        self.log.stop()

    def bytes_to_read(self, descriptor: int) -> int | None:
        for talk in self.talks:
            if talk.socket.descriptor == descriptor:
                return talk.socket.bytes_to_read()
        return None

    # Events of the streams

    def connect(
        self,
        descriptor: int,
        edges: int = READ | WRITE,
        fast: bool = True,
        half_closeable: bool = False,
    ) -> None:
        talk = Talk(self, descriptor)
        if half_closeable:
            alsoProvides(talk, IHalfCloseableProtocol)
        talk.socket.on_recv = lambda: self.reads(talk)
        talk.socket.on_send = lambda: self.sends(talk)
        talk.socket.on_sent = lambda complete: self.has_sent(talk, complete)
        self.notifier.files[descriptor] = talk.socket
        stream = StreamTransport(talk.socket, talk, self.reactor)
        stream.logstr = f"stream {descriptor}"
        stream.bufferSize = AT_ONCE
        stream.SEND_LIMIT = AT_ONCE + 2
        stream.reads_by_recv = fast
        stream.connected = 1
        talk.transport = stream
        self.talks.append(talk)
        self.notifier.edges = edges
        self.reactor.addReader(stream)

    def fresh(self, size: int) -> bytes:
        return bytes(itertools.islice(self.bytes, size))

    def do(self, action: Action) -> None:
        what, size = action.what, action.size
        talks = [talk for talk in self.talks if not talk.over and not talk.forgotten]
        if what == "iterate":
            if self.depth < 2:
                self.one_pass()
        elif talks:
            talk = talks[action.which % len(talks)]
            method: Callable[[Talk, int], None]
            method = getattr(self, what.replace(" ", "_"))
            method(talk, size)

    def peer_sends(self, talk: Talk, size: int) -> None:
        talk.socket.peer_sends(self.fresh(size))

    def peer_reads(self, talk: Talk, size: int) -> None:
        talk.socket.peer_reads(size)

    def peer_ends(self, talk: Talk, size: int) -> None:
        talk.socket.peer_ends()

    def peer_resets(self, talk: Talk, size: int) -> None:
        talk.socket.peer_resets()

    def urgent_data(self, talk: Talk, size: int) -> None:
        self.notifier.distrust(talk.socket.descriptor)

    def fill_the_buffer(self, talk: Talk, size: int) -> None:
        """The kernel is short of memory: the room is less than the peer has made."""
        talk.socket.room = size % 4
        talk.socket.peer_reads(0)

    def interrupt_its_send(self, talk: Talk, size: int) -> None:
        """Then the engine does not know how much was sent."""
        talk.interrupted = True

    def write(self, talk: Talk, size: int) -> None:
        self.write_by(talk, talk.transport.write, self.fresh(size))

    def write_pieces(self, talk: Talk, size: int) -> None:
        pieces = [self.fresh(1) for _ in range(size)]
        self.write_by(talk, talk.transport.writeSequence, pieces)

    def write_by(self, talk: Talk, method: Any, data: bytes | list[bytes]) -> None:
        if talk.closing or talk.half_closing:
            # The data may be sent or not.
            return
        if not talk.aborted:
            talk.written += data if isinstance(data, bytes) else b"".join(data)
            self.queues_up(talk)
        self.writing = True
        method(data)
        self.writing = False

    def queues_up(self, talk: Talk) -> None:
        registration = self.notifier.watched.get(talk.socket.descriptor)
        waits_for_room = (
            registration is not None and registration.writer is talk.transport
        )
        if not waits_for_room and talk not in self.queue:
            self.queue.append(talk)

    def pause(self, talk: Talk, size: int) -> None:
        talk.transport.pauseProducing()
        talk.reading = False

    def resume(self, talk: Talk, size: int) -> None:
        if not (talk.closing or talk.aborted):
            talk.reading = True
            talk.transport.resumeProducing()

    def renew(self, talk: Talk, size: int) -> None:
        self.pause(talk, size)
        self.resume(talk, size)

    def lose_connection(self, talk: Talk, size: int) -> None:
        if not talk.aborted:
            talk.closing = True
            talk.reading = False
            self.queues_up(talk)
            talk.transport.loseConnection()

    def lose_write_connection(self, talk: Talk, size: int) -> None:
        if not (talk.closing or talk.half_closing or talk.aborted):
            talk.half_closing = True
            self.queues_up(talk)
            talk.transport.loseWriteConnection()

    def abort(self, talk: Talk, size: int) -> None:
        talk.aborted = True
        talk.reading = False
        talk.transport.abortConnection()

    def replace(self, talk: Talk, size: int) -> None:
        descriptor = talk.socket.descriptor
        talk.why = ConnectionDone
        talk.transport.connectionLost(Failure(ConnectionDone()))
        # Another stream may have taken the descriptor already.
        if descriptor != -1 and descriptor not in self.notifier.files:
            self.connect(descriptor)

    def replace_behind_its_back(self, talk: Talk, size: int) -> None:
        descriptor = talk.socket.descriptor
        talk.forgotten = True
        talk.reading = False
        talk.socket.close()
        self.connect(descriptor)

    # Calls by the engine

    def wait_returns(self, events: Sequence[Event]) -> None:
        self.reported = len(events)
        self.sent_from_queue = False
        self.turn_of = None
        for talk in self.talks:
            talk.reads = 0

    def reads(self, talk: Talk) -> None:
        self.expect(talk.reading, "it reads from a paused stream")
        if talk.meets_the_reset:
            # A send has failed.  Data that has arrived is read before the loss.
            return
        self.expect(not self.sent_from_queue, "it sends before all streams were read")
        talk.reads += 1
        # Up to four reads after a full read of the pass before.  Up to four more for an
        # event, if more data has arrived since those have emptied the socket.
        self.expect(talk.reads <= 4 + 4, "it reads too often from one stream")

    def sends(self, talk: Talk) -> None:
        self.expect(not self.writing, "it sends within write()")
        self.expect(not talk.aborted, "it sends after abortConnection()")
        talk.meets_the_reset = talk.socket.reset
        if talk not in self.queue:
            return
        self.sent_from_queue = True
        place = self.queue.index(talk)
        if talk is self.turn_of and self.left_of_turn:
            self.left_of_turn -= 1
            del self.queue[place]
            return
        self.turn_of, self.left_of_turn = talk, 4 - 1
        before, self.queue = self.queue[:place], self.queue[place + 1 :]
        if self.order_is_known:
            waiting = [
                each
                for each in before
                if each.socket.sent != each.written
                and not (each.over or each.aborted or each.forgotten)
            ]
            self.expect(not waiting, "a stream sends out of turn")

    def has_sent(self, talk: Talk, complete: bool) -> None:
        if talk.interrupted:
            self.fail(talk, KeyboardInterrupt("send"))
        if complete and talk.socket.sent != talk.written:
            # The data is longer than one turn.  The rest goes behind the other streams.
            self.queues_up(talk)
        else:
            self.turn_of = None

    def is_given(self, talk: Talk, data: bytes) -> None:
        self.expect(
            talk.reading and not talk.over, "a stream that is paused or lost gets data"
        )
        talk.received += data
        right = talk.socket.arrived.startswith(talk.received)
        self.expect(right, f"{talk.received!r} is not {talk.socket.arrived!r}")
        self.follow_plan(talk)

    def follow_plan(self, talk: Talk) -> None:
        if not talk.plans:
            return
        action = talk.plans.pop(0)
        if action.what != "fail":
            self.do(action)
            return
        kinds = [ValueError, KeyboardInterrupt, SystemExit]
        if not talk.over:
            self.fail(talk, kinds[action.size % 3]("the application"))

    def fail(self, talk: Talk, error: BaseException) -> NoReturn:
        self.to_be_logged.append(error)
        talk.why = error
        raise error

    def has_read_all(self, talk: Talk) -> None:
        self.expect(talk.reading, "a paused stream gets the end")
        self.expect(talk.socket.ended, "the end comes early")
        self.expect(talk.received == talk.socket.arrived, "something was not read")
        talk.reading = False

    def has_sent_all(self, talk: Talk) -> None:
        self.expect(talk.half_closing, "the application has not half closed it")
        self.expect(talk.socket.sent == talk.written, "something was not sent")
        # It must not be called twice.
        talk.half_closing = False
        talk.closing = True

    def is_lost(self, talk: Talk, reason: Failure) -> None:
        self.expect(not talk.over, "lost twice")
        talk.over = True
        reading, talk.reading = talk.reading, False
        socket, why = talk.socket, talk.why
        if isinstance(why, BaseException):
            right = reason.value is why
        elif why is not None:
            right = bool(reason.check(why))
        elif reason.check(ConnectionAborted):
            right = talk.aborted
        elif reason.check(ConnectionFdescWentAway):
            right = talk.forgotten
        elif reason.check(ConnectionLost):
            right = socket.reset and (socket.all_is_read() or not reading)
        else:
            assert reason.check(ConnectionDone)
            all_read = socket.ended and talk.received == socket.arrived
            all_sent = talk.closing and talk.socket.sent == talk.written
            half_closes = IHalfCloseableProtocol.providedBy(talk)
            right = all_sent or (all_read and not half_closes)
        self.expect(right, f"lost for no reason: {reason.value!r}")
        self.follow_plan(talk)

    def expect(self, truth: bool, violation: str) -> None:
        if not truth:
            self.violations.append(violation)

    def one_pass(self) -> None:
        self.depth += 1
        try:
            self.reactor.runUntilCurrent()
            self.reactor.doIteration(None)
        except KeyboardInterrupt as error:
            self.expect(str(error) == "wait", f"it escapes: {error!r}")
            self.order_is_known = False
        finally:
            self.depth -= 1

    # Rules

    @initialize(
        edges=st.lists(
            st.sampled_from([READ | WRITE] * 3 + [READ, 0]), min_size=3, max_size=3
        ),
        fast=st.lists(st.sampled_from([True] * 3 + [False]), min_size=3, max_size=3),
    )
    def a_stream_on_each_descriptor(self, edges: list[int], fast: list[bool]) -> None:
        for descriptor, each, quick in zip(DESCRIPTORS, edges, fast, strict=True):
            self.connect(descriptor, each, quick, half_closeable=descriptor == FAKE)

    @precondition(lambda self: any(n not in self.notifier.files for n in DESCRIPTORS))
    @rule(
        edges=st.sampled_from([READ | WRITE, READ, 0]),
        fast=st.booleans(),
        half_closeable=st.booleans(),
    )
    def another(self, edges: int, fast: bool, half_closeable: bool) -> None:
        free = [
            descriptor
            for descriptor in DESCRIPTORS
            if descriptor not in self.notifier.files
        ]
        self.connect(free[0], edges, fast, half_closeable)

    @rule(action=actions(PEER + APPLICATION))
    def act(self, action: Action) -> None:
        self.do(action)

    @rule(
        sizes=st.lists(st.integers(0, 3 * AT_ONCE), min_size=3, max_size=3),
        plans=st.lists(
            st.tuples(st.integers(0, 2), actions(PEER + APPLICATION + WITHIN_A_CALL)),
            max_size=5,
        ),
        trouble=st.sampled_from([None] * 8 + [True, False]),
        random=st.randoms(use_true_random=False),
        hold=st.booleans(),
    )
    def busy_pass(
        self,
        sizes: list[int],
        plans: list[tuple[int, Action]],
        trouble: bool | None,
        random: Random,
        hold: bool,
    ) -> None:
        """Many things happen at once, and calls perform actions in between."""
        self.notifier.random = random
        self.notifier.hold = hold
        talks = [talk for talk in self.talks if not talk.over and not talk.forgotten]
        for talk, size in zip(talks, sizes, strict=False):
            if size:
                talk.socket.peer_sends(self.fresh(size))
        for which, action in plans:
            if talks:
                talks[which % len(talks)].plans.append(action)
        if trouble is not None:
            self.notifier.raises = KeyboardInterrupt("wait"), trouble
        self.one_pass()

    @rule()
    def in_the_end_all_is_read_and_sent(self) -> None:
        self.notifier.random = Random(0)
        self.notifier.hold = False
        self.notifier.raises = None
        for talk in self.talks:
            talk.plans.clear()
            talk.socket.peer_reads(1000)
        for _ in range(50):
            self.one_pass()
            if self.notifier.is_quiet() and not self.reported:
                break
        else:
            self.expect(False, "it does not go to sleep")
        self.queue.clear()
        self.order_is_known = True
        for talk in self.talks:
            if talk.over or talk.forgotten:
                continue
            socket = talk.socket
            socket.room = 10
            self.expect(not talk.aborted, "it is not aborted")
            self.expect(socket.reset or socket.sent == talk.written, "it is not sent")
            if talk.reading:
                told = not socket.ended and not socket.reset
                self.expect(told, "it is not told of the end")
                self.expect(talk.received == socket.arrived, "it is not read")

    @invariant()
    def all_is_well(self) -> None:
        assert self.violations + self.notifier.complaints == []
        assert self.log.take() == self.to_be_logged
        self.to_be_logged.clear()
        for talk in self.talks:
            assert talk.written.startswith(talk.socket.sent)
            assert talk.forgotten or not (talk.why and not talk.over)
        readers = {talk.transport for talk in self.talks if talk.reading}
        assert set(self.reactor.getReaders()) == {self.reactor.waker, *readers}
        self.talks = [talk for talk in self.talks if not talk.over]


def test_the_streams_agree_with_the_model() -> None:
    """
    No data is lost, doubled or out of order in either direction, and no protocol is
    called after its connection was lost.
    """
    run_model(StreamMachine, examples=200, steps=25)
