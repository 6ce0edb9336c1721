"""The token by which the engine and a notifier refer to one watched descriptor."""

from __future__ import annotations

import enum
from typing import Any

READ = 1
"""Direction: the reader wants to know when it can read."""
WRITE = 2
"""Direction: the writer wants to know when it can write."""


class Origin(enum.Enum):
    """Where a descriptor comes from, which tells who else may hold it."""

    SHARED = "shared"
    """Anything that another process or a ``dup`` may hold as well."""
    OWN_TCP = "own TCP"
    """A TCP connection that the reactor itself accepted or made."""
    OWN_UNIX = "own UNIX"
    """A UNIX stream connection that the reactor itself accepted or made."""


class Registration:
    """
    One descriptor while somebody is interested in it.

    The engine makes a new one whenever interest in a descriptor begins, and
    never uses it again once the last interest has ended.  Numbers are reused
    by the kernel, registrations are not: an event that carries an ended
    registration finds no interest in it and goes nowhere.

    :ivar descriptor: the file descriptor.
    :ivar reader: the selectable that wants to read, or None.
    :ivar writer: the selectable that wants to write, or None.
    :ivar interest: the directions with a reader or a writer, ``READ | WRITE``.
    :ivar origin: who may hold the open file description.
    :ivar tells_drained: its reader tells whether it has emptied the descriptor,
        so that its events may come as plain input (see ``Notifier.wait``).
    :ivar edges: set by the notifier: the directions whose next change the
        kernel will announce by itself.  The others need a level check every
        time.
    :ivar generation: set by a notifier whose kernel carries a number along with
        each event: the one of this registration, which no other has.
    """

    __slots__ = (
        "descriptor",
        "edges",
        "generation",
        "interest",
        "origin",
        "reader",
        "tells_drained",
        "writer",
    )

    def __init__(
        self,
        descriptor: int,
        origin: Origin = Origin.SHARED,
        tells_drained: bool = False,
    ) -> None:
        self.descriptor: int = descriptor
        self.origin: Origin = origin
        self.tells_drained: bool = tells_drained
        self.reader: Any = None
        self.writer: Any = None
        self.interest: int = 0
        self.edges: int = 0
        self.generation: int = 0

    def __repr__(self) -> str:
        directions = ("nothing", "read", "write", "read and write")[self.interest]
        return f"<Registration of descriptor {self.descriptor} for {directions}>"
