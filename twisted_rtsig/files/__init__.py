"""
Files, read and written without blocking the reactor, on every reactor and
platform.

See ``docs/files.md``.  Importing this imports no reactor.
"""

from twisted_rtsig.files.asyncfile import AsyncFile
from twisted_rtsig.files.directories import Entries, scandir, walk
from twisted_rtsig.files.opening import open_file
from twisted_rtsig.files.path import Path
from twisted_rtsig.files.path_functions import listdir, remove, rename, stat, write_file
from twisted_rtsig.files.producer import FileProducer
from twisted_rtsig.files.tempfile_functions import (
    gettempdir,
    gettempdirb,
    mkdtemp,
    mkstemp,
)
from twisted_rtsig.files.temporary import (
    NamedTemporaryFile,
    SpooledTemporaryFile,
    TemporaryDirectory,
    TemporaryFile,
)
from twisted_rtsig.files.textfile import AsyncTextFile

__all__ = [
    "AsyncFile",
    "AsyncTextFile",
    "Entries",
    "FileProducer",
    "NamedTemporaryFile",
    "Path",
    "SpooledTemporaryFile",
    "TemporaryDirectory",
    "TemporaryFile",
    "gettempdir",
    "gettempdirb",
    "listdir",
    "mkdtemp",
    "mkstemp",
    "open_file",
    "remove",
    "rename",
    "scandir",
    "stat",
    "walk",
    "write_file",
]
