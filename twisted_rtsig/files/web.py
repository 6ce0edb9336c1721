"""
A resource of ``twisted.web`` that serves files without blocking the reactor.

The headers are those of ``twisted.web.static.File``, which makes them here, too.  But
that class does not look for the file, and neither opens nor reads it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.filepath import FilePath, InsecurePath
from twisted.web import http, pages, server, static
from twisted.web.resource import IResource, Resource
from twisted.web.util import Redirect

from twisted_rtsig.coro.errors import StreamError
from twisted_rtsig.coro.scopes import shield
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.files.asyncfile import AsyncFile
from twisted_rtsig.files.descriptors import FURTHEST, Descriptor
from twisted_rtsig.files.open_calls import open_cached, open_descriptor
from twisted_rtsig.files.producer import FileProducer, Part
from twisted_rtsig.files.workers import workers_of

_log = Logger()

# Up to this size a file is written without a producer.
_LITTLE = 1 << 16

INDEX_NAMES = ("index.html", "index.htm", "index")
"""The names of index files, by default."""


class StaticResource(Resource):
    """
    Serves a folder and its content, or a file.  It supports ranges, conditional
    requests and types as ``twisted.web.static.File`` does, and lists folders that have
    no index.

    :param path: the path of the folder or the file.
    :param default_type: the type of files whose name does not tell their type.
    :param index_names: the names of index files, which are served for their folder.
    """

    def __init__(
        self,
        path: str,
        default_type: str = "text/html",
        index_names: Sequence[str] = INDEX_NAMES,
    ) -> None:
        super().__init__()
        self._root = FilePath(path)
        self._default_type = default_type
        self._index_names = tuple(index_names)
        self._headers = _Headers(path, default_type)

    def getChild(self, path: bytes, request: Any) -> Resource:
        """See ``IResource.getChildWithDefault``."""
        return _Below(self, path)

    def render_GET(self, request: Any) -> int:
        """Serve the folder or the file itself."""
        return self.serve(request, [])

    render_HEAD = render_GET

    def serve(self, request: Any, names: list[bytes]) -> int:
        """Serve the file or folder at a path below this resource."""
        # The reason why the client has left, once it has.
        gone: list[Failure] = []
        task = spawn(self._serve, request, names, gone)

        def leave(reason: Failure) -> None:
            gone.append(reason)
            task.cancel("the client has left")

        request.notifyFinish().addErrback(leave)
        task.as_deferred().addErrback(_tell_failure, request, gone)
        return server.NOT_DONE_YET

    async def _serve(
        self, request: Any, names: list[bytes], gone: list[Failure]
    ) -> None:
        path = self._path_of(names)
        if path is None:
            request.render(pages.notFound())
            return
        # A file that is found has to be closed, even if the client leaves meanwhile.
        with shield():
            found = await self._find(path, names[-1:] == [b""], request)
        if not isinstance(found, AsyncFile):
            if not gone:
                request.render(found)
            return
        async with found as file:
            # Reading cached data does not wait, so the cancellation would not take
            # effect there.
            parts = [] if gone else self._parts(request, file)
            if parts:
                await self._send(request, file, parts)
            if not gone:
                request.finish()

    def _path_of(self, names: list[bytes]) -> FilePath[str] | None:
        """The path of a file or folder; None if these names cannot be a path."""
        path = self._root
        for each in names[:-1] if names[-1:] == [b""] else names:
            try:
                if not each:
                    return None
                path = path.child(each.decode())
            except (InsecurePath, UnicodeDecodeError):
                return None
        return path

    async def _find(
        self, path: FilePath[str], is_folder: bool, request: Any
    ) -> AsyncFile | IResource:
        """The file to send, or a resource to render in its place."""
        workers = workers_of(None)
        name = os.path.join(path.path, *self._index_names[:1] if is_folder else ())
        opened = open_cached(name)
        if opened is not None:
            return AsyncFile(opened[0], name, "rb", opened[1], workers)
        try:
            found = await workers.call(
                f"to open {path.path!r}", self._open, path.path, is_folder, request.uri
            )
        except PermissionError:
            return pages.forbidden()
        except ValueError:
            # No file can have such a name.
            return pages.notFound()
        except OSError as error:
            if error.errno not in _NOT_FOUND:
                raise
            return pages.notFound()
        if isinstance(found, Resource):
            return found
        if found is None:
            location, mark, query = request.uri.partition(b"?")
            return Redirect(location + b"/" + mark + query)
        name, descriptor, stat = found
        return AsyncFile(descriptor, name, "rb", stat, workers)

    def _open(self, path: str, is_folder: bool, uri: bytes) -> _Found:
        """Called in a thread: open the file, or the index of the folder."""
        if not os.path.isdir(path):
            if is_folder:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            return path, *open_descriptor(path, os.O_RDONLY, 0)
        if not is_folder:
            return None
        for name in self._index_names:
            index = os.path.join(path, name)
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                return index, *open_descriptor(index, os.O_RDONLY, 0)
        names = filter(_can_be_asked_for, sorted(os.listdir(path)))
        lister = static.DirectoryLister(
            path, list(names), defaultType=self._default_type
        )
        page = _Page(uri)
        return static.Data(lister.render(page), page.type.decode())

    def _parts(self, request: Any, file: AsyncFile) -> list[Part]:
        """Set the headers; return the parts of the file to send."""
        request.setHeader(b"accept-ranges", b"bytes")
        asked = request.requestHeaders
        if (
            asked.hasHeader(b"if-none-match")
            or _date(request, b"if-modified-since") is None
        ):
            # With If-None-Match it is ignored (RFC 9110, 13.1.3).  And Twisted raises
            # exceptions for some values that are not dates.
            asked.removeHeader(b"if-modified-since")
        cached = request.setLastModified(file._opened.st_mtime) is http.CACHED
        if _is_another_version(request):
            request.setResponseCode(http.PRECONDITION_FAILED)
            request.setHeader(b"content-length", b"0")
            return []
        if cached or request.getHeader(b"if-none-match") == b"*":
            request.setResponseCode(http.NOT_MODIFIED)
            return []
        headers = self._headers
        headers.describe(str(file.name), file._opened.st_size)
        if request.method == b"HEAD" or not headers.find_ranges(request):
            # Range applies only to content that is sent, so Twisted must not see it
            # here.
            asked.removeHeader(b"range")
        producer = headers.makeProducer(request, None)
        if request.method == b"HEAD":
            return []
        if isinstance(producer, static.MultipleRangeStaticProducer):
            if request.code == http.REQUESTED_RANGE_NOT_SATISFIABLE:
                return []
            return list(producer.rangeInfo)
        if isinstance(producer, static.SingleRangeStaticProducer):
            return [(b"", producer.offset, producer.size)]
        return [(b"", 0, file._opened.st_size)]

    async def _send(self, request: Any, file: AsyncFile, parts: list[Part]) -> None:
        before, offset, count = parts[0]
        if len(parts) == 1 and not before and count <= _LITTLE:
            data = await file.read_at(offset, count)
            if len(data) == count:
                request.write(data)
                return
        await FileProducer.of_parts(file, parts).start(request)


class _Below(Resource):
    """The resources below a :class:`StaticResource`."""

    isLeaf = True

    def __init__(self, root: StaticResource, name: bytes) -> None:
        super().__init__()
        self._root = root
        self._name = name

    def render_GET(self, request: Any) -> int:
        return self._root.serve(request, [self._name, *request.postpath])

    render_HEAD = render_GET


class _Headers(static.File):
    """Makes the headers of a file as Twisted does, without looking at the file."""

    def describe(self, name: str, size: int) -> None:
        """Set the name and the size of the next file."""
        self.type, self.encoding = static.getTypeAndEncoding(
            name, self.contentTypes, self.contentEncodings, self.defaultType
        )
        self._size = size

    def getFileSize(self) -> int:
        """See ``File.getFileSize``."""
        return self._size

    def find_ranges(self, request: Any) -> bool:
        """
        Find out which ranges of the file a request asks for.

        :return: whether to send only these.  If not, ``Range`` is ignored (RFC 9110,
            14.2): it is malformed, or asks for too much.
        """
        self._ranges = _ranges(request)
        sent = sum(self._rangeToOffsetAndSize(*each)[1] for each in self._ranges)
        if sent > 2 * self._size:
            # More than two of the ranges overlap.  A request of a few kilobytes could
            # ask for many times the size of the file.
            return False
        if not self._size and any(start is None and end for start, end in self._ranges):
            # The last bytes of an empty file are a valid range, but cannot be written
            # as a Content-Range.
            return False
        return bool(self._ranges)

    def _parseRangeHeader(self, range: bytes) -> list[_Range]:
        return self._ranges

    def _rangeToOffsetAndSize(
        self, start: int | None, end: int | None
    ) -> tuple[int, int]:
        if start is None and end is not None:
            # More bytes from the end than the file has means the whole file.
            end = min(end, self._size)
        found: tuple[int, int] = super()._rangeToOffsetAndSize(start, end)
        return found


class _Page:
    """
    The request that a listing is rendered for: in a thread, which must not use the real
    one.
    """

    def __init__(self, uri: bytes) -> None:
        self.uri = uri
        self.type = b""

    def setHeader(self, name: bytes, value: bytes) -> None:
        self.type = value


# The first and the last byte.  Without a first byte, the number of bytes at the end.
_Range = tuple[int | None, int | None]

_RANGE = re.compile(rb"(?!-$)(\d*)-(\d*)")

# As in Apache.
_MOST_RANGES = 200

# A file, a listing, or None: a folder that was asked for without the slash.
_Found = tuple[str, Descriptor, os.stat_result] | Resource | None


# The file does not exist, or cannot be served: it is a FIFO, for example.
_NOT_FOUND = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO),
    }
)


def _can_be_asked_for(name: str) -> bool:
    """Whether a URL can contain this name: whether it can be encoded as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ranges(request: Any) -> list[_Range]:
    """The ranges that a request asks for; none if the header is malformed."""
    header = request.getHeader(b"range")
    if header is None:
        return []
    unit, _, value = header.partition(b"=")
    # This resource sends no entity tags, so none can match (RFC 9110, 13.1.5).
    condition = request.getHeader(b"if-range")
    if unit.lower() != b"bytes" or condition not in (
        None,
        http.datetimeToString(request.lastModified),
    ):
        return []
    parts = [part for each in value.split(b",") if (part := each.strip(b" \t"))]
    if len(parts) > _MOST_RANGES:
        return []
    ranges = []
    for each in parts:
        match = _RANGE.fullmatch(each)
        if match is None:
            return []
        start, end = map(_number, match.groups())
        if start is not None and end is not None and start > end:
            return []
        ranges.append((start, end))
    return ranges


