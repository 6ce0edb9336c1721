"""Notifies systemd (sd_notify(3)), and takes its sockets (sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from typing import Final

_FIRST: Final = 3


class SystemdNotifier:
    """
    Tells systemd the state of this service, if systemd asks for it.

    It removes systemd's variables from the environment, as the workers are not services
    of their own.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        self.watchdog: float | None = None
        """systemd restarts the service after so many seconds without :meth:`alive`;
        None if it does not watch the service."""
        ours = not pid or pid == str(os.getpid())
        if self._address and ours and microseconds.isdecimal() and int(microseconds):
            self.watchdog = int(microseconds) / 1e6

    def ready(self) -> None:
        """Tell that the service has started, or has loaded its new code."""
        # MAINPID, as the process may have become a daemon meanwhile.
        self._send("READY=1", f"MAINPID={os.getpid()}")

    def reloading(self) -> None:
        """Tell that the service loads its new code."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """Tell that the service stops."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Tell that the service is alive."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):
            address = "\0" + address[1:]
        # systemd may be restarting, which is no error of this service.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending,
        ):
            sending.setblocking(False)
            sending.sendto("\n".join(lines).encode(), address)


def passed_sockets() -> tuple[list[socket.socket], list[str]]:
    """
    Return the sockets that systemd passed to this process, and their names.

    Their variables are removed from the environment, and their descriptors are closed
    in child processes.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    given = os.environ.pop("LISTEN_FDNAMES", "")
    descriptors: list[int] = []
    if pid == str(os.getpid()) and count.isdecimal():
        descriptors = list(range(_FIRST, _FIRST + int(count)))
    elif (endpoints := sys.modules.get("twisted.internet.endpoints")) is not None:
        # A plugin has imported this module, which takes the variables out of the
        # environment when it is imported, and keeps their values.
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


__all__ = ["SystemdNotifier", "passed_sockets"]
