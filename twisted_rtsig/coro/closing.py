"""What objects have in common that are closed at the end of an ``async with`` block."""

from __future__ import annotations

from types import TracebackType

from twisted.internet.defer import Deferred


class ClosedAtExit:
    """An object that is closed, or removed, at the end of an ``async with`` block."""

    def _close_at_exit(self) -> Deferred[None]:
        """Begin to close it.  That ends even if its operation is cancelled."""
        raise NotImplementedError

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        closing = self._close_at_exit()
        # A coroutine that is garbage cannot wait; it is closed all the same.
        if not isinstance(error, GeneratorExit):
            await closing
