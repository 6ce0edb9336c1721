"""
The standard input and output of a program, on POSIX: Twisted's ``StandardIO``.

A ``StandardIO`` ends when its input ends, unless its protocol supports half closes, and
then drops the output that is still queued.  So the reactor delays the end of the input
until the output was written, or cannot be written.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.posixbase import PosixReactorBase, unixEnabled

if unixEnabled:
    from twisted.internet.process import ProcessReader
    from twisted.internet.stdio import StandardIO


def _output_of(reader: ProcessReader) -> Any:
    """
    The writer of the ``StandardIO`` that ends when ``reader`` does.

    :return: None if there is none.
    """
    transport: Any = reader.proc
    if (
        not isinstance(reader.proc, StandardIO)
        or IHalfCloseableProtocol(transport.protocol, None) is not None
    ):
        return None
    return transport._writer


class StandardIOReactor(PosixReactorBase):
    """
    Delays the end of an input while there is output to write.

    Output that the protocol or a producer writes later does not delay it further.
    """

    def __init__(self) -> None:
        # For each writer: the reader that has met the end, and the reason.
        self._held_ends: dict[Any, tuple[Any, Any]] = {}
        super().__init__()

    def _disconnectSelectable(
        self, selectable: Any, why: Any, isRead: Any, *rest: Any
    ) -> None:
        if isRead and unixEnabled and isinstance(selectable, ProcessReader):
            writer = _output_of(selectable)
            if writer is not None and writer in self.getWriters():
                self.removeReader(selectable)
                self._held_ends[writer] = selectable, why
                return
        super()._disconnectSelectable(selectable, why, isRead, *rest)

    def _output_ended(self, writer: Any) -> None:
        """Report the end in the next pass: the output is written, or never will be."""
        if writer in self._held_ends:
            self.callLater(0, self._tell_held_end, writer)

    def _tell_held_end(self, writer: Any) -> None:
        reader, why = self._held_ends.pop(writer, (None, None))
        # The end of the output may have disconnected the reader.
        if reader is not None and not reader.disconnected:
            super()._disconnectSelectable(reader, why, True)
