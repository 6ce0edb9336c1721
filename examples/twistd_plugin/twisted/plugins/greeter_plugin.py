"""twistd imports this to list its commands, so it must not import a reactor."""

from twisted.application.service import ServiceMaker

greeter = ServiceMaker(
    "Greeter",
    # This module is imported only when the command is chosen.
    "greeter",
    "A server that greets its clients.",
    "greeter",
)
