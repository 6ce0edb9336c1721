"""
A server with the protocol of Redis (RESP2): strings, lists, BLPOP and PUBLISH, all
in memory.

    python examples/redis_server.py [PORT]
    redis-cli -p 6379
    redis-benchmark -p 6379 -P 16 -t ping,set,get,incr,lpush,rpop,lrange

A client may send many commands without waiting for answers.  The transport sends the
answers to all commands that have arrived in one write.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict, deque
from contextlib import nullcontext
from itertools import islice
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.task import react

from twisted_rtsig.coro import DelimiterNotFound, IncompleteRead, Stream, serve, timeout

MAX_COMMAND = 1 << 24
MAX_ITEMS = 1 << 20
MAX_INTEGER = (1 << 63) - 1
MAX_DIGITS = 20
# As Redis; int() and float() would accept signs, spaces, underscores and "inf" as well.
INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
SECONDS = re.compile(rb"[0-9]{1,8}(\.[0-9]{0,17})?")
# A subscriber with more unread bytes than this is disconnected.
MAX_BEHIND = 1 << 20

OK, NIL, NIL_ARRAY = b"+OK\r\n", b"$-1\r\n", b"*-1\r\n"
FOR_SUBSCRIBERS = (b"SUBSCRIBE", b"UNSUBSCRIBE", b"PING", b"QUIT")


class CommandError(Exception):
    """A command has failed; the client receives the message."""


class ProtocolError(Exception):
    """
    The client receives the message, and is disconnected: it is unknown where its next
    command begins.
    """


def number(value: int) -> bytes:
    return b":%d\r\n" % value


def bulk(value: bytes | None) -> bytes:
    return NIL if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


def array(*items: bytes) -> bytes:
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def integer(digits: bytes) -> int:
    if INTEGER.fullmatch(digits):
        return in_64_bits(int(digits))
    raise CommandError("value is not an integer or out of range")


def in_64_bits(value: int) -> int:
    if -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
        return value
    raise CommandError("value is not an integer or out of range")


def size_of(line: bytes, kind: bytes, limit: int) -> int:
    digits = line[1:]
    # A check as by INTEGER, in a third of the time, as each command has several sizes.
    if line[:1] == kind and digits.isdigit() and len(digits) < MAX_DIGITS:
        size = int(digits)
        if size <= limit and (digits == b"0" or not digits.startswith(b"0")):
            return size
    raise ProtocolError(f"expected {kind.decode()} and a size, not too large")


class Database:
    """The data that all connections share."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes | deque[bytes]] = {}
        # By key, the clients that wait in BLPOP, in order of arrival.
        self.waiting: dict[bytes, OrderedDict[Deferred[bytes], None]] = {}
        self.subscribers: dict[bytes, dict[Connection, None]] = {}

    async def session(self, stream: Stream) -> None:
        await Connection(self, stream).run()

    def string(self, key: bytes) -> bytes | None:
        value = self.values.get(key)
        if isinstance(value, deque):
            raise CommandError("the value of that key is a list")
        return value

    def add(self, key: bytes, step: int) -> int:
        text = self.string(key)
        value = in_64_bits((0 if text is None else integer(text)) + step)
        self.values[key] = b"%d" % value
        return value

    def list(self, key: bytes) -> deque[bytes]:
        value = self.values.get(key, deque())
        if isinstance(value, bytes):
            raise CommandError("the value of that key is a string")
        return value

    def push(self, key: bytes, values: tuple[bytes, ...], left: bool) -> int:
        items = self.values[key] = self.list(key)
        (items.extendleft if left else items.extend)(values)
        length = len(items)
        waiting = self.waiting.get(key)
        while items and waiting:
            waiter, _ = waiting.popitem(last=False)
            # A client that waits for several keys may have got another one.
            if not waiter.called:
                waiter.callback(array(bulk(key), bulk(items.popleft())))
        if not items:
            del self.values[key]
        return length

    def pop(self, key: bytes, left: bool) -> bytes | None:
        items = self.list(key)
        if not items:
            return None
        value = items.popleft() if left else items.pop()
        if not items:
            del self.values[key]
        return value


