"""
One loop for Twisted and asyncio: a reactor of this package, and an asyncio event loop
that waits in it.

The Twisted part of a program runs as fast as on the other reactors of this package, and
any asyncio library runs unchanged in the same thread.  Install the reactor before
anything imports ``twisted.internet.reactor``::

    from twisted_rtsig import asyncioreactor
    asyncioreactor.install()

or by its short name: ``twistd --reactor=rtsig-asyncio web``.  In an asyncio program,
the loop brings the reactor with it::

    asyncio.Runner(loop_factory=asyncioreactor.new_event_loop)

See docs/asyncio.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import stat
import sys
import threading
from asyncio import events
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from twisted.internet import asyncioreactor as twisteds
from twisted.internet.base import ReactorBase
from twisted.internet.defer import Deferred
from twisted.internet.error import (
    ReactorAlreadyInstalledError,
    ReactorAlreadyRunning,
)
from twisted.internet.main import installReactor
from twisted.internet.posixbase import unixEnabled
from twisted.logger import Logger
from twisted.python.failure import Failure

from twisted_rtsig.asyncio_support.deferreds import (
    install as let_asyncio_await_deferreds,
)
from twisted_rtsig.asyncio_support.loop import EngineEventLoop, adopt, check_loop
from twisted_rtsig.asyncio_support.transports import SocketTransport
from twisted_rtsig.asyncio_support.watched import Watched, WatchedTransport
from twisted_rtsig.engine.reactor import EngineReactor, LogContext
from twisted_rtsig.notifiers import GONE, HANGUP, UnsupportedReactorError
from twisted_rtsig.notifiers.registration import READ, WRITE, Registration
from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

if sys.platform.startswith("linux"):
    from twisted_rtsig.epollreactor import EdgeEPollReactor as SystemReactor
elif hasattr(select, "kqueue"):
    from twisted_rtsig.kqreactor import KQueueReactor as SystemReactor
else:
    # Making the reactor fails here.
    SystemReactor = EngineReactor

if unixEnabled:
    from twisted.internet import process

_log = Logger()

# Taken now, before replace() puts another class in its place.
_TwistedsReactor = twisteds.AsyncioSelectorReactor


def _ignore(number: int, frame: object) -> None:
    """A signal handler that does nothing: the wakeup descriptor gets the signal."""


class _Signals:
    """
    The signal handlers of a reactor: those of Twisted, and one for SIGCHLD, which
    reaches the loop through its wakeup descriptor.

    :param inner: the object that handles SIGINT and SIGTERM.
    """

    def __init__(self, loop: EngineEventLoop, inner: Any) -> None:
        self._loop: Any = loop
        self._inner = inner

    def install(self) -> None:
        """Install the handlers."""
        self._inner.install()
        self.hear_of_children()
        # Reap children that have ended before.
        process.reapAllProcesses()

    def hear_of_children(self) -> None:
        """Install what asyncio removes together with its last signal handler."""
        if not callable(signal.getsignal(signal.SIGCHLD)):
            signal.signal(signal.SIGCHLD, _ignore)
            signal.siginterrupt(signal.SIGCHLD, False)
        signal.set_wakeup_fd(self._loop._csock.fileno())

    def uninstall(self) -> None:
        """Remove the handlers."""
        self._inner.uninstall()
        if signal.getsignal(signal.SIGCHLD) is _ignore:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._loop.is_closed() or self._loop._signal_handlers:
            return
        wakeup = signal.set_wakeup_fd(-1)
        if wakeup != self._loop._csock.fileno():
            signal.set_wakeup_fd(wakeup)


def _check_system() -> None:
    """
    Check that the system has a notifier for the reactor.

    :raises UnsupportedReactorError: if it has none.
    """
    if sys.platform.startswith("linux") or hasattr(select, "kqueue"):
        return
    advice = "use --reactor=asyncio, which is Twisted's"
    if sys.platform == "win32":
        advice = (
            "use --reactor=rtsig-iocp without asyncio, or --reactor=asyncio after "
            "asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())"
        )
    raise UnsupportedReactorError(
        "this package has one loop for Twisted and asyncio on Linux, BSD and macOS "
        f"only, and this is {sys.platform}: {advice}"
    )


def _is_refused(descriptor: int) -> bool:
    """Whether epoll refuses it: a file, a directory, or a device like /dev/null."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
        return False
    with select.epoll() as epoll:
        try:
            epoll.register(descriptor, 0)
        except PermissionError:
            return True
    return False


