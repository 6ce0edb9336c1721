"""
Child processes without their streams: how they are started, signalled and waited
for.

``processes.py`` gives them streams, and ``commands.py`` runs a command and collects
its output.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from subprocess import DEVNULL, PIPE, STDOUT
from typing import TYPE_CHECKING, Any, Final, Protocol, TypedDict

from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IReactorProcess
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from twisted_rtsig.coro.census import Registry
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Finished, Operation
from twisted_rtsig.coro.scheduler import Scheduler, cancel_call

if TYPE_CHECKING:
    from twisted_rtsig.engine.processes import ChildOptions

GRACE: Final = 5.0
"""How many seconds a program has to end after it was asked to, by default."""

_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR})

Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Variables = Mapping[str, Argument] | Mapping[bytes, Argument]


class HasFileno(Protocol):
    """A file, socket or pipe."""

    def fileno(self) -> int:
        """Its descriptor."""


StandardStream = int | HasFileno | None
"""
``subprocess.PIPE``, ``DEVNULL`` or ``STDOUT``, a file or a descriptor; None for that of
this process.
"""


class ProcessOptions(TypedDict, total=False):
    """The options of ``open_process`` that ``run_process`` takes as well."""

    env: Variables | None
    cwd: Argument | None
    pass_fds: Sequence[int]
    start_new_session: bool
    process_group: int | None
    signal_group: bool
    user: str | int | None
    group: str | int | None
    umask: int
    grace: float
    reactor: Any | None


@dataclass
class Command:
    """
    What to start, and how: the parameters of ``open_process``, checked and in the
    types that the system takes.

    :raises ValueError: if the arguments contradict each other, or the system has
        nothing of the kind.
    :raises OSError: if the program cannot be executed, or ``cwd`` not be entered.
    """

    command: Sequence[Argument]
    stdin: StandardStream
    stdout: StandardStream
    stderr: StandardStream
    env: Variables | None = None
    cwd: Argument | None = None
    pass_fds: Sequence[int] = ()
    start_new_session: bool = False
    process_group: int | None = None
    signal_group: bool = False
    user: str | int | None = None
    group: str | int | None = None
    umask: int = -1

    def __post_init__(self) -> None:
        if isinstance(self.command, str | bytes | os.PathLike):
            raise TypeError(
                f"command={self.command!r}: give the program and its arguments as a "
                "list"
            )
        if not self.command:
            raise ValueError("the command is empty: give the program and its arguments")
        for name in ("stdin", "stdout"):
            if getattr(self, name) == STDOUT:
                raise ValueError(f"{name}=STDOUT: only stderr can be STDOUT")
        if sys.platform == "win32":
            for field in fields(self):
                value = getattr(self, field.name)
                if field.name in _NOT_ON_WINDOWS and value != field.default:
                    raise ValueError(
                        f"{field.name}={value!r}: Windows has nothing of the kind"
                    )
        if self.start_new_session and self.process_group is not None:
            raise ValueError(
                f"process_group={self.process_group} together with start_new_session: "
                "a new session has a new process group"
            )
        if self.signal_group and self.process_group:
            raise ValueError(
                f"signal_group together with process_group={self.process_group}: that "
                "group has other members; only a new one (0) is signalled as a whole"
            )
        self.arguments: list[Any] = [_native(each) for each in self.command]
        self.variables: dict[Any, Any] | None = None
        if self.env is not None:
            self.variables = {
                _native(name): _native(value) for name, value in self.env.items()
            }
        self.folder: Any | None = None if self.cwd is None else _native(self.cwd)
        if self.folder is not None:
            _check(self.folder, os.fsdecode(self.folder), stat.S_ISDIR, errno.ENOTDIR)
        self.program: str = _find_program(
            os.fsdecode(self.arguments[0]), self.variables, self.folder
        )

    def start(self, reactor: Any, protocol: ProcessProtocol) -> None:
        """
        Start it.

        :raises OSError: if the system cannot, or a descriptor is not open.
        :raises NotImplementedError: if the reactor has no means for it.
        """
        if sys.platform == "win32":
            self._start_on_windows(reactor, protocol)
        else:
            self._start_on_posix(reactor, protocol)

    def _start_on_posix(self, reactor: Any, protocol: ProcessProtocol) -> None:
        from twisted.internet.posixbase import PosixReactorBase

        from twisted_rtsig.engine.processes import (
            ChildOptions,
            ProcessReactor,
            start_child,
        )

        group = self.process_group
        if self.signal_group and not self.start_new_session:
            group = 0
        options = ChildOptions(
            self.start_new_session,
            group,
            None if self.umask < 0 else self.umask,
            self.stderr == STDOUT,
        )
        uid, gid = _number_of_user(self.user), _number_of_group(self.group)
        if (uid, gid) != (None, None) and 0 not in (os.getuid(), os.geteuid()):
            raise PermissionError(
                errno.EPERM, "only root can start a program as another user or group"
            )
        spawns = getattr(type(reactor), "spawnProcess", None)
        with self._descriptors() as descriptors:
            arguments = (protocol, self.program, self.arguments, self.variables)
            if isinstance(reactor, PosixReactorBase) and spawns in (
                PosixReactorBase.spawnProcess,
                ProcessReactor.spawnProcess,
            ):
                start_child(
                    *(reactor, *arguments, self.folder, uid, gid),
                    *(descriptors, options),
                )
            elif options == ChildOptions():
                IReactorProcess(reactor).spawnProcess(
                    *(*arguments, self.folder, uid, gid), childFDs=descriptors
                )
            else:
                raise NotImplementedError(_cannot(reactor, options))

    @contextlib.contextmanager
    def _descriptors(self) -> Iterator[dict[int, Any]]:
        """What each descriptor of the child is, as ``spawnProcess`` takes it."""
        with contextlib.ExitStack() as opened:
            descriptors: dict[int, Any] = {}
            for number, what in enumerate((self.stdin, self.stdout, self.stderr)):
                if what is None:
                    # A daemon may have closed its own.
                    with contextlib.suppress(OSError):
                        descriptors[number] = _open_descriptor(number)
                elif what == PIPE:
                    descriptors[number] = "r" if number else "w"
                elif what == DEVNULL:
                    null = os.open(os.devnull, os.O_RDWR)
                    opened.callback(os.close, null)
                    descriptors[number] = null
                elif what != STDOUT:
                    descriptors[number] = _open_descriptor(
                        what if isinstance(what, int) else what.fileno()
                    )
            for each in self.pass_fds:
                descriptors.setdefault(each, _open_descriptor(each))
            yield descriptors

    def _start_on_windows(self, reactor: Any, protocol: ProcessProtocol) -> None:
        from twisted_rtsig.iocpreactor import CompletionPortReactor
        from twisted_rtsig.windows.processes import WindowsProcess

        if not isinstance(reactor, CompletionPortReactor):
            raise NotImplementedError(
                f"on Windows, {type(reactor).__name__} has no streams for child "
                "processes: install the reactor of twisted_rtsig.iocpreactor"
            )
        WindowsProcess(
            *(reactor._port, protocol, self.program, self.arguments),
            *(self.variables, self.folder, (self.stdin, self.stdout, self.stderr)),
        )


_NOT_ON_WINDOWS = frozenset(
    {
        *("pass_fds", "start_new_session", "process_group", "signal_group"),
        *("user", "group", "umask"),
    }
)


def _cannot(reactor: Any, options: ChildOptions) -> str:
    return (
        f"{type(reactor).__name__} starts child processes in a way of its own, which "
        f"knows nothing of {options}"
    )


def _open_descriptor(number: int) -> int:
    """
    Check that a descriptor is open.

    :raises OSError: if it is not.
    """
    os.fstat(number)
    return number


def _number_of_user(user: str | int | None) -> int | None:
    if not isinstance(user, str):
        return user
    import pwd

    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ValueError(f"user={user!r}: there is no such user") from None


def _number_of_group(group: str | int | None) -> int | None:
    if not isinstance(group, str):
        return group
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ValueError(f"group={group!r}: there is no such group") from None


class Child:
    """
    A child process that was started, or is about to be.

    :param signal_group: whether signals go to its process group.
    """

    def __init__(self, scheduler: Scheduler, signal_group: bool) -> None:
        self._scheduler = scheduler
        self._signal_group = signal_group
        self._status: int | None = None
        self._waiters: dict[Operation[int], None] = {}
        self._transport: Any = None
        self._group = 0
        # The delayed call that kills it; and whether it was asked to end.
        self._kill_call: Any = None
        self._stopping = False
        processes.add(self)

    @property
    def pid(self) -> int | None:
        """The number of the process; None once it has ended."""
        pid: int | None = self._transport.pid
        return pid

    @property
    def returncode(self) -> int | None:
        """The exit status, as :meth:`wait` returns it; None as long as it runs."""
        return self._status

    @must_be_awaited
    def wait(self) -> Operation[int]:
        """
        The exit status, when it has exited: negative is the number of the signal
        that has ended it.  What it has written before may still be read.
        """
        if self._status is not None:
            finished: Finished[int] = Finished()
            finished.result = self._status
            return finished
        operation: Operation[int] = Operation()
        operation.owner = self
        self._waiters[operation] = None
        return operation

    def send_signal(self, signal: int | str) -> None:
        """
        Send a signal: to its process group, if it was opened with ``signal_group``.

        :param signal: a number, or a name with or without ``SIG``: ``"TERM"``.
        :raises ProcessLookupError: if the process has ended.
        :raises ValueError: if there is no such signal; on Windows for any but INT,
            TERM and KILL, each of which terminates the process.
        """
        number = _number_of_signal(signal)
        if self._signal_group and self.pid is not None:
            try:
                os.killpg(self._group, number)
            except (ProcessLookupError, PermissionError):
                # A forked child may not have made its group yet.
                pass
            else:
                return
        try:
            self._transport.signalProcess(number)
        except ProcessExitedAlready:
            raise ProcessLookupError(
                f"signal {signal}: the process has ended already"
            ) from None

    def terminate(self) -> None:
        """
        Ask it to end, by ``SIGTERM``.  On Windows as :meth:`kill`.

        :raises ProcessLookupError: if it has ended.
        """
        self.send_signal("TERM")

    def kill(self) -> None:
        """
        End it at once, by ``SIGKILL``.

        :raises ProcessLookupError: if it has ended.
        """
        self.send_signal("KILL")

    def stop(self, grace: float = GRACE) -> Operation[int]:
        """
        End it: terminate it now, and kill it if it has not ended within ``grace``
        seconds, whether this is awaited or not.  Can be called again, with less time.

        If it was opened with ``signal_group``, then what is left of its process group
        is killed when the process itself has ended.

        :return: as :meth:`wait`, also if it has ended already.
        :raises ValueError: if the time is negative.
        """
        check_grace(grace)
        if self._status is None:
            reactor = self._scheduler.reactor
            if not grace:
                self._kill_now()
            elif not self._stopping:
                self.terminate()
                self._kill_call = reactor.callLater(grace, self._kill_now)
            elif (
                self._kill_call is not None
                and self._kill_call.active()
                and self._kill_call.getTime() > reactor.seconds() + grace
            ):
                self._kill_call.reset(grace)
            self._stopping = True
        return self.wait()

    def _kill_now(self) -> None:
        self._cancel_kill_call()
        # It may have ended, and the reactor not know yet.
        with contextlib.suppress(ProcessLookupError):
            self.kill()

    def _cancel_kill_call(self) -> None:
        call, self._kill_call = self._kill_call, None
        cancel_call(call)

    async def _end(self, grace: float) -> None:
        """
        Stop it and wait for its end.  If that is cancelled, kill it and wait again.
        """
        try:
            await self.stop(grace)
        except ProcessLookupError:
            # Other code in this process has called waitpid: the status is lost.
            raise
        except BaseException as error:
            if self._status is None:
                self._kill_now()
                # Unless nothing can resume this any more.
                if not isinstance(error, GeneratorExit):
                    await self.wait()
            raise

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``."""
        self._waiters.pop(operation, None)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"the end of process {self.pid}"

    # From the protocol

    def _started(self, transport: Any) -> None:
        self._transport = transport
        # Of a new group: that of the process.
        self._group = transport.pid

    def _exited(self, reason: Failure) -> None:
        why: Any = reason.value
        number = getattr(why, "signal", None)
        self._status = -number if number else why.exitCode
        self._cancel_kill_call()
        if self._signal_group and self._stopping:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)
        waiters, self._waiters = self._waiters, {}
        for operation in waiters:
            # One that is resumed may cancel another.
            if not operation.called:
                operation.succeed(self._status)


