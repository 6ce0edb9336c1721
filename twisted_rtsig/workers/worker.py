"""
A worker process: ``python -m twisted_rtsig.workers.worker``, which the supervisor
starts.

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

# Where the descriptors that systemd passes begin.
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
        # A terminal sends them to all processes: they are the supervisor's to handle.
        # Children have the default, as they would not if it were ignored.
        signal.signal(number, _ignore)
    sys.path[:] = boot.path
    if boot.folder is not None:
        os.chdir(boot.folder)
    sys.argv[:] = ["twistd", *boot.arguments]
    workers._current = workers.Worker(boot.number, boot.count)

    from twisted.python.util import switchUID

    # The supervisor has done so before it starts the successors of this one.
    if (boot.uid is not None or boot.gid is not None) and os.geteuid() == 0:
        switchUID(boot.uid, boot.gid, boot.euid)

    from twisted_rtsig.workers.running import run

    run(boot, connection, rest, socket.socket(fileno=sockets), lifeline)


def _take(descriptor: int) -> int:
    """The same with another number, which no child inherits."""
    # PyPy has no F_DUPFD_CLOEXEC.
    taken = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64)
    os.set_inheritable(taken, False)
    os.close(descriptor)
    return taken


def _read_boot(connection: socket.socket) -> tuple[Boot, bytes]:
    """The first message, and what has come of the next ones."""
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
    """Put the sockets that systemd has passed where applications look for them."""
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
    """The handler of signals that are the supervisor's."""


if __name__ == "__main__":
    main()


__all__ = ["main"]