class Connection:
    """The connection of a client."""

    def __init__(self, database: Database, stream: Stream) -> None:
        self.database = database
        self.stream = stream
        self.channels: dict[bytes, None] = {}
        self.behind = 0

    async def run(self) -> None:
        try:
            command = [b""]
            while command != [b"QUIT"]:
                command = await self.read_command()
                try:
                    answer = await self.answer(command)
                except CommandError as error:
                    answer = b"-ERR %b\r\n" % str(error).encode()
                await self.stream.write(answer)
        except (ProtocolError, DelimiterNotFound) as error:
            answer = b"-ERR Protocol error: %b\r\n" % str(error).encode()
            await self.stream.write(answer)
        except IncompleteRead:
            # The client has closed the connection.
            pass
        finally:
            for channel in self.channels:
                self.leave(channel)

    async def read_command(self) -> list[bytes]:
        stream = self.stream
        line = await stream.read_line()
        if line[:1] != b"*":
            # An inline command, as typed into telnet.
            return line.split()
        command: list[bytes] = []
        left = MAX_COMMAND
        for _ in range(size_of(line, b"*", MAX_ITEMS)):
            line = await stream.read_line()
            size = size_of(line, b"$", left)
            left -= len(line) + size
            item = await stream.read_exactly(size + 2)
            if item[size:] != b"\r\n":
                raise ProtocolError("an item is longer than it says")
            command.append(item[:size])
        return command

    async def answer(self, command: list[bytes]) -> bytes:
        if not command:
            return b""
        command[0] = name = command[0].upper()
        if self.channels and name not in FOR_SUBSCRIBERS:
            raise CommandError("a subscriber may only SUBSCRIBE and UNSUBSCRIBE")
        database = self.database
        match command:
            case [b"SET", key, value]:
                database.values[key] = value
                return OK
            case [b"GET", key]:
                return bulk(database.string(key))
            case [b"PING", *text] if self.channels:
                return array(bulk(b"pong"), bulk(b"".join(text)))
            case [b"PING"]:
                return b"+PONG\r\n"
            case [b"PING" | b"ECHO", text]:
                return bulk(text)
            case [b"DEL", _, *_]:
                gone = [database.values.pop(key, None) for key in command[1:]]
                return number(len(gone) - gone.count(None))
            case [b"INCR", key]:
                return number(database.add(key, 1))
            case [b"INCRBY", key, step]:
                return number(database.add(key, integer(step)))
            case [b"LPUSH" | b"RPUSH" as name, key, _, *_]:
                values = tuple(command[2:])
                return number(database.push(key, values, left=name == b"LPUSH"))
            case [b"LPOP" | b"RPOP" as name, key]:
                return bulk(database.pop(key, left=name == b"LPOP"))
            case [b"LLEN", key]:
                return number(len(database.list(key)))
            case [b"LRANGE", key, first, last]:
                items = database.list(key)
                part = slice(integer(first), integer(last) + 1 or None)
                start, stop, _ = part.indices(len(items))
                return array(*map(bulk, islice(items, start, max(start, stop))))
            case [b"BLPOP", _, *_, seconds]:
                return await self.blocking_pop(command[1:-1], seconds)
            case [b"SUBSCRIBE", _, *_]:
                return b"".join(map(self.subscribe, command[1:]))
            case [b"UNSUBSCRIBE", *channels]:
                return self.unsubscribe(*(channels or self.channels or (None,)))
            case [b"PUBLISH", channel, message]:
                return number(self.publish(channel, message))
            case [b"CONFIG" | b"COMMAND", *_]:
                # The command-line tools ask, and do without.
                return array()
            case [b"INFO", *_]:
                return bulk(b"# Keyspace\r\ndb0:keys=%d\r\n" % len(database.values))
            case [b"QUIT"]:
                return OK
        raise CommandError("unknown command, or wrong number of arguments")

    async def blocking_pop(self, keys: list[bytes], seconds: bytes) -> bytes:
        if not SECONDS.fullmatch(seconds):
            raise CommandError("timeout is not a float, negative or out of range")
        for key in keys:
            value = self.database.pop(key, left=True)
            if value is not None:
                return array(bulk(key), bulk(value))
        limit = timeout(float(seconds)) if float(seconds) else nullcontext()
        waiter: Deferred[bytes] = Deferred()
        for key in keys:
            self.database.waiting.setdefault(key, OrderedDict())[waiter] = None
        try:
            with limit:
                return await waiter
        except TimeoutError:
            return NIL_ARRAY
        finally:
            for key in keys:
                if (waiting := self.database.waiting.get(key)) is not None:
                    waiting.pop(waiter, None)
                    if not waiting:
                        del self.database.waiting[key]

    def subscribe(self, channel: bytes) -> bytes:
        self.channels[channel] = None
        self.database.subscribers.setdefault(channel, {})[self] = None
        return array(bulk(b"subscribe"), bulk(channel), number(len(self.channels)))

    def unsubscribe(self, *channels: bytes | None) -> bytes:
        answers: list[bytes] = []
        for channel in channels:
            if channel in self.channels:
                del self.channels[channel]
                self.leave(channel)
            left = number(len(self.channels))
            answers.append(array(bulk(b"unsubscribe"), bulk(channel), left))
        return b"".join(answers)

    def leave(self, channel: bytes) -> None:
        subscribers = self.database.subscribers[channel]
        del subscribers[self]
        if not subscribers:
            del self.database.subscribers[channel]

    def publish(self, channel: bytes, message: bytes) -> int:
        data = array(bulk(b"message"), bulk(channel), bulk(message))
        subscribers = list(self.database.subscribers.get(channel, ()))
        for each in subscribers:
            # Awaiting the write would let a subscriber that does not read block others.
            written = each.stream.write(data)
            each.behind = 0 if written.called else each.behind + len(data)
            if each.behind > MAX_BEHIND:
                each.stream.abort()
        return len(subscribers)


async def main(reactor: Any, port: str = "6379") -> None:
    endpoint = TCP4ServerEndpoint(reactor, int(port), interface="127.0.0.1")
    # A client that disconnects in BLPOP must not take a value with it.
    server = await serve(endpoint, Database().session, cancel_on_loss=True)
    print("redis-cli -p", server.port.getHost().port, flush=True)
    await Deferred()


if __name__ == "__main__":
    react(main, sys.argv[1:])
