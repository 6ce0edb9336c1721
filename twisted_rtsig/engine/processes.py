"""
The child processes of the engine's reactors, on POSIX.

They are those of Twisted, with four differences:

- ``posix_spawn`` starts a child wherever Twisted uses it, and also while a notifier
  blocks signals, which are then unblocked in the child.  A fork would copy the page
  tables, which takes 20 ms of the reactor's time if 1 GB is resident.
- The kernel tells the reactor when a child ends.  Twisted's reactors find out by
  SIGCHLD, which needs ``installSignalHandlers``, and when the child's pipes end, which
  is a moment before :func:`os.waitpid` knows of the end.
- A signal that is sent to a forked child before it runs its program is delivered when
  the program runs.  Otherwise the signal handlers of this process, which the child has
  inherited, would handle it, and the child would go on.
- A child can have the options of :class:`ChildOptions`, for example a session or a
  process group of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.posixbase import PosixReactorBase, unixEnabled
from zope.interface import implementer

from twisted_rtsig.notifiers import signal_mask

# The default of Twisted: a child without environment variables.
_NO_VARIABLES: Mapping[Any, Any] = {}

# In seconds: the pause before waitpid is called again for a child, doubled each time.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 1.0


@dataclass(frozen=True)
class ChildOptions:
    """
    Options for which Twisted's ``spawnProcess`` has no parameter.

    :ivar new_session: start the child in a session of its own: setsid(2).
    :ivar process_group: the process group that the child joins, or 0 for a new one;
        None for that of this process.
    :ivar umask: the umask of the child; None for that of this process.
    :ivar merge_errors: connect its standard error to the file of its standard output.
    """

    new_session: bool = False
    process_group: int | None = None
    umask: int | None = None
    merge_errors: bool = False


_NO_OPTIONS = ChildOptions()


def reap(child: Any) -> bool:
    """
    Reap ``child`` if it has ended, and tell it so.

    :param child: a process object of Twisted.
    :return: whether it has not ended yet, so that another call is needed.
    """
    if child.pid is None:
        # The handler of SIGCHLD has reaped it.
        return False
    try:
        number, status = os.waitpid(child.pid, os.WNOHANG)
    except ChildProcessError:
        # Other code in this process has called waitpid, or ignores SIGCHLD.  The status
        # is lost.
        return False
    if not number:
        return True
    process.unregisterReapProcessHandler(number, child)
    child.processEnded(status)
    return False


if unixEnabled:
    import fcntl

    from twisted.internet import process

    _TWISTEDS = process.Process._trySpawnInsteadOfFork

    class ChildProcess(process.Process):
        """A child process with pipes."""

        def __init__(
            self, *args: Any, options: ChildOptions = _NO_OPTIONS, **named: Any
        ) -> None:
            self._options = options
            # The signal mask of this thread before a fork, during which all signals are
            # blocked.
            self._mask: set[int] | None = None
            super().__init__(*args, **named)

        def _fork(self, *args: Any, **kwargs: Any) -> None:
            fdmap = kwargs["fdmap"]
            if self._options.merge_errors and 1 in fdmap:
                fdmap[2] = fdmap[1]
            try:
                super()._fork(*args, **kwargs)
            finally:
                if self._mask is not None:
                    signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            group = self._options.process_group
            if self._mask is not None and group is not None and self.pid is not None:
                # The child does the same.  The group can be signalled as soon as one of
                # both has done it.  It fails if the child already runs its program.
                with contextlib.suppress(OSError):
                    os.setpgid(self.pid, group)

        def _trySpawnInsteadOfFork(
            self,
            path: Any,
            uid: int | None,
            gid: int | None,
            executable: Any,
            args: Any,
            environment: Mapping[Any, Any] | None,
            kwargs: Mapping[str, Any],
        ) -> bool:
            """
            Start the child by :func:`os.posix_spawnp`, if that supports all that is
            asked for.

            :return: whether it was started.
            :raises OSError: if it cannot be started, ``FileNotFoundError`` for example.
            """
            if environment is None:
                # Twisted 23.10 would start it without environment variables.
                environment = os.environ
            options = self._options
            spawned = False
            if options.umask is not None:
                pass
            elif (
                signal_mask.blocked
                or options.new_session
                or options.process_group is not None
            ) and (
                # Twisted's tests replace the method, to have the child forked.
                process.Process._trySpawnInsteadOfFork is _TWISTEDS
            ):
                if (
                    uid is None
                    and gid is None
                    and (path is None or os.path.abspath(path) == os.path.abspath("."))
                    and not getattr(self._reactor, "_neverUseSpawn", False)
                ):
                    fdmap = kwargs["fdmap"]
                    spawned = self._spawn(executable, args, environment, fdmap)
            else:
                spawned = super()._trySpawnInsteadOfFork(
                    path, uid, gid, executable, args, environment, kwargs
                )
            if not spawned:
                self._mask = signal.pthread_sigmask(
                    signal.SIG_BLOCK, signal.valid_signals()
                )
            return bool(spawned)

        def _spawn(
            self, executable: Any, args: Any, environment: Mapping[Any, Any], fdmap: Any
        ) -> bool:
            options = self._options
            state = []
            for descriptor in process._listOpenFDs():
                try:
                    flags = fcntl.fcntl(descriptor, fcntl.F_GETFD)
                except OSError:
                    # It is the descriptor that the list was read from.
                    continue
                state.append((descriptor, bool(flags & fcntl.FD_CLOEXEC)))
            attributes: dict[str, Any] = {}
            if options.new_session:
                attributes["setsid"] = True
            if options.process_group is not None:
                attributes["setpgroup"] = options.process_group
            try:
                self.pid = os.posix_spawnp(
                    executable,
                    args,
                    environment,
                    file_actions=process._getFileActions(
                        state,
                        fdmap,
                        doClose=os.POSIX_SPAWN_CLOSE,
                        doDup2=os.POSIX_SPAWN_DUP2,
                    ),
                    setsigmask=signal_mask.mask_for_children(),
                    setsigdef=[
                        number
                        for number in range(1, signal.NSIG)
                        if signal.getsignal(number) == signal.SIG_IGN
                    ],
                    **attributes,
                )
            except (AttributeError, NotImplementedError):
                # The C library has no posix_spawnp, or no POSIX_SPAWN_SETSID.
                return False
            self.status = -1
            return True

        def _execChild(self, *args: Any) -> None:
            # This runs in the forked child.
            options = self._options
            if options.new_session:
                os.setsid()
            if options.process_group is not None:
                os.setpgid(0, options.process_group)
            if options.umask is not None:
                os.umask(options.umask)
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            assert self._mask is not None
            # Signals that were sent to it meanwhile are delivered now.
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask - signal_mask.blocked)
            # Twisted warns if the user stays the same, and a filter may make that an
            # error.
            warnings.simplefilter("ignore")
            super()._execChild(*args)

    def start_child(
        reactor: Any,
        protocol: Any,
        executable: Any,
        args: Sequence[Any],
        env: Mapping[Any, Any] | None,
        path: Any,
        uid: int | None,
        gid: int | None,
        childFDs: Mapping[int, Any] | None,
        options: ChildOptions = _NO_OPTIONS,
    ) -> ChildProcess:
        """
        Like ``spawnProcess`` without a terminal, on any reactor for POSIX.

        :raises OSError: see :meth:`ProcessReactor.spawnProcess`.
        """
        child = ChildProcess(
            *(reactor, executable, args, env, path),
            *(protocol, uid, gid, childFDs),
            options=options,
        )
        if isinstance(reactor, ProcessReactor) and child.pid is not None:
            reactor._watch_child(child)
        return child

    @implementer(IReadDescriptor)
    class _Pidfd:
        """
        A selectable that is readable once a child has ended: pidfd_open(2).

        :raises OSError: if the kernel cannot make one.
        """

        def __init__(self, reactor: ProcessReactor, child: Any) -> None:
            self._reactor = reactor
            self._child = child
            self._descriptor = os.pidfd_open(child.pid)

        def logPrefix(self) -> str:
            return "child process"

        def fileno(self) -> int:
            return self._descriptor

        def doRead(self) -> None:
            self._reactor._removeInternalReader(self)
            self.connectionLost(None)
            # While a debugger traces the child, waitpid does not know of its end.
            self._reactor._reap_until_ended(self._child, _FIRST_PAUSE)

        def connectionLost(self, reason: Any) -> None:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)


class ProcessReactor(PosixReactorBase):
    """Starts the children of this module in place of Twisted's."""

    def spawnProcess(
        self,
        processProtocol: Any,
        executable: Any,
        args: Sequence[Any] = (),
        env: Mapping[Any, Any] | None = _NO_VARIABLES,
        path: Any = None,
        uid: int | None = None,
        gid: int | None = None,
        usePTY: Any = False,
        childFDs: Mapping[int, Any] | None = None,
    ) -> Any:
        """
        See ``IReactorProcess.spawnProcess``.

        The end of the child is noticed with and without ``installSignalHandlers``.

        :raises OSError: if it cannot be started, ``FileNotFoundError`` for example.
            A child with a terminal, another user or another working directory is
            forked, and ends with status 1 instead.
        :raises ValueError: on Windows, if the child should have what Windows does not
            have: another user or group, a terminal, or other descriptors than the
            standard three.
        """
        return self._spawn_process(
            *(processProtocol, executable, args, env, path),
            **{"uid": uid, "gid": gid, "usePTY": usePTY, "childFDs": childFDs},
        )

    def _spawn_process(self, protocol: Any, *program: Any, **rest: Any) -> Any:
        """
        Do what ``spawnProcess`` does.

        :param program: ``executable``, ``args``, ``env`` and ``path``.
        :param rest: ``uid``, ``gid``, ``usePTY`` and ``childFDs``.
        """
        raise NotImplementedError

    if unixEnabled:

        def _spawn_process(self, protocol: Any, *program: Any, **rest: Any) -> Any:
            if not rest["usePTY"]:
                del rest["usePTY"]
                return start_child(self, protocol, *program, **rest)
            child = super().spawnProcess(protocol, *program, **rest)
            if child.pid is not None:
                self._watch_child(child)
            return child

        def _watch_child(self, child: Any) -> None:
            """Reap ``child`` when it ends."""
            try:
                pidfd = _Pidfd(self, child)
            except (AttributeError, OSError):
                # Linux before 5.3, a sandbox, or no descriptors are left.
                self._reap_until_ended(child, _FIRST_PAUSE)
            else:
                self._addInternalReader(pidfd)

        def _reap_until_ended(self, child: Any, pause: float) -> None:
            if reap(child):
                longer = min(2 * pause, _LONGEST_PAUSE)
                self.callLater(pause, self._reap_until_ended, child, longer)
