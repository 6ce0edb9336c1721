"""The command ``twistd workers``, whose code is imported only when it is used."""

from twisted.application.service import ServiceMaker

workers = ServiceMaker(
    "The same application on all cores",
    "twisted_rtsig.workers.options",
    "Run another command, or an application file, in several processes.",
    "workers",
)

__all__ = ["workers"]
