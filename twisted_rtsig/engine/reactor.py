"""
The engine: a reactor that keeps track of which descriptors are watched for reading and
writing, and lets a notifier find out when they are ready.

A subclass for each kernel interface chooses the notifier.  The contract between the
engine and a notifier, and the terms used here (*registration*, *unchecked*, *armed*,
*plain input*), are described in :mod:`twisted_rtsig.notifiers`.

The engine works in passes.  A pass sends what was written since the last one, waits for
events, calls ``doRead`` and ``doWrite`` of the selectables that are ready, and sends
what these calls have written.  Timers run between passes.  If a pass calls code that
calls ``reactor.iterate()``, this runs an *inner* pass within the *outer* one.
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

# The number of reads from one connection before other connections get their turn.
# Twisted reads 64 KiB at a time, so this makes 256 KiB.
_READS_IN_A_ROW = 4

# The number of passes in a row that may get nothing but a hang-up or an error for a
# descriptor.  If reading and writing have not cleared the condition by then, the
# selectable is disconnected, since otherwise the loop would spin.  Twisted's epoll
# reactor disconnects at once, so there an error that a single read would clear (an ICMP
# message, for example) counts as a lost connection.  The number is well above 1, since
# a reader that clears an error may itself cause the next one.  (Connected UDP ports,
# which do so most often, are not counted at all: see _is_connected_udp.)
_HANG_UPS_IN_A_ROW = 10

_LOST = "File descriptor lost"

LogContext = dict[Any, Any]

# The main loop logs under the namespace of Twisted's main loop.
_log = Logger(namespace="twisted.internet.base")


def _observed(
    wait: Callable[[float | None, Any], Any],
    on_begin: Callable[[], None],
    on_end: Callable[[], None],
) -> Callable[[float | None, Any], Any]:
    """Wrap ``Notifier.wait``: each call ends one observed pass and begins the next."""

    def observed_wait(delay: float | None, unchecked: Any) -> Any:
        on_end()
        try:
            return wait(delay, unchecked)
        finally:
            on_begin()

    return observed_wait


def _is_connected_udp(reader: Any) -> bool:
    """
    Whether ``reader`` is a connected UDP port, whose errors do not count as hang-ups.

    Its ``doRead`` clears an error and tells the protocol, and a datagram that the
    protocol then sends may cause the next error at once.  Errors of an unconnected UDP
    port do count: it gets them only through an error queue (IP_RECVERR in ip(7)), and
    its ``doRead`` does not read that queue.
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
    (``_registrations``), to notice that a descriptor is registered already.

    One descriptor has at most one reader and one writer.  If a selectable is added and
    its descriptor is already registered for a different one, then either the older one
    has closed the descriptor and the number was reused, or both share the descriptor.
    The new selectable gets its direction in any case.  The older one keeps the other
    direction if it still has the descriptor.
    """

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._registrations: dict[int, Registration] = {}
        self._reading: dict[Any, Registration] = {}
        self._writing: dict[Any, Registration] = {}
        self._unchecked: dict[Registration, int] = {}
        # The transports that have to send data or to close at the end of the pass (or
        # at the beginning of the next one, see write_soon), in the order in which they
        # were queued.
        self._queued: list[StreamTransport] = []
        # Transports taken from _queued that this pass and its outer passes have still
        # to process, in reverse order: the next one is last.
        self._sending: list[StreamTransport] = []
        # An ordered set of registrations to read from in the next pass even without an
        # event, and in the passes after it, until a read would block.
        self._read_on: dict[Registration, None] = {}
        # Registrations whose read filled the buffer in the last pass that had plain
        # input, except those put into _read_on instead.
        self._full: set[Registration] = set()
        # Iterators over what the current pass has not dispatched yet.  An inner pass
        # first exhausts those of its outer pass: see _mark_rest_unchecked.
        self._plain_input: Iterator[Registration] = iter(())
        self._read_on_rest: Iterator[Registration] = iter(())
        self._events: Iterator[Event] = iter(())
        # The registration whose event is being dispatched by _call or _abandon.
        self._current: Registration | None = None
        # For each registration: the number of passes in a row that got only a hang-up
        # or an error, which was still there after doRead and doWrite.
        self._hung_up: dict[Registration, int] = {}
        # For each observer: the functions to call when a pass begins and ends.
        self._pass_observers: dict[
            object, tuple[Callable[[], None], Callable[[], None]]
        ] = {}
        # Whether a request must call wakeUp(), since the notifier is waiting or about
        # to wait.
        self._waiting = False
        # Whether the wait of a pass has returned, and the pass has not ended yet.
        self._dispatching = False
        # The fields of the main loop's log context, for the next doIteration, which
        # first resets this to None.  So it is None when iterate() calls doIteration.
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
        Call ``writer.doWrite`` whenever its descriptor is writable.  The errors are
        those of :meth:`addReader`.
        """
        registration = self._registration_for(writer, WRITE)
        if registration.writer is not writer:
            self._attach_writer(registration, writer)

    def removeReader(self, reader: Any) -> None:
        """Stop calling ``reader.doRead``, even within the current pass."""
        registration = self._reading.pop(reader, None)
        if registration is not None:
            registration.reader = None
            self._interest_ends(registration, READ)

    def removeWriter(self, writer: Any) -> None:
        """Stop calling ``writer.doWrite``, even within the current pass."""
        if isinstance(writer, StreamTransport):
            writer.write_state = NOT_WRITING
        registration = self._writing.pop(writer, None)
        if registration is not None:
            registration.writer = None
            self._interest_ends(registration, WRITE)
            if self._held_ends:
                # Report the end of input that waited for the output: see
                # StandardIOReactor.
                self._output_ended(writer)

    def removeAll(self) -> list[Any]:
        """
        Remove all readers and writers except the reactor's internal ones, such as the
        waker.

        :return: the removed ones.
        """
        readers = self.getReaders()
        # Before the writers are removed: their removal would report the held ends.
        self._held_ends.clear()
        removed: list[Any] = self._removeAll(readers, self.getWriters())
        return removed

    def getReaders(self) -> list[Any]:
        """
        Return all readers, including the reactor's internal ones, and the readers of a
        StandardIO whose end of input waits until its output is written.
        """
        held = [reader for reader, _ in self._held_ends.values()]
        return list(dict.fromkeys([*self._reading, *held]))

    def getWriters(self) -> list[Any]:
        """
        Return all writers, including the transports queued for the end of the pass.
        """
        queued = [
            each
            for each in (*self._sending, *self._queued)
            if each.write_state in (ONE_CHUNK, QUEUED)
        ]
        return [*self._writing, *dict.fromkeys(queued)]

    # Stream transports

    def begin_reading(self, stream: StreamTransport) -> None:
        """
        Like :meth:`addReader`, but faster, for a new transport, whose descriptor is
        usually not registered yet.

        :raises ValueError: if its descriptor is negative.
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
        """Let the next wait check the transport again: its read may have left data."""
        registration = self._reading.get(stream)
        if registration is not None:
            self._mark_unchecked(registration, READ)

    def is_reading(self, stream: StreamTransport) -> bool:
        """Whether the transport is a reader; one that is paused or closing is not."""
        return stream in self._reading

    def write_soon(self, stream: StreamTransport) -> None:
        """
        Queue the transport: the engine calls ``stream.doWrite`` without asking the
        kernel whether the descriptor is writable.

        It does so at the end of the current pass.  After a call between passes (by a
        timer, for example), or while the transports queued for the end of the pass are
        being processed, it does so at the beginning of the next pass.

        :param stream: a transport whose ``write_state`` is ``NOT_WRITING``.
        """
        stream.write_state = QUEUED
        self._queued.append(stream)
        if self._waiting:
            self.wakeUp()

    # Registrations

    def _registration_for(self, selectable: Any, direction: int) -> Registration:
        """
        Return the registration of ``selectable`` for its present descriptor.  Begin one
        if there is none.

        :raises ValueError: if the descriptor is negative.
        :raises OSError: if the descriptor cannot be watched.
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
                f"{descriptor}; add it while it is open"
            )
        registration = self._registrations.get(descriptor)
        if registration is not None:
            if registration.reader is selectable or registration.writer is selectable:
                return registration
            return self._replace_registration(registration, selectable, direction)
        return self._begin_registration(descriptor, direction, selectable)

    def _begin_registration(
        self, descriptor: int, interest: int, added: Any, *others: Any
    ) -> Registration:
        """
        Watch a descriptor for ``added``, and for ``others`` that share it.

        The registration has the origin of ``added`` if that is a StreamTransport and
        does not share its descriptor, and ``Origin.SHARED`` otherwise.

        :raises OSError: if the descriptor cannot be watched.
        """
        if isinstance(added, StreamTransport) and not others:
            registration = Registration(descriptor, added.origin, added.tells_drained)
        else:
            tells_drained = not others and getattr(added, "tells_drained", False)
            registration = Registration(descriptor, tells_drained=tells_drained)
        registration.interest = interest
        self._notifier.watch(registration)
        self._registrations[descriptor] = registration
        return registration

    def _replace_registration(
        self, former: Registration, added: Any, direction: int
    ) -> Registration:
        """
        Replace ``former``, the registration of the descriptor number that ``added``
        has.

        The former descriptor may have been closed and its number reused, and then the
        kernel does not watch the new descriptor.  So a new registration begins, for
        ``added`` and for the former selectables that still have the descriptor.

        :param direction: the direction that ``added`` is added for.
        :raises OSError: if the descriptor cannot be watched.  Then the former
            selectables have been disconnected or removed.
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
        remaining = [each for each in (reader, writer) if each is not None]
        interest = direction
        if reader is not None:
            interest |= READ
        if writer is not None:
            interest |= WRITE
        try:
            registration = self._begin_registration(
                descriptor, interest, added, *remaining
            )
        except OSError:
            for each in dict.fromkeys(remaining):
                log.callWithLogger(
                    each,
                    self._disconnectSelectable,
                    each,
                    ConnectionFdescWentAway(_LOST),
                    False,
                )
            raise
        if reader is not None:
            self._attach_reader(registration, reader)
        if writer is not None:
            self._attach_writer(registration, writer)
        return registration

    def _still_has(self, selectable: Any, descriptor: int) -> bool:
        try:
            number: int = selectable.fileno()
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

    def _end_registration(self, registration: Registration) -> None:
        del self._registrations[registration.descriptor]
        self._unchecked.pop(registration, None)
        self._notifier.unwatch(registration)

    def _interest_begins(self, registration: Registration, direction: int) -> None:
        if self._hung_up:
            self._hung_up.pop(registration, None)
        if not registration.interest & direction:
            registration.interest |= direction
            self._notifier.update(registration)
        # The direction may have become ready before the interest began, and an
        # edge-triggered kernel may not report that later.
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
            self._end_registration(registration)

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
        Call ``function`` in a log context that serves for many calls to selectables.
        (Twisted's reactors call ``log.callWithLogger``, which makes a context for each
        call to a selectable.)

        :param function: called with the fields of the log context and ``arguments``.
            It sets the field ``"system"`` before each call to a selectable.
        """
        fields = {"system": "-", **context.get(log.ILogContext)}
        context.call({log.ILogContext: fields}, function, fields, *arguments)

    def _run_passes(self, fields: LogContext) -> None:
        while self._started:
            try:
                while self._started:
                    # Run due timers and the calls from threads.
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
            # Not called by the main loop (but by iterate(), for example), so make a log
            # context.
            self._in_log_context(self._pass, delay)
        else:
            self._pass(fields, delay)

    def _pass(self, fields: LogContext, delay: float | None) -> None:
        inside_another = self._dispatching
        if inside_another:
            # The outer pass has called a selectable, which has called iterate().  This
            # inner pass checks again what the outer one has not dispatched yet.
            self._mark_rest_unchecked()
        system = fields["system"]
        try:
            # From here on, a request of a signal handler (addReader, for example) ends
            # the wait.  The checks below find the requests that came earlier.
            self._waiting = True
            if self._queued:
                self._waiting = False
                self._send_queued(fields)
                fields["system"] = system
                # doWrite calls protocols and producers.  What they have asked for, by
                # callLater for example, is not considered in delay.  So do not sleep.
                delay = 0
            unchecked = self._unchecked
            if unchecked:
                self._unchecked = {}
            read_on = self._read_on
            if read_on:
                self._read_on = {}
                delay = 0
            plain_input, events = self._notifier.wait(delay, unchecked)
            self._waiting = False
            self._dispatching = True
            if events:
                self._events = iter(events)
            if read_on:
                self._read_on_rest = iter(read_on)
            if plain_input:
                self._plain_input = iter(plain_input)
                self._read_plain_input(fields)
            if read_on:
                self._read_repeatedly(fields, self._read_on_rest)
            if events:
                for registration, ready, disarmed in self._events:
                    self._dispatch(fields, registration, ready, disarmed)
            if self._hung_up:
                self._forget_hang_ups(events)
            if self._queued:
                self._send_queued(fields)
        except BaseException:
            # Usually KeyboardInterrupt, raised by a signal handler outside of the calls
            # whose errors are caught, such as those of doRead.  The events that the
            # notifier had received may be lost, and a read or write may be unfinished.
            # So check everything again.
            self._recover_interrupted_pass()
            raise
        finally:
            self._waiting = False
            self._dispatching = inside_another
            fields["system"] = system

    def _recover_interrupted_pass(self) -> None:
        """Mark everything as unchecked; queue again what was not processed."""
        for registration in self._registrations.values():
            self._mark_unchecked(registration, registration.interest)
        # The transports that were not processed come before those queued since.
        self._queued[:0] = reversed(self._sending)
        self._sending.clear()
        self._current = None

    def _mark_rest_unchecked(self) -> None:
        """
        Mark as unchecked what the outer pass has not dispatched yet.

        This exhausts the iterators of the outer pass, so that it dispatches none of its
        remaining events.
        """
        for registration in (*self._plain_input, *self._read_on_rest):
            self._mark_unchecked(registration, registration.interest)
        for registration, _, _ in self._events:
            self._mark_unchecked(registration, registration.interest)
        if self._current is not None:
            # Its other direction may be ready as well, or disarmed by the event.
            self._mark_unchecked(self._current, self._current.interest)

    def _read_plain_input(self, fields: LogContext) -> None:
        # Nearly all traffic passes through here and through _send_queued.  For speed,
        # this does the work of StreamTransport.doRead instead of calling it.  After a
        # read that has filled the buffer it differs: doRead calls look_again.
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
                        # There may be more data.  An edge-triggered socket (one that
                        # has any edges) is not reported again, so read on in the next
                        # pass.  A level-triggered one is reported again.  But if it has
                        # filled the buffer in two passes with plain input in a row, to
                        # ask the kernel again is a waste, so read on as well.
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
                        self._disconnect_failed(stream)
                        continue
            else:
                try:
                    why = stream.doRead()
                except BaseException:
                    self._disconnect_failed(stream)
                    continue
            if why:
                self._disconnect(stream, why, True)

    def _read_repeatedly(
        self, fields: LogContext, registrations: Iterable[Registration]
    ) -> None:
        """
        Read from each transport, up to ``_READS_IN_A_ROW`` times.

        If a read gives data, the next pass reads from the transport again, until a read
        would block.  A short read ends the reading in this pass only: it does not prove
        that the socket is empty, unless plain input was reported.  There are two
        reasons.  The event may already have reported what follows the data, such as the
        end of the stream.  And while a registration is in ``_read_on``,
        :meth:`_dispatch` drops the events that report input alone.
        """
        for registration in registrations:
            stream = registration.reader
            # An aborted transport does not read by recv.
            if stream is None or not stream.reads_by_recv:
                continue
            fields["system"] = stream.logstr
            next_read_on = self._read_on
            for _ in range(_READS_IN_A_ROW):
                size = stream.bufferSize
                try:
                    data = stream.socket.recv(size)
                except OSError as error:
                    next_read_on.pop(registration, None)
                    why = stream.why_lost(error)
                    break
                next_read_on[registration] = None
                try:
                    why = stream._dataReceived(data)
                except BaseException:
                    self._disconnect_failed(stream)
                    why = None
                    break
                if (
                    why
                    or len(data) < size
                    or registration.reader is not stream
                    # The protocol has run an inner pass, which reads on from this set.
                    or self._read_on is not next_read_on
                ):
                    break
            if why:
                self._disconnect(stream, why, True)

    def _send_queued(self, fields: LogContext) -> None:
        """
        Send from each transport (or close it) that outer passes have left in
        ``_sending`` or that is queued now.  A transport that is queued meanwhile waits
        for the next call of this method.
        """
        sending = self._sending
        # A signal handler may queue more at any time.  So replace the list, rather than
        # clear it.
        queued, self._queued = self._queued, []
        # The list is processed from its end, and the transports of outer passes come
        # first.  So insert the newly queued ones at its front.
        sending[:0] = reversed(queued)
        while sending:
            stream = sending[-1]
            try:
                # A KeyboardInterrupt before this line leaves the transport in the list.
                # A KeyboardInterrupt after this line is handled like an error of the
                # transport: the transport is disconnected.
                del sending[-1]
                if stream.write_state == ONE_CHUNK:
                    data = stream.dataBuffer
                    sent = 0
                    if len(data) <= stream.SEND_LIMIT:
                        try:
                            sent = stream.socket.send(data)
                        except Exception:
                            sent = 0  # doWrite tries again, and handles an error.
                    if sent == len(data):
                        stream.dataBuffer = b""
                        stream.write_state = NOT_WRITING
                        continue
                    if sent:
                        # The kernel's buffer is full.
                        stream.offset = sent
                        stream.write_state = NOT_WRITING
                        fields["system"] = stream.logstr
                        self.addWriter(stream)
                        continue
                elif stream.write_state != QUEUED:
                    # After it was queued, it stopped writing, was aborted, or was
                    # registered as a writer, to wait until it is writable.
                    continue
                stream.write_state = NOT_WRITING
                fields["system"] = stream.logstr
                why = stream.doWrite()
            except BaseException:
                self._disconnect_failed(stream)
                continue
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
            # An event that reports input alone, and not as plain input: read on, since
            # one read may leave data.  If the registration is in _read_on, this pass
            # has already read from it and the next one will, so the event says nothing
            # new.
            if registration not in self._read_on:
                self._read_repeatedly(fields, (registration,))
            return
        outer, self._current = self._current, registration
        if ready & (HANGUP | GONE):
            check_again = READ | WRITE
            hung_up = self._hung_up
            hang_ups = hung_up.pop(registration, 0) + 1
            if ready & registration.interest:
                hang_ups = 0
            if ready & GONE or hang_ups > _HANG_UPS_IN_A_ROW:
                self._abandon(fields, registration, ready)
            else:
                # doRead and doWrite find out what has happened, in more detail than the
                # event tells.
                called = self._call(fields, registration, READ | WRITE)
                if (
                    hang_ups
                    and called
                    and not _is_connected_udp(registration.reader)
                    and self._notifier.is_hung_up(registration)
                ):
                    hung_up[registration] = hang_ups
        else:
            if self._hung_up:
                self._hung_up.pop(registration, None)
            self._call(fields, registration, ready)
            check_again = disarmed | ready
        self._mark_unchecked(registration, check_again & registration.interest)
        self._current = outer

    def _forget_hang_ups(self, events: Sequence[Event]) -> None:
        """Drop the counts of registrations that are not among ``events``."""
        reported = {registration for registration, _, _ in events}
        for registration in self._hung_up.keys() - reported:
            del self._hung_up[registration]

    def _call(self, fields: LogContext, registration: Registration, ready: int) -> bool:
        """
        Call the reader and the writer for the directions in ``ready``, except those
        whose interest has ended, or has begun anew, since the event.

        :return: whether either was called.
        """
        called = False
        for direction in (READ, WRITE):
            # Earlier calls of this pass may have ended the interest.  They may also
            # have begun it anew; then the direction is unchecked, and the event belongs
            # to the former interest.
            if (
                ready & registration.interest & direction
                and not self._unchecked.get(registration, 0) & direction
            ):
                called = True
                selectable = (
                    registration.reader if direction == READ else registration.writer
                )
                # Mark it before the call, which may run an inner pass.
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
        """
        Call ``doRead`` or ``doWrite``; disconnect if that returns a reason or raises.
        """
        reading = False
        try:
            # Like Twisted's own reactors, notice a descriptor that was closed, and a
            # fileno() that raises.
            if selectable.fileno() == -1:
                why: Any = ConnectionFdescWentAway(_LOST)
            elif direction == READ:
                why = selectable.doRead()
                reading = True
            else:
                why = selectable.doWrite()
        except BaseException:
            self._disconnect_failed(selectable)
            return
        if why:
            self._disconnect(selectable, why, reading)

    def _abandon(
        self, fields: LogContext, registration: Registration, ready: int
    ) -> None:
        """Disconnect what uses a descriptor that is closed or stays hung up."""
        # If the interest in a direction has begun anew after the event, that direction
        # is unchecked, and the event is no reason to disconnect its selectable.  But if
        # the selectable also has the other direction, unchanged, that one is a reason.
        unchecked = self._unchecked.get(registration, 0)
        reader = None if unchecked & READ else registration.reader
        writer = None if unchecked & WRITE else registration.writer
        why: Exception
        if reader is not None:
            # For a hang-up, the reasons are those of Twisted's poll and epoll reactors.
            why = ConnectionFdescWentAway(_LOST) if ready & GONE else CONNECTION_DONE
            fields["system"] = self._log_prefix(reader)
            self._disconnect(reader, why, True)
        # Skip the writer if it is the reader, or if disconnecting the reader has
        # removed it.
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

    def _disconnect_failed(self, selectable: Any) -> None:
        """Log the exception that is being handled, and disconnect for it."""
        error = sys.exc_info()[1]
        log.err()
        # False, as in Twisted: a ConnectionDone that was raised, not returned, ends the
        # whole connection, even if the selectable supports half closes.
        self._disconnect(selectable, error, False)

    # Start

    def startRunning(self, *args: Any, **kwargs: Any) -> None:
        """
        Open the notifier, then start as Twisted does.

        :raises UnsupportedReactorError: if the kernel refuses what the reactor
            needs, or if the notifier is open in another thread.
        """
        if self._started:
            super().startRunning(*args, **kwargs)
            return
        self._notifier.open()
        try:
            super().startRunning(*args, **kwargs)
        except BaseException:
            # For example, a reactor that has stopped cannot be started again.
            self._notifier.close()
            raise

    # Signals

    def sigInt(self, number: int, frame: object = None) -> None:
        """See ``ReactorBase.sigInt``."""
        self._stop_by_signal("SIGINT", number)

    def sigBreak(self, number: int, frame: object = None) -> None:
        """See ``ReactorBase.sigBreak``."""
        self._stop_by_signal("SIGBREAK", number)

    def sigTerm(self, number: int, frame: object = None) -> None:
        """See ``ReactorBase.sigTerm``."""
        self._stop_by_signal("SIGTERM", number)

    def _stop_by_signal(self, name: str, number: int) -> None:
        # Twisted logs in the signal handler.  If the signal interrupts the main thread
        # while that takes the lock of a log file (threadable.XLock, which is written in
        # Python), the handler waits for this lock without end.  So log in the loop.
        self.callFromThread(_log.info, "Received {signal}, shutting down.", signal=name)
        self.callFromThread(self.stop)
        self._exitSignal = number

    # IReactorDaemonize

    def beforeDaemonize(self) -> None:
        """Close the notifier: parent and child must not share its kernel resources."""
        self._notifier.close()

    def afterDaemonize(self) -> None:
        """Tell the notifier that the parent process no longer uses the reactor."""
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

        For observers, a pass begins when a wait has returned and ends when the next
        wait begins.  So it includes the timers, and the functions that threads have
        given to ``callFromThread``, that run between the two waits.  The functions must
        not raise errors.  If ``begins`` or ``ends`` is None, those of ``observer`` are
        removed.

        :param begins: called after each wait.
        :param ends: called before each wait.
        :param observer: a key.  A new pair of functions replaces the observer's former
            one.
        """
        observers = self._pass_observers
        observers.pop(observer, None)
        if begins is not None and ends is not None:
            observers[observer] = (begins, ends)
        notifier: Any = self._notifier
        # While there are observers, an attribute ``wait`` of the notifier hides the
        # method of its class.  So without observers, a pass need not check for any.
        vars(notifier).pop("wait", None)
        for begins, ends in observers.values():
            notifier.wait = _observed(notifier.wait, begins, ends)

    def statistics(self) -> Mapping[str, int]:
        """
        Return counts for monitoring.

        :return: the present number of ``readers``; the present number of ``writers``,
            which wait until their descriptors are writable (queued transports are not
            counted); and what :meth:`Notifier.statistics` returns.
        """
        return {
            "readers": len(self._reading),
            "writers": len(self._writing),
            **self._notifier.statistics(),
        }
