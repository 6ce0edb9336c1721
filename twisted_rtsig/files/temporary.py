"""
Temporary files and directories: those of ``tempfile``, made and removed in threads.

A file that was made is removed again, even if the wait for it was cancelled.  See
``docs/files.md``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import sys
import tempfile
from typing import Any, Generic, TypedDict, TypeVar, cast, overload

from twisted.python.failure import Failure

from twisted_rtsig.coro.closing import ClosedAtExit
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.files.asyncfile import AsyncFile
from twisted_rtsig.files.descriptors import Descriptor, SeekingDescriptor
from twisted_rtsig.files.making import Certain, Making
from twisted_rtsig.files.opening import BytesMode, TextMode, TextOptions, check_mode
from twisted_rtsig.files.spooled import SpooledDescriptor, SpooledRaw
from twisted_rtsig.files.textfile import AsyncTextFile
from twisted_rtsig.files.turns import Call
from twisted_rtsig.files.workers import workers_of
from twisted_rtsig.typing_backports import Unpack

F = TypeVar("F", AsyncFile, AsyncTextFile)


# Files


class TemporaryOptions(TypedDict, total=False):
    """The name and place of a temporary file, and the reactor whose threads make it."""

    suffix: str | None
    prefix: str | None
    dir: str | os.PathLike[str] | None
    reactor: object


class TemporaryTextOptions(TemporaryOptions, TextOptions, total=False):
    """The options of a temporary file of text."""


class _Temporary(ClosedAtExit, Generic[F]):
    """The base class of temporary files: not yet open, open, or closed."""

    def __init__(
        self,
        mode: str,
        *,
        dir: str | os.PathLike[str] | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        suffix: str | None = None,
        prefix: str | None = None,
        reactor: object = None,
    ) -> None:
        self._binary = check_mode(mode, encoding, errors, newline)
        self._mode = mode
        self._text_options = (encoding, errors, newline)
        self._names = (suffix, prefix, dir)
        self._workers = workers_of(reactor)
        self._file: F | None = None

    @must_be_awaited
    def open(self) -> Operation[F]:
        """
        Make the file, in code that has no ``async with``.  :meth:`close` removes it.

        :raises OSError: (when awaited) if the file cannot be made.
        """
        making: Making[F] = Making(
            "to make a temporary file", self._workers, self._opened, self._undo
        )
        self._workers.run(making, self._make)
        return making.operation

    def close(self) -> Operation[None]:
        """
        Close the file and remove it, even if the wait for that is cancelled.

        :raises RuntimeError: if the file was not opened.
        """
        if self._file is None:
            raise RuntimeError(f"{type(self).__name__} was not opened: await open()")
        return self._file.close()

    async def __aenter__(self) -> F:
        return await self.open()

    def _close_at_exit(self) -> Operation[None]:
        return self.close()

    def _opened(self, made: tuple[Any, Any]) -> F:
        made_file, name = made
        if isinstance(made_file, io.TextIOWrapper):
            newline = self._text_options[2]
            opened: Any = AsyncTextFile(
                *(made_file, name, self._mode, newline, self._workers)
            )
        else:
            found = self._found(made_file)
            opened = AsyncFile(made_file, name, self._mode, found, self._workers)
        file = self._file = cast(F, opened)
        return file

    # In threads

    def _make(self) -> tuple[Any, Any]:
        """Make the file; return the open file, and its name."""
        raise NotImplementedError

    def _undo(self, made: tuple[Any, Any]) -> None:
        made[0].close()

    def _found(self, made: Descriptor) -> os.stat_result:
        return os.fstat(made.number)

    def _wrap(self, number: int) -> io.TextIOWrapper | Descriptor:
        """The object that reads and writes the descriptor."""
        if self._binary:
            return _descriptor_of(number)
        encoding, errors, newline = self._text_options
        # open() closes the descriptor if there is no such encoding.
        file = open(  # noqa: SIM115
            *(number, self._mode), encoding=encoding, errors=errors, newline=newline
        )
        assert isinstance(file, io.TextIOWrapper)
        return file


def _descriptor_of(number: int) -> Descriptor:
    return (Descriptor if hasattr(os, "pread") else SeekingDescriptor)(number)


class TemporaryFile(_Temporary[F]):
    """
    A file without a name, which disappears when it is closed::

        async with TemporaryFile() as file:
            await file.write(data)

    The block gets the type of file that :func:`open_file` returns for the mode.
    Generators call :meth:`open` and :meth:`close`.

    :param mode: as for :func:`open_file`, and so are ``encoding``, ``errors`` and
        ``newline``.
    :param suffix: as for ``tempfile``, and so are ``prefix`` and ``dir``.
    :param reactor: the reactor in whose threads the blocking calls run; by default
        that of the task.
    :raises ValueError: if ``open_file`` has no such mode.
    """

    @overload
    def __init__(
        self: TemporaryFile[AsyncFile],
        mode: BytesMode = "w+b",
        **options: Unpack[TemporaryOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: TemporaryFile[AsyncTextFile],
        mode: TextMode,
        **options: Unpack[TemporaryTextOptions],
    ) -> None: ...

    def __init__(
        self,
        mode: str = "w+b",
        **options: Unpack[TemporaryTextOptions],
    ) -> None:
        super().__init__(mode, **options)

    def _make(self) -> tuple[Any, Any]:
        return self._wrap(_open_nameless(*self._names)), "(temporary file)"


def _open_nameless(
    suffix: str | None, prefix: str | None, dir: str | os.PathLike[str] | None
) -> int:
    with tempfile.TemporaryFile(
        buffering=0, suffix=suffix, prefix=prefix, dir=dir
    ) as file:
        # The file disappears with its last descriptor, on Windows as well.
        return os.dup(file.fileno())


class SpooledTemporaryFile(_Temporary[F]):
    """
    As :class:`TemporaryFile`, but kept in memory until it has more than ``max_size``
    bytes.  Until then reads and writes of bytes are done at once::

        async with SpooledTemporaryFile(1 << 20) as file:
            await file.write(data)

    :param max_size: the number of bytes that are kept in memory; with 0 there is no
        limit, and only :meth:`rollover` makes a file.
    :param mode: as for :class:`TemporaryFile`, and so are the other parameters.
    :raises ValueError: if the size is negative, or ``open_file`` has no such mode.
    """

    @overload
    def __init__(
        self: SpooledTemporaryFile[AsyncFile],
        max_size: int = 0,
        mode: BytesMode = "w+b",
        **options: Unpack[TemporaryOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: SpooledTemporaryFile[AsyncTextFile],
        max_size: int = 0,
        mode: TextMode = ...,
        **options: Unpack[TemporaryTextOptions],
    ) -> None: ...

    def __init__(
        self,
        max_size: int = 0,
        mode: str = "w+b",
        **options: Unpack[TemporaryTextOptions],
    ) -> None:
        super().__init__(mode, **options)
        if max_size < 0:
            raise ValueError(f"max_size={max_size}: 0 is the least")
        self._max_size = max_size or sys.maxsize

    @must_be_awaited
    def rollover(self) -> Operation[None]:
        """
        Move the content from memory to a file, unless that was done before.

        :raises RuntimeError: if the file was not opened.
        :raises ValueError: if the file is closed.
        :raises OSError: (when awaited) if the file cannot be made or written; the
            content stays in memory then.
        """
        file: Any = self._file
        if file is None:
            raise RuntimeError("SpooledTemporaryFile was not opened: await open()")
        file._check_open()
        rolling: Operation[None] = file._in_turn(
            Call("to make a file of", file, self._descriptor.roll_over)
        )
        return rolling

    def _make(self) -> tuple[Any, Any]:
        self._descriptor = descriptor = SpooledDescriptor(
            self._max_size, lambda: _descriptor_of(_open_nameless(*self._names))
        )
        if self._binary:
            return descriptor, "(spooled file)"
        encoding, errors, newline = self._text_options
        buffered = io.BufferedRandom(SpooledRaw(descriptor))
        return io.TextIOWrapper(buffered, encoding, errors, newline), "(spooled file)"

    def _found(self, made: Descriptor) -> os.stat_result:
        # There is no file yet.
        return os.stat_result((stat.S_IFREG | 0o600, *[0] * 9))


class NamedTemporaryFile(_Temporary[F]):
    """
    A file with a name, :attr:`AsyncFile.name`, which is removed at the end of the
    block::

        async with NamedTemporaryFile(suffix=".csv") as file:
            await file.write(data)
            await run_process(["sort", file.name])

    Within the block other programs can open it by its name, on Windows as well.  The
    file may be closed within the block.  Generators call :meth:`open` and
    :meth:`close`.

    :param mode: as for :class:`TemporaryFile`, and so are the other parameters.
    :param delete: whether to remove the file.
    :raises ValueError: if ``open_file`` has no such mode.
    """

    @overload
    def __init__(
        self: NamedTemporaryFile[AsyncFile],
        mode: BytesMode = "w+b",
        *,
        delete: bool = True,
        **options: Unpack[TemporaryOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: NamedTemporaryFile[AsyncTextFile],
        mode: TextMode,
        *,
        delete: bool = True,
        **options: Unpack[TemporaryTextOptions],
    ) -> None: ...

    def __init__(
        self,
        mode: str = "w+b",
        *,
        delete: bool = True,
        **options: Unpack[TemporaryTextOptions],
    ) -> None:
        super().__init__(mode, **options)
        self._delete = delete

    def close(self) -> Operation[None]:
        """See ``TemporaryFile.close``."""
        closing = super().close()
        file = self._file
        if not self._delete or file is None:
            return closing
        removing: Certain = Certain(f"to remove {file.name!r}")

        def closed(result: Any) -> None:
            # Remove the file even if it could not be closed.
            error = result.value if isinstance(result, Failure) else None
            self._workers.run(removing, _remove, file.name, error)

        closing.addBoth(closed)
        return removing.operation

    def _make(self) -> tuple[Any, Any]:
        number, path = tempfile.mkstemp(*self._names)
        try:
            return self._wrap(number), path
        except BaseException:
            os.remove(path)
            raise

    def _undo(self, made: tuple[Any, Any]) -> None:
        super()._undo(made)
        os.remove(made[1])


def _remove(path: Any, error: BaseException | None) -> None:
    # The program may have removed it.
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    if error is not None:
        raise error


# Directories


class TemporaryDirectory(ClosedAtExit):
    """
    A directory that is removed at the end of the block, with its content::

        async with TemporaryDirectory() as path:
            await write_file(os.path.join(path, "file"), data)

    Generators call :meth:`create` and :meth:`cleanup`.

    :param suffix: as for ``tempfile``, and so are ``prefix``, ``dir`` and
        ``ignore_cleanup_errors``.
    :param reactor: the reactor in whose threads the blocking calls run; by default
        that of the task.
    """

    def __init__(
        self,
        suffix: str | None = None,
        prefix: str | None = None,
        dir: str | os.PathLike[str] | None = None,
        ignore_cleanup_errors: bool = False,
        *,
        reactor: Any | None = None,
    ) -> None:
        self._make = functools.partial(
            tempfile.TemporaryDirectory,
            suffix=suffix,
            prefix=prefix,
            dir=None if dir is None else os.fspath(dir),
            ignore_cleanup_errors=ignore_cleanup_errors,
        )
        self._workers = workers_of(reactor)
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    @must_be_awaited
    def create(self) -> Operation[str]:
        """
        Make the directory; return its path.

        :raises OSError: (when awaited) if it cannot be made.
        """
        making: Making[str] = Making(
            *("to make a temporary directory", self._workers),
            *(self._created, tempfile.TemporaryDirectory.cleanup),
        )
        self._workers.run(making, self._make)
        return making.operation

    def _created(self, directory: tempfile.TemporaryDirectory[str]) -> str:
        self._directory = directory
        return directory.name

    def cleanup(self) -> Operation[None]:
        """
        Remove the directory and its content, even if the wait for that is cancelled.

        :raises RuntimeError: if the directory was not made.
        :raises OSError: (when awaited) if something cannot be removed.
        """
        directory = self._directory
        if directory is None:
            raise RuntimeError("TemporaryDirectory was not made: await create()")
        removing = Certain(f"to remove {directory.name!r}")
        self._workers.run(removing, directory.cleanup)
        return removing.operation

    async def __aenter__(self) -> str:
        return await self.create()

    def _close_at_exit(self) -> Operation[None]:
        return self.cleanup()
