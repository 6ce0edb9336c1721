"""
An SMTP server that accepts messages from its users and prints them.  It has STARTTLS,
and AUTH PLAIN and LOGIN, which are allowed only over TLS.

    openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost \\
        -keyout server.pem -out server.pem
    python examples/smtp_server.py server.pem [PORT]

The only user is ann, with the password secret.
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
# The arguments of MAIL and RCPT.  Only a sender may be empty, that of a bounce message.
PATHS = {
    "MAIL": re.compile(r"FROM:<([!-;=?-~]*)>(?: SIZE=([0-9]{1,20}))?", re.IGNORECASE),
    "RCPT": re.compile(r"TO:<([!-;=?-~]+)>", re.IGNORECASE),
}


class Message(NamedTuple):
    """
    A received message.

    :ivar user: the user that the client has logged in as.
    """

    user: bytes
    sender: str
    recipients: list[str]
    text: bytes


class Server:
    """
    Serves SMTP.

    :param context: the context for TLS, such as ``ssl.CertificateOptions``.
    :param passwords: the passwords, by user.
    :param deliver: called with each message.
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
                # The session starts anew (RFC 3207): the state so far is discarded.
                await stream.start_tls(self.context)
                await self.talk(stream, secure=True)
        except DelimiterNotFound:
            await reply(stream, 500, "the line is too long")
        except (IncompleteRead, UnreadPlaintext):
            # The client disconnected without QUIT.  Or commands followed STARTTLS in
            # plain text, which an attacker may have injected: they must not count as
            # encrypted.
            pass

    async def talk(self, stream: Stream, secure: bool) -> bool:
        """Handle commands; return True to start TLS, and False at the end."""
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
                    await reply(stream, 501, "the command takes no argument")
                case "EHLO" | "HELO" | "AUTH" if not rest:
                    await reply(stream, 501, "the command needs an argument")
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
                    await reply(stream, 530, "use STARTTLS and AUTH first")
                case "MAIL" | "RCPT" if path is None:
                    await reply(stream, 501, "bad address, or unknown option")
                case "MAIL" if path and sender is None:
                    if int(path[2] or 0) > MAX_MESSAGE:
                        await reply(stream, 552, "the message is too large")
                    else:
                        sender = path[1]
                        await reply(stream, 250, "sender accepted")
                case "RCPT" if path and sender is not None:
                    if len(recipients) < MAX_RECIPIENTS:
                        recipients.append(path[1])
                        await reply(stream, 250, "recipient accepted")
                    else:
                        await reply(stream, 452, "too many recipients")
                case "DATA" if recipients:
                    assert user is not None
                    assert sender is not None
                    await reply(stream, 354, "end with a line of a single dot")
                    text = await read_text(stream)
                    if len(text) > MAX_MESSAGE:
                        await reply(stream, 552, "the message is too large")
                    else:
                        self.deliver(Message(user, sender, recipients, text))
                        await reply(stream, 250, "delivered")
                    sender, recipients = None, []
                case "VRFY":
                    await reply(stream, 252, "send a message to find out")
                case _ if verb in VERBS:
                    await reply(stream, 503, "not allowed now")
                case _:
                    await reply(stream, 500, "unknown command")
        return False

    async def authenticate(
        self, stream: Stream, mechanism: str, *initial: str
    ) -> tuple[int, bytes | None]:
        """Return the code of the reply, and the user if the password is right."""
        # An initial response answers the first challenge; "=" is an empty one.
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
            # Not base64; "*" cancels.
            return 501, None
        known = self.passwords.get(user)
        # compare_digest takes the same time however much of the password is right.
        right = compare_digest(known or b"", password)
        if right and known is not None and role in (b"", user):
            return 235, user
        return 535, None


async def read_line(stream: Stream) -> bytes:
    """
    Read a line that ends with CR LF.

    Stream.read_line would also accept a bare LF.  If servers disagree on the end of
    lines, a message can smuggle in another one.
    """
    return await stream.read_until(b"\r\n", MAX_LINE)


async def read_text(stream: Stream) -> bytes:
    """Read a message; of one that is too large, keep only the beginning."""
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
    # When the reactor stops, messages in progress have 5 seconds to finish.
    reactor.addSystemEventTrigger("before", "shutdown", server.stop, 5)
    print("SMTP on 127.0.0.1", server.port.getHost().port, flush=True)
    await Deferred()


if __name__ == "__main__":
    react(main, sys.argv[1:])