class AsyncioEngineReactor(EngineReactor, _TwistedsReactor):
    """
    The base class of reactors with an asyncio event loop, for any notifier.

    It is a subclass of Twisted's ``AsyncioSelectorReactor`` for code that asks for the
    class.  It uses nothing of it, and has the same attribute ``_asyncioEventloop``.

    :param loop: the event loop.  None takes the one that runs in this thread, or else a
        new one, which becomes the current one (``asyncio.set_event_loop``).
    :ivar starts_with_loop: whether the loop starts the reactor when it runs, as nothing
        calls ``run()``.
    :ivar makes_one_pass: whether ``iterate()`` runs the loop.
    :ivar calls_protocols: whether a pass may call protocols of asyncio.  It may not in
        debug mode, in which the loop measures callbacks, nor within a call of
        ``iterate()``.
    :ivar in_plain_run: whether a pass may call protocols of asyncio, and the loop was
        run after it got this reactor.  Then ``send_collected()`` is called before the
        loop waits and when it has stopped.
    :ivar collecting: the transports that have collected data to send.
    :ivar raised: an error of an asyncio protocol that ends the loop; None if there is
        none.
    """

    _asyncioEventloop: Any

    def __init__(self, loop: Any = None, *args: Any) -> None:
        _check_system()
        let_asyncio_await_deferreds()
        current = loop is None
        if loop is None:
            loop = events._get_running_loop()
        if loop is not None:
            check_loop(loop)
        self.starts_with_loop = False
        self.makes_one_pass = False
        self.calls_protocols = True
        self.in_plain_run = False
        self.collecting: deque[SocketTransport] = deque()
        self.raised: BaseException | None = None
        self._was_started_by_loop = False
        # Whether crash() ends the run of the loop.
        self._runs_loop = False
        super().__init__(*args)
        self._made_loop = loop is None
        if loop is None:
            loop = asyncio.SelectorEventLoop()
        if current:
            asyncio.set_event_loop(loop)
        self._asyncioEventloop = adopt(loop, self)
        self.calls_protocols = not loop.get_debug()

    # Those of Twisted's asyncio reactor would come first.
    callFromThread = ReactorBase.callFromThread  # type: ignore[assignment]
    stop = ReactorBase.stop

    # IReactorFDSet: the descriptors of asyncio are not listed, nor removed by
    # removeAll().

    def getReaders(self) -> list[Any]:
        """Return all readers of Twisted, including the reactor's own."""
        return [each for each in super().getReaders() if not isinstance(each, Watched)]

    def getWriters(self) -> list[Any]:
        """Return all writers of Twisted, as :meth:`EngineReactor.getWriters` does."""
        return [each for each in super().getWriters() if not isinstance(each, Watched)]

    def _dispatch(
        self, fields: LogContext, registration: Registration, ready: int, disarmed: int
    ) -> None:
        watched = registration.reader
        if ready == READ and type(watched) is Watched:
            # Nearly all events of asyncio are of this kind.
            unchecked = self._unchecked
            known = unchecked.get(registration, 0)
            if not known & READ:
                unchecked[registration] = known | READ
                if not watched.pending:
                    watched.reported.append(watched)
                watched.pending |= READ
            if disarmed:
                self._mark_unchecked(registration, disarmed & registration.interest)
            return
        watched = watched or registration.writer
        if (
            not isinstance(watched, Watched)
            or (registration.writer or watched) is not watched
        ):
            super()._dispatch(fields, registration, ready, disarmed)
            return
        if ready == READ and type(watched) is WatchedTransport:
            if registration.reader is not None and not (
                self._unchecked.get(registration, 0) & READ
            ):
                # The event may be the end of the stream, after which reading stops.
                self._mark_unchecked(registration, READ | disarmed)
                watched.doRead()
            return
        if ready & GONE:
            # Some kernels would report it again and again.  The selectors of asyncio
            # for the other kernels do not report it.
            self.removeReader(watched)
            self.removeWriter(watched)
            return
        if ready & HANGUP:
            ready = READ | WRITE
        # A call of this pass may have ended the interest and begun it anew.
        ready &= registration.interest & ~self._unchecked.get(registration, 0)
        if ready:
            watched.report(ready)
        self._mark_unchecked(registration, (ready | disarmed) & registration.interest)

    # Running

    def run(self, installSignalHandlers: bool = True) -> None:
        """
        See ``IReactorCore.run``.  It also returns when the loop ends: by
        ``loop.stop()``, or by a ``SystemExit`` or ``KeyboardInterrupt`` of a callback
        of asyncio.

        :raises ReactorAlreadyRunning: if the loop runs.
        :raises RuntimeError: if the loop is closed.
        """
        loop = self._asyncioEventloop
        if self._started and not self._was_started_by_loop:
            raise ReactorAlreadyRunning()
        if not self._startedBefore:
            if loop.is_running():
                raise ReactorAlreadyRunning(
                    "the event loop of the reactor runs already, and runs the reactor"
                )
            loop._check_closed()
            loop._check_running()
        self.startRunning(installSignalHandlers)
        try:
            self.mainLoop()
        finally:
            self._signals.uninstall()

    def startRunning(self, installSignalHandlers: bool = True) -> None:
        """
        Fire the startup events, in the event loop.

        The loop does this by itself if it is from :func:`new_event_loop`, or ran when
        the reactor was installed.  Then a call only installs the signal handlers.
        """
        if self._started and self._was_started_by_loop:
            self._was_started_by_loop = False
            if installSignalHandlers:
                self._installSignalHandlers = True
                self._signals = self._makeSignalHandling(True)
                self._signals.install()
            return
        with self._loop_current():
            super().startRunning(installSignalHandlers)

    @contextlib.contextmanager
    def _loop_current(self) -> Iterator[None]:
        """
        Make the loop the running one, for code that is called while it does not run.
        """
        if events._get_running_loop() is not None:
            yield
            return
        events._set_running_loop(self._asyncioEventloop)
        try:
            yield
        finally:
            events._set_running_loop(None)

    def mainLoop(self) -> None:
        """Run until stopped, by the reactor or by the loop."""
        loop = self._asyncioEventloop
        error = None
        self._runs_loop = True
        try:
            while self._started:
                try:
                    loop.run_forever()
                except BaseException as raised:
                    if error is not None:
                        # The second error: do not wait for the shutdown events.
                        self.crash()
                        raise
                    error = raised
                if self._started and not self._stopped:
                    self.stop()
            if error is not None:
                raise error
        finally:
            self._runs_loop = False
            # The traceback refers to this frame.
            del error
            self._notifier.close()

    def crash(self) -> None:
        """See ``IReactorCore.crash``."""
        ReactorBase.crash(self)
        if self._runs_loop:
            self._asyncioEventloop.stop()

    def iterate(self, delay: float = 0.0) -> None:
        """
        See ``IReactorCore.iterate``.  It runs the callbacks of asyncio as well, unless
        an event loop runs in this thread already.
        """
        loop = self._asyncioEventloop
        if events._get_running_loop() is not None or loop.is_closed():
            calls, self.calls_protocols = self.calls_protocols, False
            plain, self.in_plain_run = self.in_plain_run, False
            self.send_collected()
            try:
                ReactorBase.iterate(self, delay)
            finally:
                debug = loop.get_debug()
                self.calls_protocols = calls and not debug
                self.in_plain_run = plain and not debug
            return
        self.makes_one_pass = True
        timer = loop.call_later(delay, _nothing)
        try:
            loop.run_forever()
        finally:
            self.makes_one_pass = False
            timer.cancel()

    # For the event loop

    def send_collected(self) -> None:
        """Send the data that transports of asyncio have collected."""
        collecting = self.collecting
        while collecting:
            collecting.popleft().send_collected()

    def is_file(self, watched: Watched) -> bool:
        """
        Whether epoll refuses the descriptor, and so does asyncio's own selector on
        Linux.

        By that error programs find out that standard input is a file, for example.  The
        engine accepts files, and reports them as always ready, as poll(2) does.

        :raises OSError: EBADF
        """
        if not sys.platform.startswith("linux"):
            return False
        # If the notifier uses epoll, it has asked already.
        known = getattr(self._notifier, "has_refused", None)
        refused = None if known is None else known(watched.key.fd)
        return _is_refused(watched.key.fd) if refused is None else refused

    def start_by_loop(self) -> None:
        """Start the reactor: the loop runs, and nothing else starts the reactor."""
        self.starts_with_loop = False
        if not (self._started or self._startedBefore):
            self.startRunning(installSignalHandlers=False)
            self._was_started_by_loop = True

    def signal_handler_removed(self, number: int) -> None:
        """Restore the handler of a signal for which asyncio has removed its handler."""
        if not isinstance(self._signals, _Signals):
            return
        self._signals.hear_of_children()
        if number == signal.SIGINT:
            signal.signal(number, self.sigInt)
        elif number == signal.SIGTERM:
            signal.signal(number, self.sigTerm)

    def loop_closes(self) -> None:
        """Stop the reactor in order, if it runs, before the loop is closed."""
        if self._started:
            if events._get_running_loop() is not None:
                # Another loop runs, within which this one cannot run.
                self.crash()
            else:
                if not self._stopped:
                    self.stop()
                self.mainLoop()
        if unixEnabled and threading.current_thread() is threading.main_thread():
            self._signals.uninstall()

    def loop_closed(self) -> None:
        """Release all kernel resources: nothing runs the reactor any more."""
        self._notifier.close()
        waker, self.waker = self.waker, None
        if waker is not None and waker in self._internalReaders:
            self._removeInternalReader(waker)
            waker.connectionLost(Failure(RuntimeError("the event loop was closed")))

    # For twisted_rtsig.run()

    def end_asyncio(self, limit: float | None) -> Deferred[None]:
        """
        Cancel the tasks of asyncio, and end its asynchronous generators and threads, as
        ``asyncio.run`` does at the end.

        :param limit: how long to wait for the tasks, in seconds; None for no limit.
        """
        loop = self._asyncioEventloop
        return Deferred.fromFuture(loop.create_task(self._end_asyncio(limit)))

    async def _end_asyncio(self, limit: float | None) -> None:
        loop = self._asyncioEventloop
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            ended, left = await asyncio.wait(tasks, timeout=limit)
            for task in ended:
                if not task.cancelled() and task.exception() is not None:
                    message = "a task of asyncio's has failed when the program ended"
                    loop.call_exception_handler(
                        {
                            "message": message,
                            "exception": task.exception(),
                            "task": task,
                        }
                    )
            if left:
                _log.critical(
                    "{count} tasks of asyncio's were cancelled because the program "
                    "ends, and have not ended within {limit:g} s; they are dropped:\n"
                    "{tasks}",
                    count=len(left),
                    limit=limit,
                    tasks="\n".join(map(repr, left)),
                )
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()

    def close_own_loop(self) -> None:
        """Close the loop if the reactor has made it."""
        if self._made_loop:
            self._asyncioEventloop.close()

    def _signalsFactory(self) -> Any:
        return _Signals(self._asyncioEventloop, ReactorBase._signalsFactory(self))


