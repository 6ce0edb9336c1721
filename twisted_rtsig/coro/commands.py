"""
Commands: what to start, and how.

A :class:`Command` checks the parameters of ``open_process`` and ``run_process``, finds
the program, and starts it.  ``children.py`` signals the process and waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from subprocess import DEVNULL, PIPE, STDOUT
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from twisted.internet.interfaces import IReactorProcess
from twisted.internet.protocol import ProcessProtocol

if TYPE_CHECKING:
    from twisted_rtsig.engine.processes import ChildOptions

_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR})

Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Variables = Mapping[str, Argument] | Mapping[bytes, Argument]


class HasFileno(Protocol):
    """A file, socket or pipe."""

    def fileno(self) -> int:
        """The file descriptor."""


StandardStream = int | HasFileno | None
"""
``subprocess.PIPE``, ``DEVNULL`` or ``STDOUT``, a file or a descriptor; None for the one
of this process.
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
    The program to start, and its options: the parameters of ``open_process``, checked
    and in the types that the system takes.

    :raises ValueError: if the arguments contradict each other, or the system does not
        support one of them.
    :raises OSError: if the program cannot be executed, or ``cwd`` cannot be entered.
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
                        f"{field.name}={value!r}: Windows does not support it"
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
        Start the process.

        :raises OSError: if the system cannot start it, or a descriptor is not open.
        :raises NotImplementedError: if the reactor does not support an option.
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
        """The descriptors of the child, as ``spawnProcess`` takes them."""
        with contextlib.ExitStack() as opened:
            descriptors: dict[int, Any] = {}
            for number, what in enumerate((self.stdin, self.stdout, self.stderr)):
                if what is None:
                    # A daemon may have closed its standard streams.
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
        f"{type(reactor).__name__} has a spawnProcess of its own, which does not "
        f"support {options}"
    )


def _open_descriptor(number: int) -> int:
    """
    Check that a descriptor is open, and return it.

    :raises OSError: if it is not.
    """
    os.fstat(number)
    return number


def _number_of_user(user: str | int | None) -> int | None:
    if not isinstance(user, str):
        return user
    import pwd

    return _number_of("user", user, lambda: pwd.getpwnam(user).pw_uid)


def _number_of_group(group: str | int | None) -> int | None:
    if not isinstance(group, str):
        return group
    import grp

    return _number_of("group", group, lambda: grp.getgrnam(group).gr_gid)


def _number_of(kind: str, name: str, look_up: Callable[[], int]) -> int:
    """:raises ValueError: if the system does not know the name."""
    try:
        return look_up()
    except KeyError:
        raise ValueError(f"{kind}={name!r}: there is no such {kind}") from None


def _native(argument: Argument) -> Any:
    """An argument as the system takes it: bytes, or on Windows text."""
    text = os.fsdecode(argument)
    if "\0" in text:
        raise ValueError(f"{argument!r} contains a null byte")
    return text if sys.platform == "win32" else os.fsencode(text)


def _find_program(name: str, env: dict[Any, Any] | None, cwd: Any) -> str:
    """
    Find a program: its absolute path, since the child may have another ``PATH`` and
    another working directory than this process.

    :raises OSError: as ``execvp`` does.  A failure of ``execvp`` in the forked child
        would show in its exit status only.
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
            # Report a file that cannot be executed rather than one that is missing.
            if has_folder or (error.errno not in _NOT_THERE and failure is missing):
                failure = error
        else:
            return path
    raise failure


def _check(path: Any, name: str, is_right: Callable[[int], bool], wrong: int) -> None:
    """
    Check that a path exists, has the right type, and can be executed or entered.

    :param name: the path to show in the error.
    :param wrong: the error number if the path has another type.
    :raises OSError: if the check fails.
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
