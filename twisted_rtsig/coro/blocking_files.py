"""Blocking sockets and files: ``makefile`` and ``sendfile``."""

from __future__ import annotations

import io
import socket
from typing import IO, TYPE_CHECKING, Any, Final, Literal, TypedDict, overload

from twisted_rtsig.typing_backports import Unpack

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# The size in which sendfile() reads a file.
_PIECE: Final = 1 << 16


class MakefileOptions(TypedDict, total=False):
    """How a file of text is encoded."""

    encoding: str | None
    errors: str | None
    newline: str | None


class SocketFiles:
    """The methods of a :class:`BlockingSocket` that have to do with files."""

    # Whether close() was called.
    _closed: bool = False
    # The number of files of makefile() that keep the socket open.
    _io_refs: int = 0
    _timeout: float | None

    def send(self, data: ReadableBuffer, flags: int = 0, /) -> int:
        """See ``BlockingSocket.send``."""
        raise NotImplementedError

    def close(self) -> None:
        """See ``BlockingSocket.close``."""
        raise NotImplementedError

    @overload
    def makefile(
        self,
        mode: Literal["b", "rb", "br", "wb", "bw", "rwb", "rbw", "wrb", "wbr"],
        buffering: Literal[0],
        **options: Unpack[MakefileOptions],
    ) -> socket.SocketIO: ...

    @overload
    def makefile(
        self,
        mode: Literal["rwb", "rbw", "wrb", "wbr"],
        buffering: Literal[-1, 1] | None = None,
        **options: Unpack[MakefileOptions],
    ) -> io.BufferedRWPair: ...

    @overload
    def makefile(
        self,
        mode: Literal["b", "rb", "br"],
        buffering: Literal[-1, 1] | None = None,
        **options: Unpack[MakefileOptions],
    ) -> io.BufferedReader: ...

    @overload
    def makefile(
        self,
        mode: Literal["wb", "bw"],
        buffering: Literal[-1, 1] | None = None,
        **options: Unpack[MakefileOptions],
    ) -> io.BufferedWriter: ...

    @overload
    def makefile(
        self,
        mode: Literal["b", "rb", "br", "wb", "bw", "rwb", "rbw", "wrb", "wbr"],
        buffering: int,
        **options: Unpack[MakefileOptions],
    ) -> io.IOBase: ...

    @overload
    def makefile(
        self,
        mode: Literal["r", "w", "rw", "wr", ""] = "r",
        buffering: int | None = None,
        **options: Unpack[MakefileOptions],
    ) -> io.TextIOWrapper: ...

    def makefile(
        self,
        mode: str = "r",
        buffering: int | None = None,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """
        Make a file of the socket: see ``socket.socket.makefile``.

        The socket stays open until its files are closed as well.
        """
        # That method is written in Python, and calls recv_into(), send() and
        # _decref_socketios() of this object.
        make: Any = socket.socket.makefile
        return make(
            self, mode, buffering, encoding=encoding, errors=errors, newline=newline
        )

    def _decref_socketios(self) -> None:
        if self._io_refs > 0:
            self._io_refs -= 1
        if self._closed:
            self.close()

    def sendfile(
        self, file: IO[bytes], offset: int = 0, count: int | None = None
    ) -> int:
        """
        Send a file that is open in binary mode, up to its end or ``count`` bytes.

        The file is read in the reactor's thread, so a slow disk blocks the reactor.
        With ``Stream.send_file`` it does not.

        :return: the number of bytes that were sent.
        :raises ValueError: if the file is not in binary mode, or the timeout of the
            socket is 0.
        """
        if "b" not in getattr(file, "mode", "b"):
            raise ValueError("file should be opened in binary mode")
        if count is not None and count <= 0:
            raise ValueError(f"count must be a positive integer (got {count!r})")
        if self._timeout == 0:
            raise ValueError("non-blocking sockets are not supported")
        before = file.tell() if offset else 0
        if offset:
            file.seek(offset)
        sent = 0
        try:
            while count is None or sent < count:
                data = file.read(_PIECE if count is None else min(_PIECE, count - sent))
                if not data:
                    break
                sent += self.send(data)
        finally:
            # As socket.sendfile(), leave the position behind the data that was sent.
            if sent or offset:
                file.seek(offset + sent if sent else before)
        return sent
