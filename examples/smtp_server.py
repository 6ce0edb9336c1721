"""
An SMTP server that takes messages from its users, and prints them: with STARTTLS,
and AUTH PLAIN and LOGIN, which are allowed only after it.

    openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost \\
        -keyout server.pem -out server.pem
    python examples/smtp_server.py server.pem [PORT]

The one user is ann, with the password secret.
"""

from __future__ import annotations

import re
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from hmac import compare_digest
from pathlib import Path
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import react

from twisted_rtsig.coro import (
    DelimiterNotFound,
    IncompleteRead,
    Stream,
    UnreadPlaintext,
    serve,
)

MAX_LINE = 1000
MAX_MESSAGE = 1 << 24
MAX_RECIPIENTS = 100
MAX_FAILURES = 3
VERBS = ("STARTTLS", "AUTH", "MAIL", "RCPT", "DATA")
# What comes behind these.  Only a sender may be empty: that of an error message.
PATHS = {
    "MAIL": re.compile(r"FROM:<([!-;=?-~]*)>(?: SIZE=([0-9]{1,20}))?", re.IGNORECASE),
    "RCPT": re.compile(r"TO:<([!-;=?-~]+)>", re.IGNORECASE),
}


class Message(NamedTuple):
    """:ivar user: who has sent it, as she has logged in."""

    user: bytes
    sender: str
    recipients: list[str]
    text: bytes


class Server:
    """
    :param context: for TLS: ``ssl.CertificateOptions``, say.
    :param passwords: by user.
    :param deliver: what is called with each message.
    """

    def __init__(
        self,
        context: Any,
        passwords: dict[bytes, bytes],
        deliver: Callable[[Message], object],
    ) -> None:
        self.context = context
        self.passwords = passwords
        self.deliver = deliver

    async def session(self, stream: Stream) -> None:
        try:
            await reply(stream, 220, "ready")
            if await self.talk(stream, secure=False):
                # It all begins again, and what was said before does not count.
                await stream.start_tls(self.context)
                await self.talk(stream, secure=True)
        except DelimiterNotFound:
            await reply(stream, 500, "that line is too long")
        except (IncompleteRead, UnreadPlaintext):
            # It has gone without a farewell; or somebody has slipped in commands
            # behind STARTTLS, which would have counted as encrypted.
            pass

    async def talk(self, stream: Stream, secure: bool) -> bool:
        """:return: whether to start TLS now; if not, it is the end."""
        user: bytes | None = None
        sender: str | None = None
        recipients: list[str] = []
        failures = 0
        while failures < MAX_FAILURES:
            line = (await read_line(stream)).decode("latin-1").rstrip(" ")
            verb, _, rest = line.partition(" ")
            verb = verb.upper()
            path = PATHS[verb].fullmatch(rest) if verb in PATHS else None
            match verb:
                case "QUIT" | "RSET" | "DATA" | "STARTTLS" if rest:
                    await reply(stream, 501, "nothing comes behind that")
                case "EHLO" | "HELO" | "AUTH" if not rest:
                    await reply(stream, 501, "something is missing")
                case "QUIT":
                    await reply(stream, 221, "goodbye")
                    return False
                case "NOOP":
                    await reply(stream, 250, "done")
                case "EHLO":
                    sender, recipients = None, []
                    offer = "AUTH PLAIN LOGIN" if secure else "STARTTLS"
                    await reply(stream, 250, "hello", f"SIZE {MAX_MESSAGE}", offer)
                case "HELO" | "RSET":
                    sender, recipients = None, []
                    await reply(stream, 250, "done")
                case "STARTTLS" if not secure:
                    await reply(stream, 220, "go ahead")
                    return True
                case "AUTH" if secure and user is None:
                    code, user = await self.authenticate(stream, *rest.split(" "))
                    failures += code == 535
                    await reply(stream, code, "welcome" if user else "no")
                case "MAIL" | "RCPT" | "DATA" if user is None:
                    await reply(stream, 530, "STARTTLS and AUTH come first")
                case "MAIL" | "RCPT" if path is None:
                    await reply(stream, 501, "that is no address, or has an option")
                case "MAIL" if path and sender is None:
                    if int(path[2] or 0) > MAX_MESSAGE:
                        await reply(stream, 552, "that would be too long")
                    else:
                        sender = path[1]
                        await reply(stream, 250, "and for whom?")
                case "RCPT" if path and sender is not None:
                    if len(recipients) < MAX_RECIPIENTS:
                        recipients.append(path[1])
                        await reply(stream, 250, "for whom else?")
                    else:
                        await reply(stream, 452, "that is enough")
                case "DATA" if recipients:
                    assert user is not None
                    assert sender is not None
                    await reply(stream, 354, "a line with nothing but a dot ends it")
                    text = await read_text(stream)
                    if len(text) > MAX_MESSAGE:
                        await reply(stream, 552, "that is too long")
                    else:
                        self.deliver(Message(user, sender, recipients, text))
                        await reply(stream, 250, "it is delivered")
                    sender, recipients = None, []
                case "VRFY":
                    await reply(stream, 252, "send a message, and see")
                case _ if verb in VERBS:
                    await reply(stream, 503, "not now")
                case _:
                    await reply(stream, 500, "what is that?")
        return False

    async def authenticate(
        self, stream: Stream, mechanism: str, *initial: str
    ) -> tuple[int, bytes | None]:
        """:return: what to reply, and the user, if she knows the password."""
        # What comes with the command answers the first question; "=" is nothing.
        answers = [b"" if each == "=" else each.encode() for each in initial]

        async def ask(question: bytes) -> bytes:
            if answers:
                return b64decode(answers.pop(), validate=True)
            await reply(stream, 334, b64encode(question).decode())
            return b64decode(await read_line(stream), validate=True)

        if mechanism.upper() not in ("PLAIN", "LOGIN"):
            return 504, None
        if len(initial) > 1:
            return 501, None
        try:
            if mechanism.upper() == "PLAIN":
                role, user, password = (await ask(b"")).split(b"\0")
            else:
                role, user = b"", await ask(b"Username:")
                password = await ask(b"Password:")
        except ValueError:
            # Not base64, such as the "*" that gives up.
            return 501, None
        known = self.passwords.get(user)
        # In the same time, however much of it is right.
        right = compare_digest(known or b"", password)
        if right and known is not None and role in (b"", user):
            return 235, user
        return 535, None


