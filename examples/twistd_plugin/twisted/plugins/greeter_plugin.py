"""For twistd, which imports this to list its commands: this imports no reactor."""

from twisted.application.service import ServiceMaker

greeter = ServiceMaker(
    "a greeter",
    # Imported when the command is chosen.
    "greeter",
    "A server that greets its clients.",
    "greeter",
)
