"""Opening files, of bytes and of text, by their modes."""

from __future__ import annotations

import os
from typing import Any, Final, Literal, TypedDict, TypeVar, overload

from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation, finished
from twisted_rtsig.files.asyncfile import AsyncFile
from twisted_rtsig.files.open_calls import open_cached, open_descriptor, open_text
from twisted_rtsig.files.textfile import AsyncTextFile
from twisted_rtsig.files.turns import Path
from twisted_rtsig.files.workers import Job, Workers, finish, workers_of
from twisted_rtsig.typing_backports import Unpack

F = TypeVar("F", AsyncFile, AsyncTextFile)

# By mode, without its "b".
_FLAGS: Final = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "x+": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}

BytesMode = Literal[
    "rb",
    "br",
    "r+b",
    "rb+",
    "wb",
    "bw",
    "w+b",
    "wb+",
    "ab",
    "ba",
    "a+b",
    "ab+",
    "xb",
    "bx",
    "x+b",
    "xb+",
]
TextMode = Literal[
    "r",
    "rt",
    "r+",
    "r+t",
    "rt+",
    "w",
    "wt",
    "w+",
    "w+t",
    "wt+",
    "a",
    "at",
    "a+",
    "a+t",
    "at+",
    "x",
    "xt",
    "x+",
    "x+t",
    "xt+",
]


class TextOptions(TypedDict, total=False):
    """How a file of text is encoded: see :func:`open_file`."""

    encoding: str | None
    errors: str | None
    newline: str | None


class OpenOptions(TextOptions, total=False):
    """The options of :func:`open_file` for text, but for the reactor."""

    permissions: int


class OpenFileOptions(OpenOptions, total=False):
    """The options of :func:`open_file` for text."""

    reactor: object


@overload
def open_file(
    path: Path,
    mode: BytesMode = "rb",
    *,
    permissions: int = 0o666,
    reactor: object = None,
) -> Operation[AsyncFile]: ...


@overload
def open_file(
    path: Path, mode: TextMode, **options: Unpack[OpenFileOptions]
) -> Operation[AsyncTextFile]: ...


@overload
def open_file(
    path: Path, mode: str, **options: Unpack[OpenFileOptions]
) -> Operation[Any]: ...


@must_be_awaited
def open_file(
    path: Path,
    mode: str = "rb",
    *,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    permissions: int = 0o666,
    reactor: object = None,
) -> Operation[Any]:
    """
    Open a regular file::

        async with await open_file("data") as file:

    :param mode: as for Python's ``open``: ``r``, ``w``, ``a`` or ``x``, and ``+`` for
        both directions.  With ``b`` the file is an :class:`AsyncFile`, of bytes;
        without ``b`` it is an :class:`AsyncTextFile`.
    :param encoding: the encoding of text; by default that of the locale.
    :param errors: for text, the error handler of ``codecs``.
    :param newline: for text, the ends of lines, as for Python's ``open``.
    :param permissions: the permissions of a new file, less the umask.
    :param reactor: the reactor in whose threads the blocking calls run; by default
        that of the task.
    :raises ValueError: if the mode is not one of these, or is for bytes and there is
        an encoding.
    :raises OSError: (when awaited) if the file cannot be opened, or is not a regular
        file.
    """
    binary = check_mode(mode, encoding, errors, newline)
    workers = workers_of(reactor)
    if not binary:
        opening_text = _OpenText(path, mode, newline, workers)
        workers.run(
            *(opening_text, open_text, path, mode, permissions),
            *(encoding, errors, newline),
        )
        return opening_text.operation
    flags = _FLAGS[mode.replace("b", "")]
    opened = open_cached(path) if flags == os.O_RDONLY else None
    if opened is not None:
        return finished(AsyncFile(opened[0], path, mode, opened[1], workers))
    opening = _Open(path, mode, workers)
    workers.run(opening, open_descriptor, path, flags, permissions)
    return opening.operation


def check_mode(
    mode: str, encoding: str | None, errors: str | None, newline: str | None
) -> bool:
    """
    Check the arguments of :func:`open_file`.

    :return: whether the file is opened for bytes.
    :raises ValueError: if they are wrong or contradict each other.
    """
    kind = mode.replace("b", "", 1) if "b" in mode else mode.replace("t", "", 1)
    if kind not in _FLAGS:
        raise ValueError(
            f"mode={mode!r}: use 'r', 'w', 'a' or 'x' for text, add 'b' for bytes, and "
            "'+' for both directions"
        )
    if "b" not in mode:
        if newline not in (None, "", "\n", "\r", "\r\n"):
            raise ValueError(
                f"newline={newline!r}: use None, '', '\\n', '\\r' or '\\r\\n'"
            )
        return False
    if (encoding, errors, newline) != (None, None, None):
        raise ValueError(
            f"mode={mode!r} is for bytes, which have no encoding, errors or newline: "
            "leave out the 'b' for text"
        )
    return True


class _Opening(Job[F]):
    __slots__ = ("_mode", "_path", "_workers")

    def __init__(self, path: Path, mode: str, workers: Workers) -> None:
        super().__init__(f"to open {path!r}")
        self._path = path
        self._mode = mode
        self._workers = workers

    def _file_of(self, result: Any) -> F:
        raise NotImplementedError

    def end(self, result: Any, error: BaseException | None) -> None:
        file = None
        if error is None:
            file = self._file_of(result)
            if self.operation.called:
                # It was cancelled too late.
                file.close()
        finish(self.operation, file, error)


class _OpenText(_Opening[AsyncTextFile]):
    __slots__ = ("_newline",)

    def __init__(
        self, path: Path, mode: str, newline: str | None, workers: Workers
    ) -> None:
        super().__init__(path, mode, workers)
        self._newline = newline

    def _file_of(self, result: Any) -> AsyncTextFile:
        return AsyncTextFile(
            *(result, self._path, self._mode, self._newline, self._workers)
        )


class _Open(_Opening[AsyncFile]):
    __slots__ = ()

    def _file_of(self, result: Any) -> AsyncFile:
        descriptor, found = result
        return AsyncFile(descriptor, self._path, self._mode, found, self._workers)
