"""Functions of files by their paths.  All of them run in threads."""

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

    :param reactor: the reactor whose threads are used; by default that of the task.
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
    The names in a directory, sorted, and of the same type as the path.

    :param reactor: the reactor whose threads are used; by default that of the task.
    :raises OSError: (when awaited) if the directory cannot be read.
    """
    return workers_of(reactor).call(f"to list {path!r}", _list, path)


def _list(path: Any) -> list[Any]:
    return sorted(os.listdir(path))


@must_be_awaited
def rename(source: Path, target: Path, *, reactor: object = None) -> Operation[None]:
    """
    Rename a file, replacing an existing one on every platform.

    :param reactor: the reactor whose threads are used; by default that of the task.
    :raises OSError: (when awaited) if the file cannot be renamed.
    """
    return workers_of(reactor).call(
        f"to rename {source!r} to {target!r}", os.replace, source, target
    )


@must_be_awaited
def remove(path: Path, *, reactor: object = None) -> Operation[None]:
    """
    Remove a file.

    :param reactor: the reactor whose threads are used; by default that of the task.
    :raises OSError: (when awaited) if the file cannot be removed.
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
    Replace the content of a file atomically: whatever happens, the file has either its
    old content or ``data``.  When this is done, the data is on the disk.

    An existing file keeps its permissions, except for set-user-ID and set-group-ID,
    since its owner may change.  If the path is a symbolic link, its target is written.

    :param permissions: the permissions of a new file, less the umask.
    :param reactor: the reactor whose threads are used; by default that of the task.
    :raises OSError: (when awaited) if the file cannot be written, or is not a regular
        file.
    """
    return workers_of(reactor).call(
        f"to write {path!r}", _write_file, path, copy_of(data), permissions
    )


def _write_file(path: Path, data: bytes, permissions: int) -> None:
    target = os.path.realpath(os.fsdecode(path))
    # The permissions of an existing file.
    kept: int | None = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if modes.S_ISDIR(mode):
            # Windows would report missing permissions.
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not modes.S_ISREG(mode):
            # A device, a FIFO or the like, which would be replaced.
            raise OSError(errno.EINVAL, "Not a regular file", path)
        kept = mode & _PERMISSIONS
    folder = os.path.dirname(target)
    # The temporary name does not contain the name of the file, which may be as long as
    # a name can be.
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # With the permissions of the existing file, so that no other user can open the new
    # one in the meantime.
    number = os.open(temporary, flags, permissions if kept is None else kept)
    try:
        with os.fdopen(number, "wb") as file:
            if kept is not None:
                # os.open() has applied the umask.
                os.chmod(temporary, kept)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.remove(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):
        # The new name has to be on the disk as well.
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


_PERMISSIONS = 0o777
