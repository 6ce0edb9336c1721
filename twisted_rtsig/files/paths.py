"""Functions that take the name of a file. All of them run in threads."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat as modes
from typing import Any, overload

from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.files.asyncfile import Data, copy_of
from twisted_rtsig.files.turns import Path
from twisted_rtsig.files.workers import workers_of


@must_be_awaited
def stat(
    path: Path, *, follow_symlinks: bool = True, reactor: object = None
) -> Operation[os.stat_result]:
    """
    As ``os.stat``.

    :param reactor: whose threads do it; by default that of the task.
    :raises OSError: (when awaited) if there is no such file.
    """
    return workers_of(reactor).call(f"to stat {path!r}", _stat, path, follow_symlinks)


def _stat(path: Path, follow_symlinks: bool) -> os.stat_result:
    return os.stat(path, follow_symlinks=follow_symlinks)


@overload
def listdir(
    path: str | os.PathLike[str] = ".", *, reactor: object = None
) -> Operation[list[str]]: ...


@overload
def listdir(
    path: bytes | os.PathLike[bytes], *, reactor: object = None
) -> Operation[list[bytes]]: ...


@must_be_awaited
def listdir(path: Path = ".", *, reactor: object = None) -> Operation[Any]:
    """
    The names in a directory, sorted, in the type of the path.

    :param reactor: whose threads do it; by default that of the task.
    :raises OSError: (when awaited) if it cannot be read.
    """
    return workers_of(reactor).call(f"to list {path!r}", _list, path)


def _list(path: Any) -> list[Any]:
    return sorted(os.listdir(path))


@must_be_awaited
def rename(source: Path, target: Path, *, reactor: object = None) -> Operation[None]:
    """
    Give a file another name.  One that has it already is replaced, on each platform.

    :param reactor: whose threads do it; by default that of the task.
    :raises OSError: (when awaited) if it cannot be done.
    """
    return workers_of(reactor).call(
        f"to rename {source!r} to {target!r}", os.replace, source, target
    )


@must_be_awaited
def remove(path: Path, *, reactor: object = None) -> Operation[None]:
    """
    Remove a file.

    :param reactor: whose threads do it; by default that of the task.
    :raises OSError: (when awaited) if it cannot be removed.
    """
    return workers_of(reactor).call(f"to remove {path!r}", os.remove, path)


@must_be_awaited
def write_file(
    path: Path,
    data: Data,
    *,
    permissions: int = 0o666,
    reactor: object = None,
) -> Operation[None]:
    """
    Let a file have this content, whole or not at all: whatever happens, whoever
    opens it finds what it was before, or ``data``.  When this is done, it is on the
    disk.

    A file that is there keeps its permissions, but not that it runs as its owner,
    who may be another now.  If it is a symbolic link, then the file is written that
    it leads to.

    :param permissions: those of a new file, less the umask.
    :param reactor: whose threads do it; by default that of the task.
    :raises OSError: (when awaited) if it cannot be written, or is no regular file.
    """
    return workers_of(reactor).call(
        f"to write {path!r}", _write_file, path, copy_of(data), permissions
    )


def _write_file(path: Path, data: bytes, permissions: int) -> None:
    target = os.path.realpath(os.fsdecode(path))
    # Those of a file that is there.
    kept: int | None = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if modes.S_ISDIR(mode):
            # Windows would call that a matter of permissions.
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not modes.S_ISREG(mode):
            # A device, a FIFO or the like, which would be there no more.
            raise OSError(errno.EINVAL, "Not a regular file", path)
        kept = mode & _PERMISSIONS
    folder = os.path.dirname(target)
    # Not of its name, which may be as long as a name can be.
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # Nobody may open it meanwhile who may not open the other.
    number = os.open(temporary, flags, permissions if kept is None else kept)
    try:
        with os.fdopen(number, "wb") as file:
            if kept is not None:
                # In spite of the umask.
                os.chmod(temporary, kept)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.remove(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):
        # So that the name is on the disk as well.
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


_PERMISSIONS = 0o777