def _number(digits: bytes) -> int | None:
    if not digits:
        return None
    digits = digits.lstrip(b"0") or b"0"
    # Python refuses to convert thousands of digits.
    return int(digits) if len(digits) < len(str(FURTHEST)) else FURTHEST


def _date(request: Any, name: bytes) -> int | None:
    """The date of a header, in seconds since 1970; None if it has none."""
    value = request.getHeader(name)
    if not value:
        return None
    try:
        date: int = http.stringToDatetime(value)
    except (ValueError, LookupError, ArithmeticError):
        return None
    return date


def _is_another_version(request: Any) -> bool:
    """Whether the client asks for another version of the file (RFC 9110, 13.2.2)."""
    match = request.getHeader(b"if-match")
    if match is not None:
        # This resource sends no entity tags, so none can match.
        return bool(match != b"*")
    date = _date(request, b"if-unmodified-since")
    return date is not None and request.lastModified > date


def _tell_failure(failure: Failure, request: Any, gone: list[Failure]) -> None:
    if failure.check(CancelledError, StreamError):
        # The client has gone.
        return
    if gone or request.startedWriting:
        _log.failure("{uri} was not served", failure, uri=request.uri)
        if not request.finished:
            # Less was sent than Content-Length has announced.
            request.loseConnection()
    else:
        # The headers of the file do not belong to the error page.
        for name in (b"accept-ranges", b"content-encoding", b"content-range"):
            request.responseHeaders.removeHeader(name)
        request.lastModified = None
        request.processingFailed(failure)
