"""The descriptors and the settings that the supervisor passes to a new worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

CONTROL: Final = 3
"""The descriptor of the control channel, in a worker that starts."""
SOCKETS: Final = 4
"""The descriptor on which the worker asks for listening sockets."""
LIFELINE: Final = 5
"""The descriptor of a pipe that reaches its end when the supervisor ends."""
INHERITED: Final = 6
"""The first of the descriptors that systemd passed to the supervisor."""


@dataclass(frozen=True)
class Boot:
    """
    The settings with which a worker runs the application.

    :ivar number: the number of its slot.
    :ivar count: the wanted number of workers.
    :ivar reactor: the short name of the reactor.
    :ivar path: ``sys.path``.
    :ivar folder: the working directory in which to load the application; None to
        keep the current one.
    :ivar arguments: the arguments of ``twistd``: its options, the command, and the
        options of the command.
    :ivar uid: the user to become before the application is loaded, or None.
    :ivar gid: the group to become, or None.
    :ivar euid: whether to set only the effective user and group.
    :ivar text_log: whether to write log lines as text to standard output; otherwise
        the arguments configure the log.
    :ivar supervisor: the process id of the supervisor.
    :ivar pidfile: the path of the supervisor's pid file; empty if it has none.
    :ivar inherited: the names of the sockets that systemd passed.
    :ivar grace: how many seconds the worker has to finish if something other than the
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
        """Return the settings as a message of the control channel."""
        return {"type": "boot", **asdict(self)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Boot:
        """Make the settings from a message that :meth:`to_message` made."""
        return cls(**{key: value for key, value in message.items() if key != "type"})


__all__ = ["CONTROL", "INHERITED", "LIFELINE", "SOCKETS", "Boot"]
