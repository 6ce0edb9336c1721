"""
Transfer money in PostgreSQL in many sessions at once, in one thread, with pg8000, which
is written for blocking sockets.

    python examples/postgres_client.py USER PORT [SESSIONS]

The server runs on this machine, trusts the user, and allows that many connections.
"""

from __future__ import annotations

import sys
from typing import Any

import pg8000
import pg8000.native
from twisted.internet.task import react

from twisted_rtsig.coro import TaskGroup, spawn, timeout
from twisted_rtsig.coro.stackful import in_stackful, patched

SECONDS = 60
CREATE = "CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL)"
FILL = "INSERT INTO accounts SELECT each, 100 FROM generate_series(0, 9) AS each"
MOVE = "UPDATE accounts SET balance = balance + :amount WHERE id = :id"
BALANCES = "SELECT balance FROM accounts ORDER BY id"


def connect(user: str, port: int) -> pg8000.native.Connection:
    # For TLS, allow_blocking_sockets(ssl.create_default_context()).
    return pg8000.native.Connection(
        user, "127.0.0.1", "postgres", port, timeout=SECONDS, ssl_context=False
    )


def create(user: str, port: int) -> None:
    with connect(user, port) as connection:
        connection.run("DROP TABLE IF EXISTS accounts")
        connection.run(CREATE)
        connection.run(FILL)


def transfer(user: str, port: int, number: int) -> None:
    """Transfer money: a plain function, without any code for the reactor."""
    # Sorted, so that no two transactions wait for each other.
    moves = sorted([(number % 10, -1), ((number + 1) % 10, 1)])
    with connect(user, port) as connection:
        connection.run("BEGIN")
        for account, amount in moves:
            connection.run(MOVE, id=account, amount=amount)
        connection.run("COMMIT")


def balances(user: str, port: int) -> list[int]:
    with connect(user, port) as connection:
        rows: Any = connection.run(BALANCES)
        return [balance for (balance,) in rows]


async def transfer_all(user: str, port: int, sessions: int) -> list[int]:
    with patched(pg8000), timeout(SECONDS):
        await in_stackful(create, user, port)
        async with TaskGroup() as group:
            for number in range(sessions):
                group.spawn(in_stackful(transfer, user, port, number))
        return await in_stackful(balances, user, port)


async def main(reactor: Any, user: str, port: str, sessions: str = "100") -> None:
    left = await spawn(transfer_all, user, int(port), int(sessions))
    print("balances:", *left)
    assert sum(left) == 1000


if __name__ == "__main__":
    react(main, sys.argv[1:])