def _nothing() -> None:
    pass


def _send_collected_before_fork() -> None:
    """Otherwise a child that goes on, or that ends the loop, would send it again."""
    loop: Any = events._get_running_loop()
    reactor = getattr(loop, "reactor", None)
    if isinstance(reactor, AsyncioEngineReactor):
        reactor.send_collected()


# Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_send_collected_before_fork)


class AsyncioReactor(AsyncioEngineReactor, SystemReactor):
    """
    The reactor of this package for this system (epoll on Linux, kqueue on BSD and
    macOS) and an asyncio event loop.

    :param loop: the event loop, an ``asyncio.SelectorEventLoop``.  None takes the one
        that runs in this thread, or else a new one, which becomes the current one
        (``asyncio.set_event_loop``).
    :raises twisted_rtsig.notifiers.UnsupportedReactorError: if the reactor cannot run
        here, or not in that loop; the message says why.
    """

    def __init__(self, loop: Any = None) -> None:
        super().__init__(loop)


class RealtimeSignalAsyncioReactor(AsyncioEngineReactor, RealtimeSignalReactor):
    """
    The realtime-signals reactor, and an asyncio event loop.

    :param loop: as of :class:`AsyncioReactor`.
    :param signal_number: as of :class:`RealtimeSignalReactor`.
    :raises twisted_rtsig.notifiers.UnsupportedReactorError: if the reactor cannot run
        here, or not in that loop; the message says why.
    """

    def __init__(self, loop: Any = None, signal_number: int | None = None) -> None:
        super().__init__(loop, signal_number)


