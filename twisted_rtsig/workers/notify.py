"""What systemd is told (sd_notify(3)), and what it passes (sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from typing import Final

_FIRST: Final = 3


class Notifier:
    """
    Tells systemd of the state of this service, if it asks for that.

    It takes its variables out of the environment: the workers are no services.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        self.watchdog: float | None = None
        """After how many seconds without a sign of life systemd restarts the service;
        None if it does not look after that."""
        ours = not pid or pid == str(os.getpid())
        if self._address and ours and microseconds.isdecimal() and int(microseconds):
            self.watchdog = int(microseconds) / 1e6

    def ready(self) -> None:
        """The service has started, or has loaded its new code."""
        # MAINPID: it may have become a daemon since.
        self._send("READY=1", f"MAINPID={os.getpid()}")

    def reloading(self) -> None:
        """The service loads its new code."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """The service stops."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The service is alive."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):
            address = "\0" + address[1:]
        # Systemd may be restarting, and the message is not worth an error.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending,
        ):
            sending.setblocking(False)
            sending.sendto("\n".join(lines).encode(), address)


def passed_sockets() -> tuple[list[socket.socket], list[str]]:
    """
    The sockets that systemd has passed to this process, and their names.

    They are taken out of the environment, and no child inherits them by itself.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    given = os.environ.pop("LISTEN_FDNAMES", "")
    descriptors: list[int] = []
    if pid == str(os.getpid()) and count.isdecimal():
        descriptors = list(range(_FIRST, _FIRST + int(count)))
    elif (endpoints := sys.modules.get("twisted.internet.endpoints")) is not None:
        # A plugin has imported it.  It takes the variables when it is imported, and
        # keeps what they say.
        descriptors = endpoints._SystemdParser._sddaemon.inheritedDescriptors()
    sockets = []
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
        passed = socket.socket(fileno=descriptor)
        passed.setblocking(False)
        sockets.append(passed)
    names = given.split(":") if given else []
    names += ["unknown"] * (len(sockets) - len(names))
    return sockets, names[: len(sockets)]


__all__ = ["Notifier", "passed_sockets"]
