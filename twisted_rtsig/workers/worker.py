"""
The program of a worker process: ``python -m twisted_rtsig.workers.worker``, started by
the supervisor.

It runs the application as ``twistd`` does, with the sockets of the supervisor.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
from typing import Final

from twisted_rtsig import workers
from twisted_rtsig.workers.boot import CONTROL, INHERITED, LIFELINE, SOCKETS, Boot

# The first descriptor that systemd passes to a service.
_SYSTEMD: Final = 3


def main() -> None:
    """Run the worker until it ends."""
    control, sockets, lifeline = (
        _take(descriptor) for descriptor in (CONTROL, SOCKETS, LIFELINE)
    )
    connection = socket.socket(fileno=control)
    boot, rest = _read_boot(connection)
    _take_inherited(boot)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU):
        # A terminal sends them to all processes, but only the supervisor handles them.
        # A handler, as SIG_IGN would be inherited by child processes.
        signal.signal(number, _ignore)
    sys.path[:] = boot.path
    if boot.folder is not None:
        os.chdir(boot.folder)
    sys.argv[:] = ["twistd", *boot.arguments]
    workers._current = workers.Worker(boot.number, boot.count)

    from twisted.python.util import switchUID

    # Only the first worker starts as root: the supervisor has switched its own user
    # before it starts the others.
    if (boot.uid is not None or boot.gid is not None) and os.geteuid() == 0:
        switchUID(boot.uid, boot.gid, boot.euid)

    from twisted_rtsig.workers.running import run

    run(boot, connection, rest, socket.socket(fileno=sockets), lifeline)


def _take(descriptor: int) -> int:
    """Move a descriptor to a high number, which no child process inherits."""
    # PyPy has no F_DUPFD_CLOEXEC.
    taken = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64)
    os.set_inheritable(taken, False)
    os.close(descriptor)
    return taken


def _read_boot(connection: socket.socket) -> tuple[Boot, bytes]:
    """Read the first message; return it, and the bytes that follow it."""
    data = b""
    while b"\n" not in data:
        more = connection.recv(65536)
        if not more:
            # The supervisor has ended.
            os._exit(1)
        data += more
    line, _, rest = data.partition(b"\n")
    return Boot.from_message(json.loads(line)), rest


def _take_inherited(boot: Boot) -> None:
    """Move the sockets that systemd passed to the numbers that applications expect."""
    count = len(boot.inherited)
    for number in range(count):
        os.dup2(INHERITED + number, _SYSTEMD + number, inheritable=False)
    for number in range(max(_SYSTEMD + count, INHERITED), INHERITED + count):
        os.close(number)
    if count:
        os.environ["LISTEN_PID"] = str(os.getpid())
        os.environ["LISTEN_FDS"] = str(count)
        os.environ["LISTEN_FDNAMES"] = ":".join(boot.inherited)


def _ignore(number: int, frame: object) -> None:
    """Ignore a signal that the supervisor handles."""


if __name__ == "__main__":
    main()


__all__ = ["main"]
