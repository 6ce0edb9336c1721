"""
``pathlib.Path`` for tasks: methods that access the disk run in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypedDict, TypeVar, overload

from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.files.asyncfile import AsyncFile
from twisted_rtsig.files.directories import (
    Entries,
    OnError,
    scan,
    take_errors,
    walk_with,
)
from twisted_rtsig.files.opening import BytesMode, OpenOptions, TextMode, open_file
from twisted_rtsig.files.textfile import AsyncTextFile
from twisted_rtsig.files.workers import workers_of
from twisted_rtsig.typing_backports import Unpack

if sys.platform == "win32":
    from pathlib import PureWindowsPath as _PurePath
else:
    from pathlib import PurePosixPath as _PurePath

T = TypeVar("T")
Name = str | os.PathLike[str]


class CopyOptions(TypedDict, total=False):
    """The options of :meth:`Path.copy`."""

    follow_symlinks: bool
    preserve_metadata: bool


class Path(_PurePath):
    """
    A path, as ``pathlib.Path``.  Pure operations such as ``/``, ``name``, ``parent``
    and ``with_suffix`` are those of ``pathlib.PurePath``.  Methods that access the disk
    run in a thread, and return a Deferred::

        path = Path("folder") / "file"
        await path.parent.mkdir(exist_ok=True)
        await path.write_text("hello", encoding="utf-8")

    ``iterdir``, ``glob``, ``rglob`` and ``walk`` are for ``async for``; for generators
    see :class:`Entries`.

    Every function that takes a path takes this one.  It is equal to a ``pathlib.Path``
    of the same text.
    """

    __slots__ = ()

    # Paths of the process

    @classmethod
    def cwd(cls) -> Operation[Path]:
        """The current directory."""
        return _call("the current directory", lambda: cls(os.getcwd()))

    @classmethod
    def home(cls) -> Operation[Path]:
        """
        The home directory of the user.

        :raises RuntimeError: (when awaited) if it cannot be determined.
        """
        return _call("the home directory", lambda: cls(pathlib.Path.home()))

    @classmethod
    def from_uri(cls, uri: str) -> Path:
        """The path of a ``file:`` URI; from Python 3.13 on."""
        return cls(getattr(pathlib.Path, "from_uri")(uri))  # noqa: B009

    # Other paths

    @must_be_awaited
    def absolute(self) -> Operation[Path]:
        """The absolute path; symbolic links are not resolved."""
        return self._path("to make absolute", "absolute")

    @must_be_awaited
    def expanduser(self) -> Operation[Path]:
        """This path with a home directory in place of ``~`` or ``~user``."""
        return self._path("to expand", "expanduser")

    @must_be_awaited
    def readlink(self) -> Operation[Path]:
        """The target of a symbolic link."""
        return self._path("to read the link", "readlink")

    @must_be_awaited
    def resolve(self, strict: bool = False) -> Operation[Path]:
        """The absolute path, without symbolic links and ``..``."""
        return self._path("to resolve", "resolve", strict)

    @must_be_awaited
    def rename(self, target: Name) -> Operation[Path]:
        """Rename the file or directory; return the new path."""
        return self._path("to rename", "rename", os.fspath(target))

    @must_be_awaited
    def replace(self, target: Name) -> Operation[Path]:
        """As :meth:`rename`, replacing an existing file on every platform."""
        return self._path("to rename", "replace", os.fspath(target))

    # Copies

    @must_be_awaited
    def copy(
        self,
        target: Name,
        *,
        follow_symlinks: bool = True,
        preserve_metadata: bool = False,
    ) -> Operation[Path]:
        """
        Copy this file, or this directory and its content; return the target.

        A file replaces an existing target.  A directory does not.  This is
        ``pathlib.Path.copy`` of Python 3.14, on every Python.

        :param follow_symlinks: whether to copy the target of a symbolic link; otherwise
            the copy is a link to the same target.
        :param preserve_metadata: whether to copy times, permissions and the like too.
        :raises OSError: (when awaited) if it cannot be copied, for example because the
            target is this file, or is within this directory.
        """
        return self._to(
            "copy", self._copied, type(self)(target), follow_symlinks, preserve_metadata
        )

    @must_be_awaited
    def copy_into(
        self, target_dir: Name, **options: Unpack[CopyOptions]
    ) -> Operation[Path]:
        """
        As :meth:`copy`, under the same name in another directory.

        :raises ValueError: if this path has no name.
        """
        return self.copy(self._within(target_dir), **options)

    @must_be_awaited
    def move(self, target: Name) -> Operation[Path]:
        """
        Move this file, or this directory and its content; return the target.

        This is :meth:`replace`.  To another file system it copies, and then removes.

        :raises OSError: (when awaited) if it cannot be moved.
        """
        return self._to("move", self._moved, type(self)(target))

    @must_be_awaited
    def move_into(self, target_dir: Name) -> Operation[Path]:
        """
        As :meth:`move`, under the same name in another directory.

        :raises ValueError: if this path has no name.
        """
        return self._to("move", self._moved, self._within(target_dir))

    # Tests and properties

    @must_be_awaited
    def exists(self, *, follow_symlinks: bool = True) -> Operation[bool]:
        """Whether the path exists."""
        if follow_symlinks:
            return self._do("to look at", "exists")
        return _call(f"to look at {str(self)!r}", os.path.lexists, str(self))

    @must_be_awaited
    def is_block_device(self) -> Operation[bool]:
        """Whether it is a block device."""
        return self._do("to look at", "is_block_device")

    @must_be_awaited
    def is_char_device(self) -> Operation[bool]:
        """Whether it is a character device."""
        return self._do("to look at", "is_char_device")

    @must_be_awaited
    def is_dir(self) -> Operation[bool]:
        """Whether it is a directory, or a link to one."""
        return self._do("to look at", "is_dir")

    @must_be_awaited
    def is_fifo(self) -> Operation[bool]:
        """Whether it is a FIFO."""
        return self._do("to look at", "is_fifo")

    @must_be_awaited
    def is_file(self) -> Operation[bool]:
        """Whether it is a regular file, or a link to one."""
        return self._do("to look at", "is_file")

    @must_be_awaited
    def is_junction(self) -> Operation[bool]:
        """Whether it is a junction of Windows; from Python 3.12 on."""
        return self._do("to look at", "is_junction")

    @must_be_awaited
    def is_mount(self) -> Operation[bool]:
        """Whether it is a mount point."""
        return self._do("to look at", "is_mount")

    @must_be_awaited
    def is_socket(self) -> Operation[bool]:
        """Whether it is a UNIX socket."""
        return self._do("to look at", "is_socket")

    @must_be_awaited
    def is_symlink(self) -> Operation[bool]:
        """Whether it is a symbolic link."""
        return self._do("to look at", "is_symlink")

    @must_be_awaited
    def samefile(self, other: Name) -> Operation[bool]:
        """Whether both paths lead to the same file."""
        return self._do("to look at", "samefile", os.fspath(other))

    @must_be_awaited
    def stat(self, *, follow_symlinks: bool = True) -> Operation[os.stat_result]:
        """As ``os.stat``."""
        return self._do("to stat", "stat", follow_symlinks=follow_symlinks)

    @must_be_awaited
    def lstat(self) -> Operation[os.stat_result]:
        """As :meth:`stat`, for a link itself."""
        return self._do("to stat", "lstat")

    @must_be_awaited
    def owner(self) -> Operation[str]:
        """The name of the user that owns it."""
        return self._do("the owner of", "owner")

    @must_be_awaited
    def group(self) -> Operation[str]:
        """The name of the group that owns it."""
        return self._do("the group of", "group")

    # Changes

    @must_be_awaited
    def chmod(self, mode: int, *, follow_symlinks: bool = True) -> Operation[None]:
        """Change the permissions."""
        return self._do("to change", "chmod", mode, follow_symlinks=follow_symlinks)

    @must_be_awaited
    def lchmod(self, mode: int) -> Operation[None]:
        """As :meth:`chmod`, for a link itself."""
        return self._do("to change", "lchmod", mode)

    @must_be_awaited
    def hardlink_to(self, target: Name) -> Operation[None]:
        """Make this path a hard link to ``target``."""
        return self._do("to link", "hardlink_to", os.fspath(target))

    @must_be_awaited
    def symlink_to(
        self, target: Name, target_is_directory: bool = False
    ) -> Operation[None]:
        """Make this path a symbolic link to ``target``."""
        return self._do("to link", "symlink_to", os.fspath(target), target_is_directory)

    @must_be_awaited
    def mkdir(
        self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
    ) -> Operation[None]:
        """Make a directory."""
        return self._do("to make", "mkdir", mode, parents, exist_ok)

    @must_be_awaited
    def rmdir(self) -> Operation[None]:
        """Remove an empty directory."""
        return self._do("to remove", "rmdir")

    @must_be_awaited
    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> Operation[None]:
        """Make an empty file, or set the modification time of an existing one."""
        return self._do("to touch", "touch", mode, exist_ok)

    @must_be_awaited
    def unlink(self, missing_ok: bool = False) -> Operation[None]:
        """Remove a file or link."""
        return self._do("to remove", "unlink", missing_ok)

    # Contents

    @overload
    def open(
        self, mode: BytesMode, *, permissions: int = 0o666
    ) -> Operation[AsyncFile]: ...

    @overload
    def open(
        self, mode: TextMode = "r", **options: Unpack[OpenOptions]
    ) -> Operation[AsyncTextFile]: ...

    @overload
    def open(self, mode: str, **options: Unpack[OpenOptions]) -> Operation[Any]: ...

    @must_be_awaited
    def open(self, mode: str = "r", **options: Any) -> Operation[Any]:
        """As :func:`open_file`; the default mode is for text."""
        return open_file(self, mode, **options)

    @must_be_awaited
    def read_bytes(self) -> Operation[bytes]:
        """The content of the file."""
        return self._do("to read", "read_bytes")

    @must_be_awaited
    def read_text(
        self,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Operation[str]:
        """The content of the file, as text."""
        return _call(
            *(f"to read {str(self)!r}", _read_text, str(self)),
            *(encoding, errors, newline),
        )

    @must_be_awaited
    def write_bytes(self, data: bytes | bytearray | memoryview) -> Operation[int]:
        """Replace the content of the file; return the number of bytes."""
        return self._do("to write", "write_bytes", bytes(memoryview(data)))

    @must_be_awaited
    def write_text(
        self,
        data: str,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Operation[int]:
        """As :meth:`write_bytes`, for text; return the number of characters."""
        if not isinstance(data, str):
            raise TypeError(f"{data!r} is not text: use write_bytes() for bytes")
        return self._do("to write", "write_text", data, encoding, errors, newline)

    # Directories

    def iterdir(self) -> Entries[Path]:
        """
        The paths in the directory, in no particular order, for ``async for``.  The list
        is never in memory as a whole.
        """
        return self._entries(lambda: (self / each.name for each in scan(self)))

    def glob(
        self, pattern: str, *, case_sensitive: bool | None = None
    ) -> Entries[Path]:
        """
        The paths that match a pattern, for ``async for``.

        :param case_sensitive: whether case matters, by default as on the platform;
            from Python 3.12 on.
        :raises ValueError: (when awaited) if the pattern is empty.
        :raises NotImplementedError: (when awaited) if the pattern is absolute.
        """
        return self._matches("glob", pattern, case_sensitive)

    def rglob(
        self, pattern: str, *, case_sensitive: bool | None = None
    ) -> Entries[Path]:
        """As :meth:`glob`, at any depth."""
        return self._matches("rglob", pattern, case_sensitive)

    def walk(
        self,
        top_down: bool = True,
        on_error: OnError | None = None,
        follow_symlinks: bool = False,
    ) -> Entries[tuple[Path, list[str], list[str]]]:
        """
        This directory and all directories below it, for ``async for``, as
        ``pathlib.Path.walk`` of Python 3.12.  See also :func:`walk`.
        """

        def find(told: bool) -> Iterator[_Walked | OSError]:
            return _walk(self, top_down, told, follow_symlinks)

        return walk_with(find, str(self), top_down, on_error)

    def _matches(
        self, name: str, pattern: str, case_sensitive: bool | None
    ) -> Entries[Path]:
        options = {} if case_sensitive is None else {"case_sensitive": case_sensitive}
        search = getattr(pathlib.Path(self), name)
        return self._entries(
            lambda: (type(self)(each) for each in search(pattern, **options))
        )

    def _entries(self, iterate: Callable[[], Iterator[Path]]) -> Entries[Path]:
        return Entries(f"to list {str(self)!r}", workers_of(None), iterate)

    def _do(self, what: str, name: str, *args: Any, **options: Any) -> Operation[Any]:
        """Call a method of ``pathlib.Path`` in a thread."""
        method = functools.partial(getattr(pathlib.Path(self), name), *args, **options)
        return _call(f"{what} {str(self)!r}", method)

    def _path(self, what: str, name: str, *args: Any) -> Operation[Path]:
        """As :meth:`_do`, for a method that returns a path."""
        method = getattr(pathlib.Path(self), name)
        return _call(f"{what} {str(self)!r}", lambda: type(self)(method(*args)))

    def _within(self, target_dir: Name) -> Path:
        if not self.name:
            raise ValueError(f"{str(self)!r} has no name")
        return type(self)(target_dir, self.name)

    def _to(
        self, what: str, function: Callable[..., None], target: Path, *args: Any
    ) -> Operation[Path]:
        """Call a function of this path and a target in a thread."""

        def call() -> Path:
            function(target, *args)
            return target

        return _call(f"to {what} {str(self)!r}", call)

    def _copied(
        self, target: Path, follow_symlinks: bool, preserve_metadata: bool
    ) -> None:
        source, whole_target = os.path.abspath(self), os.path.abspath(target)
        if whole_target == source:
            raise _refusal("are the same path", str(self), str(target))
        if whole_target.startswith(os.path.join(source, "")):
            raise _refusal("cannot be within one another", str(self), str(target))
        _copy(str(self), str(target), follow_symlinks, preserve_metadata)

    def _moved(self, target: Path) -> None:
        _refuse_same(str(self), str(target))
        try:
            os.replace(self, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            return
        self._copied(target, False, True)
        if os.path.isdir(self) and not os.path.islink(self):
            shutil.rmtree(self)
        else:
            os.remove(self)


def _copy(
    source: str, target: str, follow_symlinks: bool, preserve_metadata: bool
) -> None:
    if os.path.islink(source) and not follow_symlinks:
        os.symlink(os.readlink(source), target, os.path.isdir(source))
    elif os.path.isdir(source):
        names = os.listdir(source)
        os.mkdir(target)
        for name in names:
            _copy(
                *(os.path.join(source, name), os.path.join(target, name)),
                *(follow_symlinks, preserve_metadata),
            )
    else:
        _refuse_same(source, target)
        shutil.copyfile(source, target)
    if preserve_metadata:
        shutil.copystat(source, target, follow_symlinks=follow_symlinks)


def _refuse_same(source: str, target: str) -> None:
    same = False
    # Usually the target does not exist, which is an error here.
    with contextlib.suppress(OSError):
        same = os.path.samefile(source, target)
    if same:
        raise _refusal("are the same file", source, target)


def _refusal(why: str, source: str, target: str) -> OSError:
    message = f"Source and target {why}"
    return OSError(errno.EINVAL, message, source, None, target)


def _call(what: str, function: Callable[..., T], *args: Any) -> Operation[T]:
    return workers_of(None).call(what, function, *args)


def _read_text(
    path: str, encoding: str | None, errors: str | None, newline: str | None
) -> str:
    with open(path, encoding=encoding, errors=errors, newline=newline) as file:
        return file.read()


# A directory, and the names of the directories and of the others in it.
_Walked = tuple[Path, list[str], list[str]]


def _walk(
    top: Path, top_down: bool, told: bool, follow_symlinks: bool
) -> Iterator[_Walked | OSError]:
    """
    As ``pathlib.Path.walk``.

    :param told: whether to yield the errors in between.
    """
    pending: list[Path | _Walked] = [top]
    while pending:
        path = pending.pop()
        if isinstance(path, tuple):
            yield path
            continue
        directories: list[str] = []
        files: list[str] = []
        try:
            for entry in scan(path):
                is_directory = _is_directory(entry, follow_symlinks)
                (directories if is_directory else files).append(entry.name)
        except OSError as error:
            if told:
                yield from take_errors([error])
            continue
        if top_down:
            yield path, directories, files
        else:
            pending.append((path, directories, files))
        pending += [path / each for each in reversed(directories)]


def _is_directory(entry: os.DirEntry[str], follow_symlinks: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow_symlinks)
    except OSError:
        return False
