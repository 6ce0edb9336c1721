"""
Send many messages at once, in one thread, with smtplib, which is written for blocking
sockets.

    python examples/smtp_client.py PORT CERTIFICATE.pem [MESSAGES]

The server runs on this machine, for example examples/smtp_server.py.  The user is ann,
with the password secret.
"""

from __future__ import annotations

import smtplib
import ssl
import sys
from contextlib import closing
from email.message import EmailMessage
from typing import Any

from twisted.internet.task import react

from twisted_rtsig.coro import TaskGroup, spawn, timeout
from twisted_rtsig.coro.stackful import allow_blocking_sockets, in_stackful, patched

HOST = "127.0.0.1"
SECONDS = 60


def send(port: int, context: ssl.SSLContext, message: EmailMessage) -> None:
    """Send a message: a plain function, without any code for the reactor."""
    # closing(), as the context manager of SMTP would say QUIT after a cancellation.
    with closing(smtplib.SMTP(HOST, port, timeout=SECONDS)) as server:
        server.starttls(context=context)
        server.login("ann", "secret")
        server.send_message(message)
        server.quit()


def message(number: int) -> EmailMessage:
    made = EmailMessage()
    made["From"], made["To"] = "ann@example.com", "bob@example.com"
    made["Subject"] = f"Message {number}"
    made.set_content("Sent by smtplib, on a reactor.")
    return made


async def send_all(port: int, context: ssl.SSLContext, count: int) -> None:
    with patched(smtplib), timeout(SECONDS):
        async with TaskGroup() as group:
            for number in range(count):
                group.spawn(in_stackful(send, port, context, message(number)))


async def main(
    reactor: Any, port: str, certificate: str, messages: str = "500"
) -> None:
    context = allow_blocking_sockets(ssl.create_default_context(cafile=certificate))
    # The certificate of the example server is for localhost, but HOST is an address.
    context.check_hostname = False
    await spawn(send_all, int(port), context, int(messages))
    print(messages, "messages are sent")


if __name__ == "__main__":
    react(main, sys.argv[1:])