_INSTALLED: Final = "twisted.internet.reactor"


def install(
    loop: asyncio.AbstractEventLoop | None = None, *, realtime_signals: bool = False
) -> None:
    """
    Install a reactor with an asyncio event loop.

    If the loop runs, the reactor is started at once, and stopped when the loop is
    closed.  Otherwise ``reactor.run()`` starts it, and runs the loop as well.

    :param loop: the event loop, as of :class:`AsyncioReactor`.  If it has a reactor
        already, that one is installed.
    :param realtime_signals: use realtime signals in place of epoll, on Linux.
    :raises ReactorAlreadyInstalledError: if a reactor is installed already.
    :raises twisted_rtsig.notifiers.UnsupportedReactorError: as :class:`AsyncioReactor`.
    """
    if _INSTALLED in sys.modules:
        raise ReactorAlreadyInstalledError("reactor already installed")
    if loop is None:
        loop = events._get_running_loop()
    reactor: AsyncioEngineReactor
    if isinstance(loop, EngineEventLoop) and not loop.is_closed():
        reactor = loop.reactor
    elif realtime_signals:
        reactor = RealtimeSignalAsyncioReactor(loop)
    else:
        reactor = AsyncioReactor(loop)
    installReactor(reactor)
    if reactor._asyncioEventloop.is_running():
        reactor.start_by_loop()