async def read_line(stream: Stream) -> bytes:
    """Not with read_line: a line that ends with a bare \\n here, and elsewhere does
    not, can smuggle in a message of its own."""
    return await stream.read_until(b"\r\n", MAX_LINE)


async def read_text(stream: Stream) -> bytes:
    """A message; of one that is too long, the beginning."""
    text = bytearray()
    while (line := await read_line(stream)) != b".":
        if len(text) <= MAX_MESSAGE:
            text += line.removeprefix(b".") + b"\r\n"
    return bytes(text)


async def reply(stream: Stream, code: int, *lines: str) -> None:
    *first, last = lines
    text = "".join(f"{code}-{each}\r\n" for each in first) + f"{code} {last}\r\n"
    await stream.write(text.encode())


async def main(reactor: Any, pem: str, port: str = "2525") -> None:
    context = PrivateCertificate.loadPEM(Path(pem).read_bytes()).options()
    handler = Server(context, {b"ann": b"secret"}, print).session
    endpoint = TCP4ServerEndpoint(
        reactor, int(port), backlog=1024, interface="127.0.0.1"
    )
    # RFC 5321, section 4.5.3.2.7: at least five minutes for each command.
    server = await serve(endpoint, handler, first_byte_timeout=None, idle_timeout=300)
    # When the reactor is stopped, messages that are under way have some seconds.
    reactor.addSystemEventTrigger("before", "shutdown", server.stop, 5)
    print("SMTP on 127.0.0.1", server.port.getHost().port, flush=True)
    await Deferred()


if __name__ == "__main__":
    react(main, sys.argv[1:])
