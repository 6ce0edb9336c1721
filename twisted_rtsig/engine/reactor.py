"""
The engine: a reactor that records which descriptors are read and written, and lets a
notifier find out when they are ready.

A subclass for each kernel interface chooses the notifier.  The contract between the
engine and a notifier, and the terms used here (*registration*, *unchecked*, *armed*,
*plain input*), are described in :mod:`twisted_rtsig.notifiers`.

The engine works in passes.  A pass waits for events, calls ``doRead`` and ``doWrite``
of the selectables that are ready, and sends what was written meanwhile.
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

# The number of reads from one connection before other connections get their turn.  With
# Twisted's size of a read that is 256 KiB.
_READS_IN_A_ROW = 4

# The number of passes in a row that may report a hang-up or an error of a descriptor
# and nothing else.  If reading and writing have not cleared the condition by then, the
# selectable is disconnected, as the loop would spin.  Twisted's epoll reactor
# disconnects at once; it takes an error that a single read would clear (an ICMP
# message, for example) for a lost connection.  The number is greater than 2, since a
# reader that clears an error may itself cause the next one.
_HANG_UPS_IN_A_ROW = 10

_LOST = "File descriptor lost"

LogContext = dict[Any, Any]

# The logger of Twisted's main loop.
_log = Logger(namespace="twisted.internet.base")


def _observed(
    wait: Callable[[float | None, Any], Any],
    begins: Callable[[], None],
    ends: Callable[[], None],
) -> Callable[[float | None, Any], Any]:
    """Wrap ``Notifier.wait``: each call ends one observed pass and begins the next."""

    def observed_wait(delay: float | None, unchecked: Any) -> Any:
        ends()
        try:
            return wait(delay, unchecked)
        finally:
            begins()

    return observed_wait


def _reads_errors(reader: Any) -> bool:
    """
    Whether ``reader`` is a connected datagram port.

    It clears each error and passes it to its protocol, which may cause the next error
    at once.  Other ports get errors only through an error queue, which they do not read
    (IP_RECVERR in ip(7)).
    """
    return isinstance(reader, Port) and bool(reader._connectedAddr)


@implementer(IReactorFDSet, IReactorDaemonize)
class EngineReactor(
    StreamReactor, DatagramReactor, ProcessReactor, StandardIOReactor, TimerReactor
):
    """
    A reactor on top of any notifier.

    Registrations are found by selectable (``_reading``, ``_writing``), since
    ``fileno()`` may return -1 by the time ``removeReader`` is called, and by descriptor
    (``_registrations``), since the kernel knows only descriptors.

    One descriptor has at most one reader and one writer.  If a selectable is added
    whose descriptor is already registered for another one, then the former selectable
    has either closed the descriptor, whose number was reused, or shares it and uses the
    other direction.  If the former selectable still has the descriptor, it keeps the
    other direction.
    """

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._registrations: dict[int, Registration] = {}
        self._reading: dict[Any, Registration] = {}
        self._writing: dict[Any, Registration] = {}
        self._unchecked: dict[Registration, int] = {}
        # Transports with data to send at the end of the pass, in the order of writes.
        self._queued: list[StreamTransport] = []
        # Transports that the current pass still has to send for, in reverse order.
        self._sending: list[StreamTransport] = []
        # An ordered set: transports to read from in the next pass without an event, and
        # in the passes after it, until a read finds no data.
        self._read_on: dict[Registration, None] = {}
        # Registrations whose last read filled the buffer, in the last pass.
        self._full: set[Registration] = set()
        # The parts of the current pass that are still to be dispatched.
        self._plain_input: Iterator[Registration] = iter(())
        self._reading_on: Iterator[Registration] = iter(())
        self._events: Iterator[Event] = iter(())
        # The registration being dispatched.
        self._dispatched: Registration | None = None
        # For each registration: the number of passes in a row that have reported only a
        # hang-up or an error, which was still there afterwards.
        self._hung_up: dict[Registration, int] = {}
        # For each observer: the functions to call when a pass begins and ends.
        self._pass_observers: dict[
            object, tuple[Callable[[], None], Callable[[], None]]
        ] = {}
        # Whether the notifier waits.
        self._waiting = False
        # Whether a pass dispatches its events.
        self._dispatching = False
        # The fields of the log context of the main loop, while it calls doIteration.
        self._fields: LogContext | None = None
        super().__init__()

    # IReactorFDSet

    def addReader(self, reader: Any) -> None:
        """
        Call ``reader.doRead`` whenever its descriptor is readable.

        :raises ValueError: if its descriptor is negative.
        :raises OSError: if its descriptor cannot be watched.
        """
        registration = self._registration_for(reader, READ)
        if registration.reader is not reader:
            self._attach_reader(registration, reader)

    def addWriter(self, writer: Any) -> None:
        """
        Call ``writer.doWrite`` whenever its descriptor is writable.

        :raises ValueError: if its descriptor is negative.
        :raises OSError: if its descriptor cannot be watched.
        """
        registration = self._registration_for(writer, WRITE)
        if registration.writer is not writer:
            self._attach_writer(registration, writer)

    def removeReader(self, reader: Any) -> None:
        """Do not call ``reader.doRead`` any more, not even in the current pass."""
        registration = self._reading.pop(reader, None)
        if registration is not None:
            registration.reader = None
            self._interest_ends(registration, READ)

    def removeWriter(self, writer: Any) -> None:
        """Do not call ``writer.doWrite`` any more, not even in the current pass."""
        if isinstance(writer, StreamTransport):
            writer.write_state = NOT_WRITING
        registration = self._writing.pop(writer, None)
        if registration is not None:
            registration.writer = None
            self._interest_ends(registration, WRITE)
            if self._held_ends:
                self._has_written(writer)

    def removeAll(self) -> list[Any]:
        """
        Remove all readers and writers except the reactor's own.

        :return: the removed ones.
        """
        readers = self.getReaders()
        self._held_ends.clear()
        removed: list[Any] = self._removeAll(readers, self.getWriters())
        return removed

    def getReaders(self) -> list[Any]:
        """Return all readers, including the reactor's own."""
        held = [reader for reader, _ in self._held_ends.values()]
        return list(dict.fromkeys([*self._reading, *held]))

    def getWriters(self) -> list[Any]:
        """Return all writers, including those that wait for the end of the pass."""
        queued = [
            each
            for each in (*self._sending, *self._queued)
            if each.write_state in (ONE_CHUNK, QUEUED)
        ]
        return [*self._writing, *dict.fromkeys(queued)]

    # Stream transports

    def begin_reading(self, stream: StreamTransport) -> None:
        """
        Like :meth:`addReader`, for a new transport, whose descriptor is rarely
        registered.

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
        """Check the transport again: its last read may have left data."""
        registration = self._reading.get(stream)
        if registration is not None:
            self._mark_unchecked(registration, READ)

    def is_reading(self, stream: StreamTransport) -> bool:
        """Whether the transport is a reader, which means connected and not paused."""
        return stream in self._reading

    def write_soon(self, stream: StreamTransport) -> None:
        """
        Call ``stream.doWrite`` at the end of the pass, without asking the kernel
        whether the descriptor is writable.

        :param stream: a transport whose ``write_state`` is ``NOT_WRITING``.
        """
        stream.write_state = QUEUED
        self._queued.append(stream)
        if self._waiting:
            self.wakeUp()

    # Registrations

    def _registration_for(self, selectable: Any, direction: int) -> Registration:
        """
        Return the registration of ``selectable`` and its descriptor, or begin one.
        """
        descriptor: int = selectable.fileno()
        known = (self._reading if direction == READ else self._writing).get(selectable)
        if known is not None:
            if known.descriptor == descriptor:
                return known
            # Its descriptor has changed since it was added.
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
        Replace ``former``, the registration of the descriptor that ``newcomer`` has.

        The descriptor may have been closed and its number reused.  Then the kernel has
        forgotten what it was told about the number.  So the registration begins anew,
        for ``newcomer`` and for the former selectables that still have the descriptor.

        :param direction: the direction that ``newcomer`` is added for.
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
        # An edge may have come and gone while there was no interest.
        self._mark_unchecked(registration, direction)
        if self._waiting:
            # A signal handler may call this while the loop sleeps.
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
        """Run until the reactor is stopped, then close the notifier."""
        try:
            self._in_log_context(self._run_passes)
        finally:
            self._notifier.close()

    def _in_log_context(self, function: Callable[..., None], *arguments: Any) -> None:
        """
        Set up once, for many calls, what ``log.callWithLogger`` sets up for each.

        :param function: called with the fields of the log context and ``arguments``.
            It sets the field ``"system"`` before each call of a selectable.
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
        Run one pass: wait for events, then call the selectables that are ready.

        :param delay: the longest time to wait, in seconds; None for no limit.
        """
        fields, self._fields = self._fields, None
        if fields is None:
            # iterate() has called it, in any log context, and not the main loop.
            self._in_log_context(self._pass, delay)
        else:
            self._pass(fields, delay)

    def _pass(self, fields: LogContext, delay: float | None) -> None:
        inside_another = self._dispatching
        if inside_another:
            # A selectable that a pass has called iterates the reactor.  The inner pass
            # checks again what the outer one still had to dispatch.
            self._check_rest_again()
        system = fields["system"]
        try:
            if self._queued:
                self._send_queued(fields)
                fields["system"] = system
                # The calls may have asked for another pass, with callLater for example.
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
            # KeyboardInterrupt, raised by a signal handler.  It is unknown which events
            # the notifier had received, and which selectable was being called.
            self._check_all_again()
            raise
        finally:
            self._waiting = False
            self._dispatching = inside_another
            fields["system"] = system

    def _check_all_again(self) -> None:
        for registration in self._registrations.values():
            self._mark_unchecked(registration, registration.interest)
        # The next pass first sends for the transports that are left over.
        self._queued[:0] = reversed(self._sending)
        self._sending.clear()
        self._dispatched = None

    def _check_rest_again(self) -> None:
        """
        Mark as unchecked what the outer pass has not dispatched yet.

        This uses up the iterators of the outer pass, which will dispatch nothing more.
        """
        for registration in (*self._plain_input, *self._reading_on):
            self._mark_unchecked(registration, registration.interest)
        for registration, _, _ in self._events:
            self._mark_unchecked(registration, registration.interest)
        if self._dispatched is not None:
            # Its other direction may be ready as well, or disarmed by the event.
            self._mark_unchecked(self._dispatched, self._dispatched.interest)

    def _read_plain_input(self, fields: LogContext) -> None:
        # Nearly all traffic passes through here and through _send_queued.  To be fast,
        # this repeats the code of StreamTransport.doRead in place of calling it.
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
                        # There may be more.  A level-triggered socket is reported again
                        # if so.  An edge-triggered one is not, and one whose reads have
                        # filled the buffer twice in a row has so much data that waiting
                        # for an event is a waste: read on in the next pass.
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
        Read a few times from each transport.

        A transport from which something was read is read from in the next pass again.
        Only a read that would block proves that nothing is left; after a short read,
        more may have arrived.
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
                    # The call has run an inner pass, which reads on in its place.
                    or self._read_on is not read_on
                ):
                    break
            if why:
                self._disconnect(stream, why, True)

    def _send_queued(self, fields: LogContext) -> None:
        """Send for each transport that is queued now; some may be queued again."""
        sending = self._sending
        # Below the entries that an outer (re-entrant) pass still has to send.
        sending[:0] = reversed(self._queued)
        self._queued.clear()
        while sending:
            stream = sending[-1]
            try:
                # An interrupt before this line leaves the transport in the list.  One
                # after it counts as an error of the transport, which is disconnected.
                del sending[-1]
                if stream.write_state == ONE_CHUNK:
                    data = stream.dataBuffer
                    sent = 0
                    if len(data) <= stream.SEND_LIMIT:
                        try:
                            sent = stream.socket.send(data)
                        except Exception:
                            sent = 0  # doWrite gets the error again, and handles it.
                    if sent == len(data):
                        stream.dataBuffer = b""
                        stream.write_state = NOT_WRITING
                        continue
                    if sent:
                        # The kernel's buffer is full.
                        stream.offset = sent
                        stream.write_state = NOT_WRITING
                        self.addWriter(stream)
                        continue
                elif stream.write_state != QUEUED:
                    # The call of another transport may have disconnected it.
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
            # If it is in _read_on, this pass has read from it, and the next one will.
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
                # doRead and doWrite find out what has happened, more exactly than the
                # event tells.
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
        """Drop the counts of registrations that this pass has not reported."""
        reported = {registration for registration, _, _ in events}
        for registration in self._hung_up.keys() - reported:
            del self._hung_up[registration]

    def _call(self, fields: LogContext, registration: Registration, ready: int) -> bool:
        """
        Call the reader and the writer, as far as their directions are ready.

        :return: whether either was called.
        """
        called = False
        for direction in (READ, WRITE):
            # Earlier calls of this pass may have ended the interest.  They may also
            # have begun it anew; then the direction is unchecked, and the event is not
            # for it.
            if (
                ready & registration.interest & direction
                and not self._unchecked.get(registration, 0) & direction
            ):
                called = True
                selectable = (
                    registration.reader if direction == READ else registration.writer
                )
                # Before the call, since the call may run an inner pass.
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
        """Call ``selectable``; disconnect it if it returns a reason or raises."""
        reading = False
        try:
            # As Twisted's own reactors do: notice a descriptor that was closed, and a
            # fileno() that raises.
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
        """Disconnect selectables whose descriptor is closed, or stays hung up."""
        # Interest that has begun anew since the event is unchecked; leave it.
        unchecked = self._unchecked.get(registration, 0)
        reader = None if unchecked & READ else registration.reader
        writer = None if unchecked & WRITE else registration.writer
        why: Exception
        if reader is not None:
            # The reasons that Twisted's reactors give for a hang-up.
            why = ConnectionFdescWentAway(_LOST) if ready & GONE else CONNECTION_DONE
            fields["system"] = self._log_prefix(reader)
            self._disconnect(reader, why, True)
        # Unless disconnecting the reader has removed it, or it is the reader itself.
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
            needs, or if the reactor has run in another thread.
        """
        if self._started:
            super().startRunning(*args, **kwargs)
            return
        self._notifier.open()
        try:
            super().startRunning(*args, **kwargs)
        except BaseException:
            # For example, a reactor cannot be started a second time.
            self._notifier.close()
            raise

    # IReactorDaemonize

    def beforeDaemonize(self) -> None:
        """Release all kernel resources, so that the parent process exits with none."""
        self._notifier.close()

    def afterDaemonize(self) -> None:
        """Note that the parent process has exited, and shares nothing any more."""
        self._notifier.daemonized()

    # Observation

    def observe_passes(
        self,
        begins: Callable[[], None] | None,
        ends: Callable[[], None] | None,
        observer: object = None,
    ) -> None:
        """
        Call functions when a pass begins and when it ends.

        Here a pass begins when the reactor has waited for events and ends when it is
        about to wait again.  So it includes the timers that are due.  The functions
        must not raise errors.

        :param begins: called after each wait; None to end the observation.
        :param ends: called before each wait; None to end the observation.
        :param observer: a key; there is one pair of functions for each.
        """
        observers = self._pass_observers
        observers.pop(observer, None)
        if begins is not None and ends is not None:
            observers[observer] = (begins, ends)
        notifier: Any = self._notifier
        # An attribute of the notifier hides the method of its class.  So a pass that is
        # not observed does not even have to check for observers.
        vars(notifier).pop("wait", None)
        for begins, ends in observers.values():
            notifier.wait = _observed(notifier.wait, begins, ends)

    def statistics(self) -> Mapping[str, int]:
        """
        Return counts for monitoring.

        :return: ``readers`` and ``writers`` at the moment, and the counts of the
            notifier since the reactor was made (:meth:`Notifier.statistics`).
        """
        return {
            "readers": len(self._reading),
            "writers": len(self._writing),
            **self._notifier.statistics(),
        }