def new_event_loop() -> asyncio.SelectorEventLoop:
    """
    Return an event loop that runs a reactor while it waits, for ``asyncio.Runner``::

        asyncio.Runner(loop_factory=asyncioreactor.new_event_loop)

    In the main thread, if no reactor is installed, the reactor of the new loop is
    installed.  If a reactor of this module is installed, and its loop was not returned
    before, that loop is returned.  In both cases the reactor starts with the loop, and
    stops when the loop is closed.  In all other cases the loop has a reactor that is
    not installed: ``loop.reactor``.

    :raises twisted_rtsig.notifiers.UnsupportedReactorError: if the reactor cannot run
        here; the message says why.
    """
    installed: Any = sys.modules.get(_INSTALLED)
    if threading.current_thread() is not threading.main_thread() or not (
        installed is None or _can_be_handed_out(installed)
    ):
        loop: EngineEventLoop = _reactor_with_new_loop()._asyncioEventloop
        return loop
    if installed is None:
        installed = _reactor_with_new_loop()
        installReactor(installed)
    installed.starts_with_loop = True
    loop = installed._asyncioEventloop
    return loop


def _can_be_handed_out(reactor: Any) -> bool:
    return (
        isinstance(reactor, AsyncioEngineReactor)
        and not reactor.starts_with_loop
        and not (reactor._started or reactor._startedBefore)
        and not reactor._asyncioEventloop.is_closed()
        and not reactor._asyncioEventloop.is_running()
    )


def _reactor_with_new_loop() -> AsyncioReactor:
    _check_system()
    loop = asyncio.SelectorEventLoop()
    try:
        return AsyncioReactor(loop)
    except BaseException:
        loop.close()
        raise


def replace() -> None:
    """
    Replace Twisted's asyncio reactor by that of this module, for code that uses it by
    name: ``AsyncioSelectorReactor`` and ``install`` of
    ``twisted.internet.asyncioreactor`` are then those of this module, and so is
    ``--reactor=asyncio``.

    Call it before anything installs a reactor.
    """
    names: Any = twisteds
    names.AsyncioSelectorReactor = AsyncioReactor
    names.install = _install_for_twisted


def _install_for_twisted(eventloop: asyncio.AbstractEventLoop | None = None) -> None:
    """Do what ``twisted.internet.asyncioreactor.install`` does."""
    install(eventloop)


__all__ = [
    "AsyncioReactor",
    "RealtimeSignalAsyncioReactor",
    "install",
    "new_event_loop",
    "replace",
]
