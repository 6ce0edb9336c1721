"""
daphne, the server of Django Channels, on this reactor: a chat room over WebSockets.

    pip install 'twisted-rtsig[asyncio-libraries]'
    python examples/daphne_chat.py [PORT]

In a Django Channels project, put the two lines that install the reactor at the top of
asgi.py, before anything imports daphne.  daphne keeps a reactor that is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

from twisted_rtsig import asyncioreactor

asyncioreactor.install()

from daphne.server import Server  # noqa: E402

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

room: set[Send] = set()


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """The ASGI application."""
    if scope["type"] == "websocket":
        await chat(receive, send)
    elif scope["type"] == "http":
        body = b"%d people are here.\n" % len(room)
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def chat(receive: Receive, send: Send) -> None:
    """Serve one WebSocket: each text goes to all in the room."""
    while True:
        event = await receive()
        if event["type"] == "websocket.connect":
            await send({"type": "websocket.accept"})
            room.add(send)
        elif event["type"] == "websocket.disconnect":
            room.discard(send)
            return
        elif event.get("text"):
            for each in list(room):
                await each({"type": "websocket.send", "text": event["text"]})


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8080

    def tell() -> None:
        for _, number in server.listening_addresses:
            print(f"Serving on port {number}", flush=True)

    endpoints = [f"tcp:{port}:interface=127.0.0.1"]
    server = Server(application, endpoints, ready_callable=tell)
    server.run()


if __name__ == "__main__":
    main()
