"""The token by which the engine and a notifier refer to one watched descriptor."""

from __future__ import annotations

import enum
from typing import Any

READ = 1
"""The direction of a reader: the descriptor is watched for input."""
WRITE = 2
"""The direction of a writer: the descriptor is watched for room to write."""


class Origin(enum.Enum):
    """Where a descriptor comes from, and so whether other processes may have it."""

    SHARED = "shared"
    """
    Any other descriptor: another process may have its open file description, and so may
    another descriptor of this process (dup(2)).
    """
    OWN_TCP = "own TCP"
    """A TCP connection that the reactor itself has accepted or made."""
    OWN_UNIX = "own UNIX"
    """A UNIX stream connection that the reactor itself has accepted or made."""


class Registration:
    """
    One descriptor, for as long as it has a reader or a writer.

    The engine makes a new registration whenever a descriptor gets its first reader or
    writer, and never uses it again when the last one is removed.  The kernel reuses
    descriptor numbers; registrations are not reused.  So an event for a registration
    that has ended finds no interest, and is ignored.

    :ivar descriptor: the file descriptor.
    :ivar reader: the selectable whose ``doRead`` is called, or None.
    :ivar writer: the selectable whose ``doWrite`` is called, or None.
    :ivar interest: the directions with a reader or a writer: ``READ | WRITE``.
    :ivar origin: where the descriptor comes from.
    :ivar tells_drained: whether the reader tells if it has emptied the descriptor.
        Then events may be reported as plain input (see :meth:`Notifier.wait`).
    :ivar edges: the directions whose next change the kernel will report by itself; set
        by the notifier.  The other directions need a level check each time.
    :ivar generation: a number that no other registration has, for kernels that return a
        number with each event; set by the notifier.
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
