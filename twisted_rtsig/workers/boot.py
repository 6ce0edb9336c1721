"""What the supervisor tells a worker that starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

CONTROL: Final = 3
"""The descriptor of the control channel in a worker that starts."""
SOCKETS: Final = 4
"""That of the channel on which it asks for listening sockets."""
LIFELINE: Final = 5
"""That of the pipe that ends when the supervisor does."""
INHERITED: Final = 6
"""The first of those that systemd has passed."""


@dataclass(frozen=True)
class Boot:
    """
    How a worker is to run the application.

    :ivar number: the number of its slot.
    :ivar count: how many workers there are to be.
    :ivar reactor: the short name of the reactor.
    :ivar path: ``sys.path``.
    :ivar folder: the working directory in which the application is loaded; None to
        stay where the process is.
    :ivar arguments: options of ``twistd``, and the command with its own.
    :ivar uid: the user to become before anything is loaded, or None.
    :ivar gid: the group, or None.
    :ivar euid: whether to set only the effective ones.
    :ivar text_log: whether log lines are written to standard output as text; else the
        options say where the log goes.
    :ivar supervisor: the process id of the supervisor.
    :ivar pidfile: that of the supervisor; empty if there is none.
    :ivar inherited: the names of sockets passed by systemd.
    :ivar grace: how many seconds the worker has to finish if something else than the
        supervisor stops it.
    """

    number: int
    count: int
    reactor: str
    path: list[str]
    folder: str | None
    arguments: list[str]
    uid: int | None
    gid: int | None
    euid: bool
    text_log: bool
    supervisor: int
    pidfile: str
    inherited: list[str]
    grace: float

    def to_message(self) -> dict[str, Any]:
        """As a message of the control channel."""
        return {"type": "boot", **asdict(self)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Boot:
        """From what :meth:`to_message` has returned."""
        return cls(**{key: value for key, value in message.items() if key != "type"})


__all__ = ["CONTROL", "INHERITED", "LIFELINE", "SOCKETS", "Boot"]
