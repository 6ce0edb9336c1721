"""
Which polls of AFD are issued, when, and what their answers report.

What a poll is, is in ``afd.py``.  A socket has a poll of its own, or is one of the busy
sockets that share a poll.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from twisted_rtsig.notifiers import Event
from twisted_rtsig.notifiers.afd import (
    ANSWERED,
    ANSWERS,
    ASKED,
    MASKS,
    MORE_THAN_INPUT,
    MOST_THAT_SHARE,
    STATUS,
    Device,
    SharedPoll,
    SocketPoll,
    directions,
)
from twisted_rtsig.notifiers.registration import READ, Registration
from twisted_rtsig.windows import calls as windows

# The fewest sockets of a shared poll, and the number of turns after which a socket that
# was not reported leaves it.
_FEWEST_THAT_SHARE = 8
_PATIENCE_WITH_THE_IDLE = 4


class Polls:
    """
    The polls that report to one completion port.

    :ivar by_registration: the poll of each registration.
    :ivar by_address: the polls of registrations, and those that are pending after the
        end of theirs, by the address of the buffer.
    :ivar shared_by_address: the shared poll, and those that were cancelled and are not
        answered yet, by the address of the buffer.
    :ivar at_once: the polls that were answered at once, so that no packet comes.
    :ivar gone: registrations whose socket the driver does not know any more.
    :ivar events: the number of reports so far.
    :ivar issued: the number of polls issued so far.
    :ivar cancelled: the number of polls cancelled so far.
    """

    def __init__(self) -> None:
        self.by_registration: dict[Registration, SocketPoll] = {}
        self.by_address: dict[int, SocketPoll] = {}
        self.shared_by_address: dict[int, SharedPoll] = {}
        self.at_once: list[SocketPoll | SharedPoll] = []
        self.gone: list[Registration] = []
        self.events = 0
        self.issued = 0
        self.cancelled = 0
        # The poll that is being issued.
        self._issuing: SocketPoll | SharedPoll | None = None
        # Polls to be issued again in the next wait.
        self._answered: list[SocketPoll] = []
        # Polls without a registration, to be used again.
        self._free: list[SocketPoll] = []
        self._shared: SharedPoll | None = None
        self._free_shared: list[SharedPoll] = []
        self._devices: list[Device] = []
        self._port = 0

    def open(self, port: int) -> None:
        """Let the polls that are issued from now on report to ``port``."""
        self._port = port

    def cancel_all(self) -> None:
        """End all registrations.  The pending polls are answered soon."""
        for device in self._devices:
            device.cancel()
        for poll in self.by_registration.values():
            poll.registration = None
        self.by_registration.clear()
        self._shared = None
        self.settle()

    def has_pending(self) -> bool:
        """Whether the kernel may still write to any of the buffers."""
        return any(each.pending for each in self._all())

    def close(self) -> None:
        """Give the handles back.  The buffers of pending polls are never freed."""
        if self.has_pending():
            # A leak is better than a kernel that writes into the memory of others.
            _leaked.extend(self._all())
        for device in self._devices:
            windows.close_handle(device.handle)
        self.by_address.clear()
        self.shared_by_address.clear()
        self.gone.clear()
        self._answered.clear()
        self._free.clear()
        self._free_shared.clear()
        self._devices.clear()

    def _all(self) -> Iterator[SocketPoll | SharedPoll]:
        yield from self.by_address.values()
        yield from self.shared_by_address.values()

    def begin(self, registration: Registration, base: int) -> None:
        """Watch the socket: its poll is issued in the next wait."""
        poll = self._new_poll()
        poll.ask_about(registration, base)
        self.by_registration[registration] = poll
        self._answered.append(poll)

    def end(self, registration: Registration) -> None:
        """Stop watching, if that has begun."""
        poll = self.by_registration.pop(registration, None)
        if poll is not None:
            self._give_up(poll)

    def armed(self) -> int:
        """The number of sockets that pending polls name."""
        shared = self._shared
        return sum(1 for each in self.by_registration.values() if each.pending) + (
            len(shared.members) if shared is not None and shared.pending else 0
        )

    # Asking

    def issue(self, unchecked: Iterable[Registration]) -> None:
        """Issue the polls that were answered, and those of ``unchecked``."""
        if self._answered:
            self._issue_answered()
        polls = self.by_registration
        for registration in unchecked:
            if registration in polls:
                self._issue(polls[registration])
        shared = self._shared
        if shared is not None and not shared.pending:
            self._issue_shared(shared)

    def issue_unreported(self, unchecked: Iterable[Registration]) -> None:
        """
        Issue the polls of ``unchecked``, but not those that were answered: these are
        reported now, and issued in the next pass.
        """
        reported = {poll.registration for poll in self._answered}
        polls = self.by_registration
        for registration in unchecked:
            if registration in polls and registration not in reported:
                self._issue(polls[registration])

    def _issue_answered(self) -> None:
        """Issue the answered polls again; if they are many, as a shared poll."""
        answered, self._answered = self._answered, []
        shared = self._shared
        if shared is None:
            if len(answered) >= _FEWEST_THAT_SHARE:
                self._shared = shared = self._new_shared()
        elif shared.pending:
            shared = None
        for poll in answered:
            if shared is None or not self._joins(shared, poll):
                self._issue(poll)

    def _joins(self, shared: SharedPoll, poll: SocketPoll) -> bool:
        """Whether ``poll`` is a member of the shared poll, or becomes one."""
        registration = poll.registration
        if registration is None or registration.interest != READ or poll.pending:
            return False
        member = shared.members.get(poll.base)
        if member is None and len(shared.members) < MOST_THAT_SHARE:
            poll.reported = shared.turn
            shared.members[poll.base] = member = poll
            shared.changed = True
        return member is poll

    def _issue(self, poll: SocketPoll) -> None:
        """Ask for the interest of the registration, unless a pending poll does."""
        registration = poll.registration
        if registration is None:
            return
        interest = registration.interest
        shared = self._shared
        if shared is not None and shared.members.get(poll.base) is poll:
            if interest == READ:
                return
            self._leave(shared, poll)
        if poll.pending:
            if not interest & ~poll.pending:
                return
            base = poll.base
            self._give_up(poll)
            poll = self._new_poll()
            poll.ask_about(registration, base)
            self.by_registration[registration] = poll
        poll.words[ASKED] = MASKS[interest]
        if not self._ask(poll, interest):
            poll.pending = 0
            self.gone.append(registration)

    def _ask(self, poll: SocketPoll | SharedPoll, interest: int) -> bool:
        """
        Pass a poll to the driver.

        :return: whether the driver has accepted it.
        """
        # Before the call: an interrupt after it must find that the call was made.  The
        # statements after the call cannot be interrupted, since they call no function
        # that is written in Python.
        poll.words[STATUS] = windows.STATUS_PENDING
        self._issuing = poll
        poll.pending = interest
        status = windows.device_io_control(*poll.arguments)
        self.issued += 1
        if status == windows.STATUS_SUCCESS:
            self.at_once.append(poll)
        self._issuing = None
        return status == windows.STATUS_SUCCESS or status == windows.STATUS_PENDING

    def settle(self) -> None:
        """Clear up after an interrupt that came while a poll was issued."""
        poll, self._issuing = self._issuing, None
        if (
            poll is None
            or poll.words[STATUS] == windows.STATUS_PENDING
            or poll in self.at_once
        ):
            return
        # The poll was answered, and it is not known whether a packet comes.  So another
        # poll takes its place.
        if isinstance(poll, SharedPoll):
            poll.pending = 0
            if poll is self._shared:
                self._replace_shared(poll)
            return
        poll.pending = 0
        registration, poll.registration = poll.registration, None
        if registration is not None:
            self.begin(registration, poll.base)

    # Polls and handles

    def _new_poll(self) -> SocketPoll:
        if self._free:
            poll = self._free.pop()
        else:
            device = self._device()
            poll = SocketPoll(device)
            device.polls += 1
        self.by_address[poll.address] = poll
        return poll

    def _device(self) -> Device:
        if not self._devices or self._devices[-1].is_full():
            self._devices.append(Device(self._port))
        return self._devices[-1]

    def _give_up(self, poll: SocketPoll) -> None:
        poll.registration = None
        shared = self._shared
        if shared is not None and shared.members.get(poll.base) is poll:
            self._leave(shared, poll)
        if poll.pending:
            self._cancel(poll)
        else:
            self._release(poll)

    def _release(self, poll: SocketPoll) -> None:
        # An interrupt may have a poll released twice.
        if self.by_address.pop(poll.address, None) is not None:
            self._free.append(poll)

    def _cancel(self, poll: SocketPoll | SharedPoll) -> None:
        self.cancelled += 1
        poll.device.cancel(poll.address)

    # The shared poll

    def _new_shared(self) -> SharedPoll:
        if self._free_shared:
            shared = self._free_shared.pop()
        else:
            shared = SharedPoll(self._device())
        self.shared_by_address[shared.address] = shared
        return shared

    def _release_shared(self, shared: SharedPoll) -> None:
        shared.members.clear()
        # An interrupt may have a poll released twice.
        if self.shared_by_address.pop(shared.address, None) is not None:
            self._free_shared.append(shared)

    def _issue_shared(self, shared: SharedPoll) -> None:
        """Issue the shared poll, without the sockets that were idle for too long."""
        if not shared.turn % _PATIENCE_WITH_THE_IDLE:
            patience = shared.turn - _PATIENCE_WITH_THE_IDLE
            for poll in [
                each for each in shared.members.values() if each.reported <= patience
            ]:
                self._leave(shared, poll)
                self._issue(poll)
        if len(shared.members) < _FEWEST_THAT_SHARE:
            self._shared = None
            members = list(shared.members.values())
            self._release_shared(shared)
            for poll in members:
                self._issue(poll)
            return
        if shared.changed:
            shared.name_members()
        if not self._ask(shared, READ):
            # One of the members is no socket any more; its own poll tells which.
            shared.pending = 0
            members = list(shared.members.values())
            shared.members.clear()
            for poll in members:
                self._issue(poll)

    def _leave(self, shared: SharedPoll, poll: SocketPoll) -> None:
        del shared.members[poll.base]
        shared.changed = True
        if shared.pending:
            # It names a socket that another poll may name now.  The question cannot
            # change until it is answered, so the other members move to another poll.
            self._cancel(shared)
            self._replace_shared(shared)

    def _replace_shared(self, shared: SharedPoll) -> None:
        self._shared = successor = self._new_shared()
        successor.turn = shared.turn
        successor.members, shared.members = shared.members, {}
        successor.changed = True

    # Answers

    def shared_is_answered(self) -> bool:
        """Whether the shared poll was answered at once."""
        return self._shared in self.at_once

    def report_at_once(self, plain: list[Registration], events: list[Event]) -> None:
        """Report what the polls say that were answered at once."""
        for poll in self.at_once:
            if isinstance(poll, SharedPoll):
                self.report_shared(poll, plain, events)
            else:
                self.report(poll, plain, events)
        self.at_once.clear()

    def report(
        self, poll: SocketPoll, plain: list[Registration], events: list[Event]
    ) -> None:
        """Report what a poll says that was answered."""
        poll.pending = 0
        if poll.registration is None:
            self._release(poll)
            return
        words = poll.words
        if words[STATUS] == windows.STATUS_SUCCESS and words[ANSWERS]:
            self._add(poll, words[ANSWERED], plain, events)
        else:
            # Windows has cancelled it, and the buffer holds the answer before.
            self._answered.append(poll)

    def report_shared(
        self, shared: SharedPoll, plain: list[Registration], events: list[Event]
    ) -> None:
        """Report what a shared poll says that was answered."""
        shared.pending = 0
        if shared is not self._shared:
            self._release_shared(shared)
            return
        if shared.words[STATUS] != windows.STATUS_SUCCESS:
            return
        shared.turn = turn = shared.turn + 1
        members = shared.members
        for base, answer in shared.answer():
            poll = members.get(base)
            # It may have left before an interrupt.
            if poll is not None:
                poll.reported = turn
                self._add(poll, answer, plain, events)

    def _add(
        self,
        poll: SocketPoll,
        answer: int,
        plain: list[Registration],
        events: list[Event],
    ) -> None:
        registration = poll.registration
        assert registration is not None
        self.events += 1
        self._answered.append(poll)
        if registration.tells_drained and not answer & MORE_THAN_INPUT:
            plain.append(registration)
        else:
            events.append((registration, directions(answer), 0))


# Polls that were pending when their port was closed: the kernel may still write to
# their buffers.
_leaked: list[SocketPoll | SharedPoll] = []
