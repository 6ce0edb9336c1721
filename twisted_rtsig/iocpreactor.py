"""
The completion-port reactor, for Windows.

Install it before anything imports ``twisted.internet.reactor``::

    from twisted_rtsig import iocpreactor
    iocpreactor.install()

or by its short name: ``twistd --reactor=rtsig-iocp web``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IReactorProcess
from twisted.internet.main import installReactor
from zope.interface import implementer

from twisted_rtsig.notifiers import UnsupportedReactorError
from twisted_rtsig.windows.events import WindowsEventReactor

if TYPE_CHECKING:
    from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier


def _notifier(
    call_soon: Callable[[Callable[[], None]], None],
) -> CompletionPortNotifier:
    if sys.platform != "win32":
        raise UnsupportedReactorError(
            f"completion ports exist on Windows only, and this is {sys.platform}; "
            "use --reactor=rtsig-epoll on Linux, or --reactor=select"
        )
    if sys.maxsize < 2**32:
        raise UnsupportedReactorError(
            "the completion-port reactor needs a 64-bit Python; use --reactor=select"
        )
    from twisted_rtsig.notifiers.completion_port import CompletionPortNotifier

    return CompletionPortNotifier(call_soon)


@implementer(IReactorProcess)
class CompletionPortReactor(WindowsEventReactor):
    """
    A reactor that gets events from an I/O completion port.

    :raises twisted_rtsig.notifiers.UnsupportedReactorError: on other systems than a
        64-bit Windows.
    """

    def __init__(self) -> None:
        self._port = _notifier(self.callFromThread)
        super().__init__()

    def _spawn_process(self, protocol: Any, *program: Any, **rest: Any) -> Any:
        for asked, why_not in (
            (rest["uid"] is not None, "Setting UID is unsupported on this platform."),
            (rest["gid"] is not None, "Setting GID is unsupported on this platform."),
            (rest["usePTY"], "The usePTY parameter is not supported on Windows."),
            (rest["childFDs"], "Customizing childFDs is not supported on Windows."),
        ):
            if asked:
                raise ValueError(why_not)
        # Imported here, since it imports asyncio, which is big, and children are rare.
        from twisted_rtsig.windows.processes import WindowsProcess

        return WindowsProcess(self._port, protocol, *program)

    def installWaker(self) -> None:
        """There is nothing to install: a packet to the port wakes the reactor."""

    def wakeUp(self) -> None:
        """End the sleep of the reactor, from any thread."""
        self._port.wake()


def install() -> None:
    """
    Install the completion-port reactor.

    :raises twisted_rtsig.notifiers.UnsupportedReactorError: as
        :class:`CompletionPortReactor` does.
    """
    installReactor(CompletionPortReactor())


__all__ = ["CompletionPortReactor", "install"]
