"""
The engine: a reactor that records which descriptors are read and written, and lets a
notifier find out when they are ready.

The subclasses are a few lines each: they choose the notifier.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from twisted.internet.error import ConnectionFdescWentAway
from twisted.internet.interfaces import IReactorDaemonize, IReactorFDSet
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.udp import Port
from twisted.logger import Logger
from twisted.python import context, log
from zope.interface import implementer

from twisted_rtsig.engine.datagrams import DatagramReactor
from twisted_rtsig.engine.processes import ProcessReactor
from twisted_rtsig.engine.standard_io import StandardIOReactor
from twisted_rtsig.engine.timers import TimerReactor
from twisted_rtsig.engine.transports import (
    NOT_WRITING,
    ONE_CHUNK,
    QUEUED,
    REGISTERED,
    StreamReactor,
    StreamTransport,
)
from twisted_rtsig.notifiers import (
    GONE,
    HANGUP,
    READ,
    WRITE,
    Event,
    Notifier,
    Registration,
)

# What a connection that has much to read may have before others get their turn:
# 256 KiB, with Twisted's size of a read.
_READS_IN_A_ROW = 4

# After so many passes in a row that report a hang-up or an error of a descriptor and
# nothing else, and that leave it there, its selectable is disconnected: reading and
# writing do not clear the condition, and the loop would spin.  Twisted's epoll reactor
# disconnects at once, and takes an error that one read clears (an ICMP message, say)
# for a lost connection.  More than two, since a reader may cause the next such error.
_HANG_UPS_IN_A_ROW = 10

_LOST = "File descriptor lost"

LogContext = dict[Any, Any]

# What Twisted's main loop logs to.
_log = Logger(namespace="twisted.internet.base")


def _observed(
    wait: Callable[[float | None, Any], Any],
    begins: Callable[[], None],
    ends: Callable[[], None],
) -> Callable[[float | None, Any], Any]:
    """``Notifier.wait`` between two passes that are observed."""

    def observed_wait(delay: float | None, unchecked: Any) -> Any:
        ends()
        try:
            return wait(delay, unchecked)
        finally:
            begins()

    return observed_wait


def _reads_errors(reader: Any) -> bool:
    """
    Whether ``reader`` takes each error away and tells its protocol, which may cause the
    next one at once: a datagram port that is connected.  Others get errors only through
    an error queue that they do not read (IP_RECVERR in ip(7)).
    """
    return isinstance(reader, Port) and bool(reader._connectedAddr)


@implementer(IReactorFDSet, IReactorDaemonize)
class EngineReactor(
    StreamReactor, DatagramReactor, ProcessReactor, StandardIOReactor, TimerReactor
):
    """
    A reactor over any notifier.

    Interest is kept by selectable, since ``fileno()`` may have turned -1 by the
    time of ``removeReader``, and by descriptor, since that is what the kernel
    knows.  Both lead to the same registration.

    One descriptor has at most one reader and one writer.  When another
    selectable comes with a number that is still registered, then the former
    owner has either closed it, or wants only the other direction; it keeps
    that one if it still has the number.
    """

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._registrations: dict[int, Registration] = {}
        self._reading: dict[Any, Registration] = {}
        self._writing: dict[Any, Registration] = {}
        self._unchecked: dict[Registration, int] = {}
        # Streams with something to send at the end of the pass, in order.
        self._queued: list[StreamTransport] = []
        # Those of the pass under way, the next one last.
        self._sending: list[StreamTransport] = []
        # Streams to be read from in the next pass, and the next, until there is
        # nothing left; in order, and each but once.
        self._read_on: dict[Registration, None] = {}
        # Those whose read in the last pass returned all that it asked for.
        self._full: set[Registration] = set()
        # What the pass under way has not come to yet.
        self._plain_input: Iterator[Registration] = iter(())
        self._reading_on: Iterator[Registration] = iter(())
        self._events: Iterator[Event] = iter(())
        # The registration being dispatched.
        self._dispatched: Registration | None = None
        # In how many passes in a row nothing but a hang-up was reported, and stayed.
        self._hung_up: dict[Registration, int] = {}
        # By observer, what is called when a pass begins and when it ends.
        self._pass_observers: dict[
            object, tuple[Callable[[], None], Callable[[], None]]
        ] = {}
        self._waiting = False
        self._dispatching = False
        # Of the main loop, while it calls doIteration.
        self._fields: LogContext | None = None
        super().__init__()

    # IReactorFDSet

    def addReader(self, reader: Any) -> None:
        """
        Call ``reader.doRead`` whenever there is something to read.

        :raises ValueError: if its descriptor is negative.
        :raises OSError: if its descriptor cannot be watched.
        """
        registration = self._registration_for(reader, READ)
        if registration.reader is not reader:
            self._attach_reader(registration, reader)

    def addWriter(self, writer: Any) -> None:
        """
        Call ``writer.doWrite`` whenever there is room to write.

        :raises ValueError: if its descriptor is negative.
        :raises OSError: if its descriptor cannot be watched.
        """
        registration = self._registration_for(writer, WRITE)
        if registration.writer is not writer:
            self._attach_writer(registration, writer)

    def removeReader(self, reader: Any) -> None:
        """Stop to call ``reader.doRead``, also in the pass under way."""
        registration = self._reading.pop(reader, None)
        if registration is not None:
            registration.reader = None
            self._interest_ends(registration, READ)

    def removeWriter(self, writer: Any) -> None:
        """Stop to call ``writer.doWrite``, also in the pass under way."""
        if isinstance(writer, StreamTransport):
            writer.write_state = NOT_WRITING
        registration = self._writing.pop(writer, None)
        if registration is not None:
            registration.writer = None
            self._interest_ends(registration, WRITE)
            if self._held_ends:
                self._has_written(writer)

    def removeAll(self) -> list[Any]:
        """Remove all readers and writers but the reactor's own; return them."""
        readers = self.getReaders()
        self._held_ends.clear()
        removed: list[Any] = self._removeAll(readers, self.getWriters())
        return removed

    def getReaders(self) -> list[Any]:
        """All readers, the reactor's own included."""
        held = [reader for reader, _ in self._held_ends.values()]
        return list(dict.fromkeys([*self._reading, *held]))

    def getWriters(self) -> list[Any]:
        """All writers, also those that only wait for the end of the pass."""
        queued = [
            each
            for each in (*self._sending, *self._queued)
            if each.write_state in (ONE_CHUNK, QUEUED)
        ]
        return [*self._writing, *dict.fromkeys(queued)]

    # Streams

    def begin_reading(self, stream: StreamTransport) -> None:
        """
        As ``addReader``, of a stream that is new, and whose descriptor as a rule is.

        :raises OSError: if its descriptor cannot be watched.
        """
        descriptor = stream.fileno()
        if descriptor in self._registrations or descriptor < 0:
            self.addReader(stream)
            return
        registration = Registration(descriptor, stream.origin, stream.tells_drained)
        registration.interest = READ
        self._notifier.watch(registration)
        registration.reader = stream
        self._registrations[descriptor] = self._reading[stream] = registration
        self._unchecked[registration] = READ
        if self._waiting:
            self.wakeUp()

    def look_again(self, stream: StreamTransport) -> None:
        """There may be more to read than ``stream`` has read."""
        registration = self._reading.get(stream)
        if registration is not None:
            self._mark_unchecked(registration, READ)

    def is_reading(self, stream: StreamTransport) -> bool:
        """Whether ``stream`` is a reader: it is connected and not paused."""
        return stream in self._reading

    def write_soon(self, stream: StreamTransport) -> None:
        """
        Call ``stream.doWrite`` at the end of the pass, whether the kernel has
        room or not, unless it waits for room already.
        """
        stream.write_state = QUEUED
        self._queued.append(stream)
        if self._waiting:
            self.wakeUp()

    # Registrations

    def _registration_for(self, selectable: Any, direction: int) -> Registration:
        """The registration of ``selectable`` and its descriptor, begun if need be."""
        descriptor: int = selectable.fileno()
        known = (self._reading if direction == READ else self._writing).get(selectable)
        if known is not None:
            if known.descriptor == descriptor:
                return known
            # It has another descriptor now than when it was added.
            if direction == READ:
                self.removeReader(selectable)
            else:
                self.removeWriter(selectable)
        if descriptor < 0:
            raise ValueError(
                f"{selectable!r} has no descriptor to watch: its fileno() is "
                f"{descriptor}; add it before it is closed, not after"
            )
        registration = self._registrations.get(descriptor)
        if registration is not None:
            if registration.reader is selectable or registration.writer is selectable:
                return registration
            return self._succeed(registration, selectable, direction)
        return self._begin(descriptor, direction, selectable)

    def _begin(
        self, descriptor: int, interest: int, newcomer: Any, *others: Any
    ) -> Registration:
        if isinstance(newcomer, StreamTransport) and not others:
            registration = Registration(
                descriptor, newcomer.origin, newcomer.tells_drained
            )
        else:
            tells_drained = not others and getattr(newcomer, "tells_drained", False)
            registration = Registration(descriptor, tells_drained=tells_drained)
        registration.interest = interest
        self._notifier.watch(registration)
        self._registrations[descriptor] = registration
        return registration

    def _succeed(
        self, former: Registration, newcomer: Any, direction: int
    ) -> Registration:
        """
        ``newcomer`` brings a descriptor that ``former`` holds.  The number may
        have been closed and reused, so that nothing the kernel was told about
        it counts any more: begin again, with the owners that still have it.
        """
        reader, writer = former.reader, former.writer
        descriptor = former.descriptor
        if reader is not None:
            self.removeReader(reader)
        if writer is not None:
            self.removeWriter(writer)
        if reader is not None and not self._still_has(reader, descriptor):
            reader = None
        if writer is not None and not self._still_has(writer, descriptor):
            writer = None
        owners = [each for each in (reader, writer) if each is not None]
        interest = direction
        if reader is not None:
            interest |= READ
        if writer is not None:
            interest |= WRITE
        try:
            registration = self._begin(descriptor, interest, newcomer, *owners)
        except OSError:
            for owner in dict.fromkeys(owners):
                log.callWithLogger(
                    owner,
                    self._disconnectSelectable,
                    owner,
                    ConnectionFdescWentAway(_LOST),
                    False,
                )
            raise
        if reader is not None:
            self._attach_reader(registration, reader)
        if writer is not None:
            self._attach_writer(registration, writer)
        return registration

    def _still_has(self, owner: Any, descriptor: int) -> bool:
        try:
            number: int = owner.fileno()
        except Exception:
            log.err()
            return False
        return number == descriptor

    def _attach_reader(self, registration: Registration, reader: Any) -> None:
        self._reading.pop(registration.reader, None)
        registration.reader = reader
        self._reading[reader] = registration
        self._interest_begins(registration, READ)

    def _attach_writer(self, registration: Registration, writer: Any) -> None:
        former = registration.writer
        self._writing.pop(former, None)
        if isinstance(former, StreamTransport):
            former.write_state = NOT_WRITING
        if isinstance(writer, StreamTransport):
            writer.write_state = REGISTERED
        registration.writer = writer
        self._writing[writer] = registration
        self._interest_begins(registration, WRITE)

    def _end(self, registration: Registration) -> None:
        del self._registrations[registration.descriptor]
        self._unchecked.pop(registration, None)
        self._notifier.unwatch(registration)

    def _interest_begins(self, registration: Registration, direction: int) -> None:
        if self._hung_up:
            self._hung_up.pop(registration, None)
        if not registration.interest & direction:
            registration.interest |= direction
            self._notifier.update(registration)
        # An edge may have come and gone while nobody was interested.
        self._mark_unchecked(registration, direction)
        if self._waiting:
            # A signal handler, say, which runs in the middle of the sleep.
            self.wakeUp()

    def _interest_ends(self, registration: Registration, direction: int) -> None:
        registration.interest &= ~direction
        if registration.interest:
            self._notifier.update(registration)
            unchecked = self._unchecked.pop(registration, 0) & ~direction
            if unchecked:
                self._unchecked[registration] = unchecked
        else:
            self._end(registration)

    def _mark_unchecked(self, registration: Registration, directions: int) -> None:
        if directions:
            unchecked = self._unchecked
            unchecked[registration] = unchecked.get(registration, 0) | directions

    # The loop

    def mainLoop(self) -> None:
        """Run until stopped; then leave no trace in the process."""
        try:
            self._in_log_context(self._run_passes)
        finally:
            self._notifier.close()

    def _in_log_context(self, function: Callable[..., None], *arguments: Any) -> None:
        """
        Do once for many calls what ``log.callWithLogger`` does for each.

        ``function`` gets the fields, and sets ``"system"`` before each call.
        """
        fields = {"system": "-", **context.get(log.ILogContext)}
        context.call({log.ILogContext: fields}, function, fields, *arguments)

    def _run_passes(self, fields: LogContext) -> None:
        while self._started:
            try:
                while self._started:
                    delay = self._make_calls()
                    self._fields = fields
                    self.doIteration(self.running and delay)
            except BaseException:
                _log.failure("Unexpected error in main loop.")
        _log.info("Main loop terminated.")

    def doIteration(self, delay: float | None) -> None:
        """
        One pass: wait at most ``delay`` seconds (None: for ever), then call
        whoever can read or write.
        """
        fields, self._fields = self._fields, None
        if fields is None:
            # Not called by the main loop, but by iterate(): in any context.
            self._in_log_context(self._pass, delay)
        else:
            self._pass(fields, delay)

    def _pass(self, fields: LogContext, delay: float | None) -> None:
        inside_another = self._dispatching
        if inside_another:
            # Somebody who was called in a pass iterates the reactor.  What that
            # pass has not come to yet is checked anew here.
            self._check_rest_again()
        system = fields["system"]
        try:
            if self._queued:
                self._send_queued(fields)
                fields["system"] = system
                # Who was called may want another pass: by callLater, say.
                delay = 0
            unchecked = self._unchecked
            if unchecked:
                self._unchecked = {}
            read_on = self._read_on
            if read_on:
                self._read_on = {}
                delay = 0
            self._waiting = True
            plain_input, events = self._notifier.wait(delay, unchecked)
            self._waiting = False
            self._dispatching = True
            if events:
                self._events = iter(events)
            if read_on:
                self._reading_on = iter(read_on)
            if plain_input:
                self._plain_input = iter(plain_input)
                self._read_plain_input(fields)
            if read_on:
                self._read_till_empty(fields, self._reading_on)
            if events:
                for registration, ready, disarmed in self._events:
                    self._dispatch(fields, registration, ready, disarmed)
            if self._hung_up:
                self._forget_hang_ups(events)
            if self._queued:
                self._send_queued(fields)
        except BaseException:
            # KeyboardInterrupt out of a signal handler: nobody knows which
            # events the notifier had in hand, and who was being called.
            self._check_all_again()
            raise
        finally:
            self._waiting = False
            self._dispatching = inside_another
            fields["system"] = system

    def _check_all_again(self) -> None:
        for registration in self._registrations.values():
            self._mark_unchecked(registration, registration.interest)
        # Whom the pass has not sent for is the first in the next one.
        self._queued[:0] = reversed(self._sending)
        self._sending.clear()
        self._dispatched = None

    def _check_rest_again(self) -> None:
        """No event will tell of these any more: they were not dispatched."""
        for registration in (*self._plain_input, *self._reading_on):
            self._mark_unchecked(registration, registration.interest)
        for registration, _, _ in self._events:
            self._mark_unchecked(registration, registration.interest)
        if self._dispatched is not None:
            # The other direction of it, or what it disarms.
            self._mark_unchecked(self._dispatched, self._dispatched.interest)

    def _read_plain_input(self, fields: LogContext) -> None:
        # Nearly everything goes through here and through _send_queued, so that
        # they are kept short: ``doRead`` is written out.
        full_before = self._full
        if full_before:
            self._full = set()
        for registration in self._plain_input:
            stream = registration.reader
            if stream is None:
                continue
            fields["system"] = stream.logstr
            if stream.reads_by_recv:
                size = stream.bufferSize
                try:
                    data = stream.socket.recv(size)
                except OSError as error:
                    why = stream.why_lost(error)
                else:
                    if len(data) == size:
                        # Who is watched by level will be told of, if there is
                        # more; but who was full in the pass before as well has
                        # so much that to wait is a waste.
                        if registration.edges or registration in full_before:
                            self._read_on[registration] = None
                        else:
                            self._full.add(registration)
                    try:
                        if data:
                            stream.protocol.dataReceived(data)
                            continue
                        why = CONNECTION_DONE
                    except BaseException:
                        why = sys.exc_info()[1]
                        log.err()
            else:
                try:
                    why = stream.doRead()
                except BaseException:
                    why = sys.exc_info()[1]
                    log.err()
            if why:
                self._disconnect(stream, why, True)

    def _read_till_empty(
        self, fields: LogContext, registrations: Iterable[Registration]
    ) -> None:
        """
        A few reads of each, and others in the next pass if there was something.
        Unlike a short read, a read that would block leaves nothing behind.
        """
        for registration in registrations:
            stream = registration.reader
            if stream is None:
                continue
            fields["system"] = stream.logstr
            read_on = self._read_on
            for _ in range(_READS_IN_A_ROW):
                size = stream.bufferSize
                try:
                    data = stream.socket.recv(size)
                except OSError as error:
                    read_on.pop(registration, None)
                    why = stream.why_lost(error)
                    break
                read_on[registration] = None
                try:
                    why = stream._dataReceived(data)
                except BaseException:
                    why = sys.exc_info()[1]
                    log.err()
                if (
                    why
                    or len(data) < size
                    or registration.reader is not stream
                    # A pass inside of the call has taken it over.
                    or self._read_on is not read_on
                ):
                    break
            if why:
                self._disconnect(stream, why, True)

    def _send_queued(self, fields: LogContext) -> None:
        """Each of those that are queued now; some may queue up again."""
        sending = self._sending
        # Below what the pass around this one, if any, has not come to yet.
        sending[:0] = reversed(self._queued)
        self._queued.clear()
        while sending:
            stream = sending[-1]
            try:
                # An interrupt before this leaves it where it is; one after it
                # is taken for its own.
                del sending[-1]
                if stream.write_state == ONE_CHUNK:
                    data = stream.dataBuffer
                    sent = 0
                    if len(data) <= stream.SEND_LIMIT:
                        try:
                            sent = stream.socket.send(data)
                        except Exception:
                            sent = 0  # doWrite meets the error again.
                    if sent == len(data):
                        stream.dataBuffer = b""
                        stream.write_state = NOT_WRITING
                        continue
                    if sent:
                        # There is no room for more.
                        stream.offset = sent
                        stream.write_state = NOT_WRITING
                        self.addWriter(stream)
                        continue
                elif stream.write_state != QUEUED:
                    # An earlier one has disconnected it, say.
                    continue
                stream.write_state = NOT_WRITING
                fields["system"] = stream.logstr
                why = stream.doWrite()
            except BaseException:
                why = sys.exc_info()[1]
                log.err()
            if why:
                self._disconnect(stream, why, False)

    def _dispatch(
        self, fields: LogContext, registration: Registration, ready: int, disarmed: int
    ) -> None:
        if (
            ready == READ
            and registration.edges & READ
            and registration.tells_drained
            and registration.reader is not None
            and registration.reader.reads_by_recv
        ):
            # Unless this pass has read from it already, and the next will.
            if registration not in self._read_on:
                self._read_till_empty(fields, (registration,))
            return
        around, self._dispatched = self._dispatched, registration
        if ready & (HANGUP | GONE):
            disarmed = READ | WRITE
            hung_up = self._hung_up
            hang_ups = hung_up.pop(registration, 0) + 1
            if ready & registration.interest:
                hang_ups = 0
            if ready & GONE or hang_ups > _HANG_UPS_IN_A_ROW:
                self._abandon(fields, registration, ready)
            else:
                # doRead and doWrite find out what has happened, and report it
                # better than the event could.
                called = self._call(fields, registration, READ | WRITE)
                if (
                    hang_ups
                    and called
                    and not _reads_errors(registration.reader)
                    and self._notifier.is_hung_up(registration)
                ):
                    hung_up[registration] = hang_ups
        else:
            if self._hung_up:
                self._hung_up.pop(registration, None)
            self._call(fields, registration, ready)
            disarmed |= ready
        self._mark_unchecked(registration, disarmed & registration.interest)
        self._dispatched = around

    def _forget_hang_ups(self, events: Sequence[Event]) -> None:
        """Keep the count only of registrations that this pass has reported."""
        reported = {registration for registration, _, _ in events}
        for registration in self._hung_up.keys() - reported:
            del self._hung_up[registration]

    def _call(self, fields: LogContext, registration: Registration, ready: int) -> bool:
        """Call who is interested in what is ready; whether anybody is."""
        called = False
        for direction in (READ, WRITE):
            # Earlier calls of this pass may have ended the interest, or ended
            # it and begun it anew, in which case the event is not for it.
            if (
                ready & registration.interest & direction
                and not self._unchecked.get(registration, 0) & direction
            ):
                called = True
                selectable = (
                    registration.reader if direction == READ else registration.writer
                )
                # Before the call, for a pass inside of it.
                self._mark_unchecked(registration, direction)
                fields["system"] = self._log_prefix(selectable)
                self._read_or_write(selectable, direction)
        return called

    def _log_prefix(self, selectable: Any) -> str:
        try:
            prefix: str = selectable.logPrefix()
        except KeyboardInterrupt:
            raise
        except BaseException:
            prefix = "(buggy logPrefix method)"
            log.err(system=prefix)
        return prefix

    def _read_or_write(self, selectable: Any, direction: int) -> None:
        """Call ``selectable``, and disconnect it if it says so or fails."""
        reading = False
        try:
            # Gives a lost descriptor, or a fileno() that raises, a chance to
            # be noticed, as Twisted's own reactors do.
            if selectable.fileno() == -1:
                why: Any = ConnectionFdescWentAway(_LOST)
            elif direction == READ:
                why = selectable.doRead()
                reading = True
            else:
                why = selectable.doWrite()
        except BaseException:
            why = sys.exc_info()[1]
            log.err()
        if why:
            self._disconnect(selectable, why, reading)

    def _abandon(
        self, fields: LogContext, registration: Registration, ready: int
    ) -> None:
        """Disconnect owners whose descriptor is closed, or hung up for good."""
        # Interest that has begun anew meanwhile is checked anew.
        unchecked = self._unchecked.get(registration, 0)
        reader = None if unchecked & READ else registration.reader
        writer = None if unchecked & WRITE else registration.writer
        why: Exception
        if reader is not None:
            # What Twisted's reactors say of a hang-up.
            why = ConnectionFdescWentAway(_LOST) if ready & GONE else CONNECTION_DONE
            fields["system"] = self._log_prefix(reader)
            self._disconnect(reader, why, True)
        # Unless the reader has disconnected it, or was the writer itself.
        if writer is not None and registration.writer is writer is not reader:
            why = ConnectionFdescWentAway(_LOST) if ready & GONE else CONNECTION_LOST
            fields["system"] = self._log_prefix(writer)
            self._disconnect(writer, why, False)

    def _disconnect(self, selectable: Any, why: Any, reading: bool) -> None:
        try:
            self._disconnectSelectable(selectable, why, reading)
        except KeyboardInterrupt:
            raise
        except BaseException:
            log.err()

    # Life of the process

    def startRunning(self, *args: Any, **kwargs: Any) -> None:
        """
        :raises UnsupportedReactorError: if the kernel refuses what the reactor
            needs, or if another thread has run it.
        """
        if self._started:
            super().startRunning(*args, **kwargs)
            return
        self._notifier.open()
        try:
            super().startRunning(*args, **kwargs)
        except BaseException:
            # A reactor cannot be started a second time, say.
            self._notifier.close()
            raise

    # IReactorDaemonize

    def beforeDaemonize(self) -> None:
        """Give the kernel everything back, for the parent to exit with nothing."""
        self._notifier.close()

    def afterDaemonize(self) -> None:
        """What was inherited is ours alone: the parent has exited."""
        self._notifier.daemonized()

    # Observation

    def observe_passes(
        self,
        begins: Callable[[], None] | None,
        ends: Callable[[], None] | None,
        observer: object = None,
    ) -> None:
        """
        Call ``begins`` whenever the reactor has waited for events, and ``ends``
        whenever it is about to wait; with None for both, call nothing any more.  They
        must not raise errors.

        A pass begins with the events, and calls what is due by time as well.

        :param observer: each has functions of its own.
        """
        observers = self._pass_observers
        observers.pop(observer, None)
        if begins is not None and ends is not None:
            observers[observer] = (begins, ends)
        notifier: Any = self._notifier
        # An attribute of the notifier hides the method of its class, so that a pass
        # that is not observed has nothing to look for.
        vars(notifier).pop("wait", None)
        for begins, ends in observers.values():
            notifier.wait = _observed(notifier.wait, begins, ends)

    def statistics(self) -> Mapping[str, int]:
        """
        Counts for monitoring: ``readers`` and ``writers`` at the moment, and
        what the notifier has counted since the reactor was made.
        """
        return {
            "readers": len(self._reading),
            "writers": len(self._writing),
            **self._notifier.statistics(),
        }