processes: Final[Registry[Child]] = Registry()
"""Those of all reactors, as long as anything refers to them."""


def check_grace(grace: float) -> None:
    """:raises ValueError: if it is negative."""
    if not grace >= 0:
        raise ValueError(f"grace={grace}: 0 seconds is the least")


def _number_of_signal(name: int | str) -> Any:
    """As the transport takes it: a number, or on Windows a name."""
    if isinstance(name, str):
        short = name.removeprefix("SIG")
    else:
        short = next(
            (each.name[3:] for each in signal.Signals if each == name), str(name)
        )
    if sys.platform == "win32":
        if short not in ("INT", "TERM", "KILL"):
            raise ValueError(
                f"signal {name}: Windows can only end a process, by INT, TERM or KILL"
            )
        return short
    if not isinstance(name, str):
        return int(name)
    try:
        return int(signal.Signals[f"SIG{short}"])
    except KeyError:
        raise ValueError(f"signal {name}: there is no such signal") from None


def _native(argument: Argument) -> Any:
    """An argument as the system takes it: bytes, or text on Windows."""
    text = os.fsdecode(argument)
    if "\0" in text:
        raise ValueError(f"{argument!r} has a null byte in it")
    return text if sys.platform == "win32" else os.fsencode(text)


def _find_program(name: str, env: dict[Any, Any] | None, cwd: Any) -> str:
    """
    The path of a program, from the root on: the child may look for it in another
    environment and from another folder.

    :raises OSError: as ``execvp`` does.  In a child that is forked it could only be
        told from the exit status.
    """
    start = os.path.join(os.getcwd(), os.fsdecode(cwd or ""))
    has_folder = bool(os.path.dirname(name))
    why = (
        os.strerror(errno.ENOENT) if has_folder else "there is no such program in PATH"
    )
    missing = FileNotFoundError(errno.ENOENT, why, name)
    if sys.platform == "win32":
        if has_folder:
            found = shutil.which(os.path.join(start, name))
        else:
            variables = (env or {}).items()
            search = next(
                (each[1] for each in variables if each[0].upper() == "PATH"), None
            )
            found = shutil.which(name, path=search)
        if found is None:
            raise missing
        return found
    failure: OSError = missing
    for folder in [""] if has_folder else os.get_exec_path(env):
        path = os.path.join(start, folder, name)
        try:
            _check(path, name, stat.S_ISREG, errno.EACCES)
        except OSError as error:
            # Why one cannot be executed says more than where there is none.
            if has_folder or (error.errno not in _NOT_THERE and failure is missing):
                failure = error
        else:
            return path
    raise failure


def _check(path: Any, name: str, is_right: Callable[[int], bool], wrong: int) -> None:
    """
    Check that something is there, of the right kind, and can be executed or entered.

    :param name: what it is called in the error.
    :param wrong: the error if it is of another kind.
    :raises OSError: if it is not.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        code = error.errno or errno.ENOENT
    else:
        effective = os.access in os.supports_effective_ids
        if not is_right(mode):
            code = wrong
        elif os.access(path, os.X_OK, effective_ids=effective):
            return
        else:
            code = errno.EACCES
    raise OSError(code, os.strerror(code), name)
